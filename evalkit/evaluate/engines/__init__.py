"""What runs a candidate over token ids: `base.py` says what an engine is, every other file is one."""
