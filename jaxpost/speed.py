"""What a run could come to: the work of a token, and the peak of the devices."""

from jax.sharding import Mesh

from jaxpost.chips import peak_flops
from jaxpost.models.config import ModelConfig
from jaxpost.models.flops import train_flops
from jaxpost.train.meter import Work


def work_of(config: ModelConfig, mesh: Mesh, *, is_frozen: bool) -> Work:
    """Work of the policy alone, without attention between tokens, whose share depends on the length of texts.

    Args:
        config: of the policy.
        mesh: all devices of the run.
        is_frozen: adapters are trained, which leaves weights without a gradient.
    """
    return Work(mesh.size, train_flops(config, 1, 0, is_frozen=is_frozen), peak_flops(mesh.devices.flat))
