import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost these tiny models more than they bring, and much more beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
