"""What zeros there are (report.py), and what the penalties come to (value.py)."""
