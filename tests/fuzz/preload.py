"""Imported once by the server that each combination is forked from: what takes seconds to import."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import accelerate  # noqa: F401
import peft  # noqa: F401
import transformers  # noqa: F401

import llmrl.cli
import llmrl.sizing  # noqa: F401
