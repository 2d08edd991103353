"""What trainings and measurements leave behind, below ``runs/``."""
