from types import SimpleNamespace

current_platform = SimpleNamespace(get_device_capability=lambda: SimpleNamespace(major=9, minor=0))
