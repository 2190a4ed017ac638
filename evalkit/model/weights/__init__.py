"""A checkpoint's weights read layer by layer, and fp8 blocks multiplied out."""
