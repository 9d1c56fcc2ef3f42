"""Policies, critics and reward models over models of transformers."""
