"""What lies on disk of a model: Orbax's checkpoints, a workdir's contract, the original's files, the hub."""
