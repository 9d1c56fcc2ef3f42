"""The loop, the optimizer step, checkpoints and the run."""
