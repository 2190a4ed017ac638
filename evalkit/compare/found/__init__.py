"""What was found of each layer, phase and token, as records."""
