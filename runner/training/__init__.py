"""Learning from rollouts: the trainer of an adapter, its checkpoints and its curve."""
