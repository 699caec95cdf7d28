"""What a step is made of, in order: checks.py, created.py, plan.py, norm.py. The backends carry it out."""
