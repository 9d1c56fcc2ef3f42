"""Processes and devices: what accelerate does for us."""
