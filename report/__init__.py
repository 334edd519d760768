"""What people look at: tables, plots, verdicts beside published numbers."""
