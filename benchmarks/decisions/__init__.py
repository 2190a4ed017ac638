"""Experiments on the verdict itself: bf16 against bf16, planted damage of known size, real formats."""
