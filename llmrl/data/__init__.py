"""Prompts and supervised examples, from files to token ids."""
