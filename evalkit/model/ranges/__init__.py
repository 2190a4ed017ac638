"""The published value ranges that a small model can be given, and what measures those of a large one."""
