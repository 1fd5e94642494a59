"""Each paper in one file: a whole training in plain PyTorch and the public names of restoreloss."""
