import pytest

from tests.faults.rig import Rig, outcome


@pytest.fixture(scope="session")
def rig(tiny_folder, tmp_path_factory):
    return Rig(tiny_folder, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def whole(rig):
    """What the uninterrupted run of each method has come to."""
    known = {}

    def of(method):
        if method not in known:
            assert rig.run(method, rig.home / f"whole_{method}") == 0
            known[method] = outcome(rig.home / f"whole_{method}")
        return known[method]

    return of


@pytest.fixture(scope="session")
def is_long(pytestconfig):
    """Whether as much of everything is done as the README states."""
    return pytestconfig.getoption("--long")


@pytest.fixture(scope="session")
def counts(is_long):
    """(in the test command, in the long tier) -> how often."""
    return lambda short, long: long if is_long else short


@pytest.fixture
def for_long(is_long):
    if not is_long:
        pytest.skip("of the long tier")
