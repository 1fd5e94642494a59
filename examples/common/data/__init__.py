"""Data of the recipes: photographs, generated tasks, data sets on disk, degradations, tiles."""
