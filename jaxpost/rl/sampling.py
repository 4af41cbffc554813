"""Choosing the next token: greedy, or from the softmax at a temperature."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def sample(
    logits: Float[Array, "B V"], key: Array, temperature: Float[Array, ""] | float
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draw one token a row.

    Args:
        logits: float32.
        key: PRNG key of this step; every row draws its own noise.
        temperature: 0 takes the most probable token. Traced: changing it does not recompile.

    Returns:
        Token ids, and their log-probabilities (nats) under the distribution they were drawn from; greedy tokens are
        scored at temperature 1.
    """
    greedy = temperature <= 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    tokens = jnp.argmax(jnp.where(greedy, logits, scaled + noise), axis=-1)
    logps = jax.nn.log_softmax(scaled, axis=-1)
    return tokens.astype(jnp.int32), jnp.take_along_axis(logps, tokens[:, None], axis=-1)[:, 0]
