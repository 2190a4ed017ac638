"""The formats of a stored row, one a file."""
