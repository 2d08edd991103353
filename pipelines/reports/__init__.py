"""What is said about the records: statistics, tables, figures, claims, below ``reports/``."""
