"""Which platform the program at hand is for: that of the mesh in use, which may be of chips that are not here."""

import jax


def platform() -> str:
    """`cpu`, `tpu` or `cuda`: of the mesh that is set (jax.set_mesh), or else JAX's own choice."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "cuda" if name == "gpu" else name
