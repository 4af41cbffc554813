"""Tests that run PyTorch libraries beside jaxpost; two threads, so that they do not fight over the cores."""

import pytest

from tests.parity.older_trl import install


def pytest_collection_modifyitems(items):
    for item in items:
        if "parity" in item.path.parts:
            # Their own deprecations are not ours to fix.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def older_trl(tmp_path_factory):
    """A folder with the TRL of `tests.parity.older_trl`."""
    return install(tmp_path_factory.mktemp("trl"))
