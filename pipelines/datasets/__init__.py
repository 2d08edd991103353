"""Data sets: one file each (``Config``, ``meta``, ``prepare``), from ``archives`` by a ``writer`` into one
on-disk form (``folder``); one augmentation (``transforms``)."""
