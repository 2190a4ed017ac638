"""Layers in words."""

from collections.abc import Iterable


def spans(layers: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7, in whatever order they come."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
