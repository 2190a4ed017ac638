"""What two tensors, selections or distributions differ by."""
