"""Policies, critics and reward models over models of transformers."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; it warns of kernels that a CPU lacks
