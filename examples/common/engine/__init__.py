"""What every trainer does: its command line and config, the run directory, the loop, evaluation."""
