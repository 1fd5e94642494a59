"""SR4IR: super-resolution for image recognition, its baselines and ablations."""
