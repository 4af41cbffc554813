"""Which tensors of a stack are finite, wherever it lies."""

import jax
import numpy as np
import pytest

from jaxpost.models.check import finite_tensors
from jaxpost.sharding import make_mesh, shardings

SHAPE = (2, 8, 64, 128)  # layers and experts


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=2,expert=4", "expert=2,fsdp=2,tensor=2", "data=2,expert=4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_each_expert_is_judged_by_itself(mesh, bad):
    kernel, expected = np.ones(SHAPE, np.float32), np.ones(SHAPE[:2])
    for at in [(0, 5, 1, 1), (1, 6, 63, 127)]:
        kernel[at], expected[at[:2]] = bad, 0
    mesh = make_mesh(mesh)
    sharding = shardings({"experts.up.kernel": kernel}, mesh)["experts.up.kernel"]
    found = finite_tensors((jax.device_put(kernel, sharding),), ((2, sharding.spec),), mesh)
    np.testing.assert_array_equal(found[0], expected)
