"""Judges a run by a policy, from its records alone."""
