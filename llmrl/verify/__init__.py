"""Algorithms against exact answers, on a language model so small that every response of it can be enumerated."""
