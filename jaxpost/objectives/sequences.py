"""From tokens to examples: a row of a batch holds several, one after the other, told apart by `segments`.

What a batch tells of its examples is [B, S]: column s is the example of segment s + 1, and `examples` is 1 where there
is one. The two of a pair follow each other, chosen first.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

from jaxpost.objectives.base import Batch, Model
from jaxpost.objectives.logps import score_batch


def membership(segments: Int[Array, "B T"], count: int) -> Bool[Array, "B T S"]:
    """Which tokens belong to which of `count` examples."""
    return segments[:, :, None] == jnp.arange(1, count + 1)


def num_tokens(batch: Batch) -> Int[Array, ""]:
    """Tokens of all examples, where one that branches off a prompt has its prompt too."""
    segments, index = batch["segments"], jnp.arange(batch["segments"].shape[1])
    first = (segments != jnp.roll(segments, 1, axis=1)) | (index == 0)
    return jnp.sum(segments > 0) + jnp.sum(jnp.where(first & (segments > 0), batch["positions"], 0))


def per_example(values: Float[Array, "B T"], batch: Batch) -> Float[Array, "B S"]:
    """Sums over the tokens of each example."""
    members = membership(batch["segments"], batch["examples"].shape[1])
    return jnp.sum(jnp.where(members, values[:, :, None], 0.0), axis=1)


def mean_per_example(values: Float[Array, "B T"], mask: Bool[Array, "B T"], batch: Batch) -> Float[Array, "B S"]:
    """Means over the tokens of each example where `mask` is True; 0 where there are none."""
    counts = jnp.maximum(per_example(mask.astype(jnp.float32), batch), 1)
    return per_example(jnp.where(mask, values, 0.0), batch) / counts


def per_token(values: Float[Array, "B S"], batch: Batch) -> Float[Array, "B T"]:
    """Each example's value at each of its tokens; 0 in the padding."""
    members = membership(batch["segments"], values.shape[1])
    return jnp.sum(jnp.where(members, values[:, None, :], 0.0), axis=2)


def exists(batch: Batch) -> Bool[Array, "B S"]:
    """Where there is an example."""
    return batch["examples"] > 0


def pairs_of(values: Shaped[Array, "B S"]) -> tuple[Shaped[Array, "B P"], Shaped[Array, "B P"]]:
    """What is said of chosen and of rejected examples."""
    return values[:, 0::2], values[:, 1::2]


def mean_hidden(model: Model, batch: Batch) -> Float[Array, "B S D"]:
    """Final hidden states of each example, their mean over all of its tokens, float32."""
    h, _ = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
    members = membership(batch["segments"], batch["examples"].shape[1]).astype(jnp.float32)
    totals = jnp.einsum("bts,btd->bsd", members, h.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return totals / jnp.maximum(jnp.sum(members, axis=1), 1)[:, :, None]


def rewards_of(model: Model, batch: Batch) -> tuple[Float[Array, "B S"], Float[Array, ""]]:
    """What a reward model gives each example, at its last token; and the load-balancing loss of its routers."""
    h, balance = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
    members = membership(batch["segments"], batch["examples"].shape[1])
    places = jnp.arange(h.shape[1])[None, :, None]
    last = jnp.max(jnp.where(members, places, 0), axis=1)
    return model.score(jnp.take_along_axis(h, last[:, :, None], axis=1)), balance


def sequence_logps(model: Model, batch: Batch) -> Float[Array, "B S"]:
    """Log-probability of each example's trained tokens; no gradient is kept."""
    return lax.stop_gradient(per_example(score_batch(model, batch)[0].logps, batch))


def token_share(mask: Bool[Array, "B T"], batch: Batch) -> Float[Array, "B P"]:
    """What a sum over a pair's tokens is multiplied with for the mean of the tokens to stand among means of pairs.

    `mask` are all the tokens of the mean, in the whole batch of an optimizer step.
    """
    present = pairs_of(batch["examples"])[0]
    share = jnp.sum(present) / jnp.maximum(jnp.sum(mask), 1)
    return jnp.broadcast_to(share, present.shape)
