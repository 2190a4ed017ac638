"""Checkpoints with random weights, in the layout of a published one."""
