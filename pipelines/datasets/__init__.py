"""Data sets: one file each (``Config`` and ``prepare``), one on-disk form (``folder``), one augmentation
(``transforms``).
"""
