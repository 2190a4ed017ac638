from types import SimpleNamespace

CONTEXT = SimpleNamespace(slot_mapping={})


def get_forward_context():
    return CONTEXT
