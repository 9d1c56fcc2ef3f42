"""Policies over transformers models."""
