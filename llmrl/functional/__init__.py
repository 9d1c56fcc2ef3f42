"""Pure mathematics: tensors in, tensors out; torch and jaxtyping, nothing else."""
