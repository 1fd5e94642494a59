"""Augmentations map (restored, target) to a new image."""
