"""Faults in everything that a user hands to the command line, and a workspace to plant them in."""
