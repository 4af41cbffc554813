"""Parameters of tests that say little that the others do not, and take long."""

import pytest


def slow(*values):
    """A set of parameters that is run by hand, with `-m slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)
