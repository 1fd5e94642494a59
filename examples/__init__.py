"""Recipes a person runs from a clone: ``python -m examples.quickstart``."""
