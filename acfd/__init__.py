"""ACFD, adaptive channel-wise feature distillation: the paper's method and nothing else (see README.md)."""
