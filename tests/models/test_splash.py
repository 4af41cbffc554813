"""The kernel for TPUs, its steps run one by one, against scores written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.models.attention import RESIDUALS, attention
from jaxpost.models.splash import splash
from jaxpost.sharding import make_mesh
from tests.models.test_attention import inputs, written_out


@pytest.mark.parametrize(("softcap", "mesh"), [(None, None), (0.7, None), (None, "fsdp=2,tensor=2,data=2")])
def test_equals_scores_written_out(softcap, mesh):
    length, heads, kv_heads, dim = 256, 4, 2, 64
    arrays, places = inputs(length, 3, rows=4, heads=heads, kv_heads=kv_heads, dim=dim)
    real = (places.segments > 0)[..., None, None]
    weight = jnp.cos(jnp.arange(arrays[0].size)).reshape(arrays[0].shape)

    def ours(query, key, value):
        grouped = query.reshape(4, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4) * 0.3
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        out = splash(softcap, grouped, key, value, places.segments, residuals=RESIDUALS, interpret=True)
        return out.transpose(0, 3, 1, 2, 4).reshape(query.shape)

    def gradients(kernel):
        def total(arrays):
            out = jnp.where(real, kernel(*arrays), 0.0)
            return jnp.sum(out * weight), out

        return jax.jit(jax.grad(total, has_aux=True))(arrays)

    with jax.set_mesh(make_mesh(mesh, jax.devices() if mesh else jax.devices()[:1])):
        mine, out = gradients(ours)
    expected, expected_out = gradients(lambda *x: written_out(*x, places, 0.3, softcap=softcap))
    np.testing.assert_allclose(out, expected_out, atol=1e-5)
    for a, b in zip(mine, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(("kernel", "platform"), [("splash", "tpu"), ("flash", "cuda")])
def test_kernels_of_other_platforms_are_named(kernel, platform):
    arrays, places = inputs(8, 1)
    with pytest.raises(ConfigError, match=f"{kernel} is for {platform}, and this is a cpu"):
        attention(*arrays, places, scale=1.0, kernel=kernel)
