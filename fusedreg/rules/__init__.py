"""The rules, a file each: what it declares (spec.py), its step in the oracle, its optimizer. registry.py lists them."""
