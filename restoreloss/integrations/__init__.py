"""Thin adapters for other frameworks, one file each. Nothing here is imported by ``import restoreloss``."""
