"""Engines that draw responses from the policy."""
