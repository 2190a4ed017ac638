"""Downstream tasks through lm-eval, the same documents for every candidate."""
