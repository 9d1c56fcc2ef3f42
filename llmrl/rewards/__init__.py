"""Rewards: functions, rules and models that score responses."""
