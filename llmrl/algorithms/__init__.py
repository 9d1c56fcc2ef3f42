"""One file an algorithm: what to learn from a rollout, and the losses that learn it."""
