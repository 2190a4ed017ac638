"""Triton kernels around the backends' own; only what runs on a GPU imports them."""
