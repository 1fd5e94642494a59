"""The parts that several examples share: data, networks, and the engine that runs a training."""
