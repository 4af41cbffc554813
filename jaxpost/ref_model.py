"""The model that a policy is compared with: loaded, or made of what the policy starts from."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxpost.errors import ConfigError
from jaxpost.models.actor_critic import policy_of
from jaxpost.models.adapters import active_config, keep_reference, reference_view
from jaxpost.models.hf import place
from jaxpost.models.pretrained import named, open_source
from jaxpost.models.transformer import Decoder
from jaxpost.train.reference import Reference


def load_reference(
    policy: Decoder,
    reference: str | os.PathLike[str] | Decoder | None,
    args: Any,
    mesh: Mesh,
    *,
    goes_on: bool = False,
) -> Reference:
    """The model that a policy is compared with.

    An adapter is compared with its base on the same arrays, or, where a run goes on from it, with what it is now; a
    model that is trained as a whole with a copy of itself.

    Args:
        policy: loaded.
        reference: a model of its own, or its name; None for what the policy starts from.
        args: the run's config.
        mesh: where its weights go.
        goes_on: whether an adapter is trained on.

    Raises:
        ConfigError: it cannot be loaded, has another vocabulary, or could not follow the policy as it should.
    """
    has_adapter = active_config(policy) is not None
    if args.sync_ref_model and (has_adapter or reference is not None):
        raise ConfigError("sync_ref_model moves a copy of the policy; it needs neither an adapter nor a ref_model")
    if reference is None and has_adapter:
        if goes_on:
            keep_reference(policy)
        return Reference(lambda model, _: reference_view(policy_of(model)))
    if reference is None and args.precompute_ref_log_probs:
        return Reference(lambda model, _: model)  # it is asked before the policy has moved
    if reference is None:
        graphdef, state = nnx.split(policy)
        arrays = jax.tree.map(jnp.copy, nnx.to_pure_dict(state))
    else:
        if not isinstance(reference, Decoder):
            options = {"dtype": args.dtype, "compute": args.compute(), "mesh": mesh}
            reference = open_source(named(reference, "ref_model")).load(
                allow_nonfinite=args.allow_nonfinite_weights, **options
            )
        else:
            place(reference, args.compute(), mesh)
        sizes = reference.config.vocab_size, policy.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ConfigError(f"the reference has {sizes[0]} embedding rows, the policy {sizes[1]}; they must agree")
        graphdef, state = nnx.split(reference)
        arrays = nnx.to_pure_dict(state)
    return Reference(lambda _, own: nnx.merge(graphdef, own), arrays)
