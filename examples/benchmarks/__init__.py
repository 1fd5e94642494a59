"""The costs of the library, as ratios measured in one run."""
