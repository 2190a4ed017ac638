"""Checkpoints as transformers models whose attention runs the sparse MLA path."""
