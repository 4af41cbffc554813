"""Tests that run PyTorch libraries beside jaxpost; two threads, so that they do not fight over the cores."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "parity" in item.path.parts:
            # Their own deprecations are not ours to fix.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(2)
