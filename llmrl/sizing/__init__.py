"""Memory of a run before it begins: an estimate from a recipe, a model's config.json and a launch."""

from llmrl.sizing.estimate import Estimate, Item, estimate_memory
from llmrl.sizing.report import describe_memory
from llmrl.sizing.shape import ModelShape, read_shape, shape_of
from llmrl.sizing.strategy import Strategy, launched_strategy

__all__ = [
    "Estimate",
    "Item",
    "ModelShape",
    "Strategy",
    "describe_memory",
    "estimate_memory",
    "launched_strategy",
    "read_shape",
    "shape_of",
]
