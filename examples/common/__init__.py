"""What several examples share: photographs, small networks, the run directory."""
