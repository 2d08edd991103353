"""Rival methods: one file each, found by its name in ``methods:`` of params.yaml."""
