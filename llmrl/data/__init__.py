"""Prompts, supervised examples and preference pairs, from files to token ids."""
