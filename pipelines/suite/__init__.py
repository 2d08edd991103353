"""Which cells are due, and who trains them where."""
