"""Environments: what answers the actor between the turns of an episode, and the tools that it calls."""
