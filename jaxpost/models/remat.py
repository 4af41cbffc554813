"""What the backward pass finds kept of a block, and what it computes again (Chen et al., 2016, arXiv:1604.06174)."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxpost.models.attention import RESIDUALS
from jaxpost.models.product import RESULT

INPUT = "block_input"  # checkpoint name of what a block is given

_policies = jax.checkpoint_policies
# By name, from most memory to least; `full` and `offload` keep the inputs of blocks only.
POLICIES: dict[str, Any] = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(RESIDUALS, RESULT)
    ),
    "attention": _policies.save_only_these_names(RESIDUALS),
    "full": None,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
REMAT = ("none", *POLICIES)


def rematerialised(body: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The body of a scan over blocks, of which the backward pass keeps what `name` says.

    Args:
        body: computes a block.
        name: `none` keeps all; `dots` the results of matrix products and attention; `attention` that of attention;
            `full` the block's input; `offload` likewise, in the host's memory.
    """
    return body if name == "none" else jax.checkpoint(body, prevent_cse=False, policy=POLICIES[name])


def named_input(h: Array) -> Array:
    """The input of a block, by the name that `offload` knows it by."""
    return checkpoint_name(h, INPUT)
