"""Post-training of language models by reinforcement learning: exact, small, fast, unkillable, legible."""

__version__ = "0.2.0"
