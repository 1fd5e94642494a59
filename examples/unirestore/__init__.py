"""UniRestore: one restorer for people and several task networks."""
