"""The losses of a pair of completions that are compared with a reference, as functions of log-probabilities.

With a = log pi(y_w)/ref(y_w), r = log pi(y_l)/ref(y_l), s an f-divergence's score of either, D = s_w - s_l, S the
logistic function and e the label smoothing:

    sigmoid       -log S(bD)                            Rafailov et al., 2023, arXiv:2305.18290, equation 7; with e, the
                                                        conservative DPO of Mitchell, 2023, is `robust` or `exo_pair`
    hinge         max(0, 1 - bD)                        Zhao et al., 2023, SLiC-HF, arXiv:2305.10425
    ipo           (s_w/|w| - s_l/|l| - 1/2b)^2          Azar et al., 2023, arXiv:2310.12036, equation 17, by token
    exo_pair      KL of S(+-bD) from (1 - e, e)         Ji et al., 2024, arXiv:2402.00856, equation 16
    nca_pair      -log S(ba) - log S(-ba)/2 - log S(-br)/2      Chen et al., 2024, arXiv:2402.05369
    robust        [-(1-e) log S(bD) + e log S(-bD)]/(1-2e)      Chowdhury et al., 2024, arXiv:2403.00409, equation 9
    bco_pair      -log S(ba) - log S(-br)               Jung et al., 2024, arXiv:2404.04656, without its shift
    sppo_hard     (a - 1/2b)^2 + (r + 1/2b)^2           Wu et al., 2024, arXiv:2405.00675, equation 4.7
    apo_zero      1 - S(ba) + S(br)                     D'Oosterlinck et al., 2024, arXiv:2408.06266, equation 7
    apo_down      S(ba) + 1 - S(b(a - r))               the same, equation 8
    discopop      -log S(l)(1 - w) + exp(-l) w, l = bD, w = S(l/t)      Lu et al., 2024, arXiv:2406.08414, equation 5
    sigmoid_norm  -log S(b(s_w/|w| - s_l/|l|))          Lambert et al., 2024, Tulu 3, arXiv:2411.15124, section 5.1.2
    aot           e-smoothed logistic loss of the differences of sorted values; Melnyk et al., 2024, arXiv:2406.05882

f-divergences, as f'(exp x), which is 0 at x = 0, are those of Wang et al., 2023, "Beyond Reverse KL", arXiv:2309.16240.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Bool, Float

MAX_EXPONENT = 80.0  # whose exponential float32 still holds


class PairLogps(NamedTuple):
    """Log-probabilities of completions, nats, and the numbers of their tokens; all [*pairs]."""

    chosen: Float[Array, "*pairs"]
    rejected: Float[Array, "*pairs"]
    ref_chosen: Float[Array, "*pairs"]
    ref_rejected: Float[Array, "*pairs"]
    chosen_length: Float[Array, "*pairs"]
    rejected_length: Float[Array, "*pairs"]


class Terms(NamedTuple):
    """What the losses are written in: log-ratios, their scores, the scores by token, and the hyperparameters."""

    chosen: Float[Array, "*pairs"]
    rejected: Float[Array, "*pairs"]
    delta: Float[Array, "*pairs"]
    delta_by_token: Float[Array, "*pairs"]
    beta: float
    smoothing: float
    tau: float


def smoothed_logistic(x: Float[Array, "*pairs"], share: float) -> Float[Array, "*pairs"]:
    """-log S(x) where a share of the pairs are taken to be the wrong way round; Mitchell, 2023, conservative DPO."""
    return -(1 - share) * log_sigmoid(x) - share * log_sigmoid(-x)


def _alpha_score(x: Array, alpha: float) -> Array:
    if alpha == 1:
        return x
    return (jnp.exp(jnp.minimum((alpha - 1) * x, MAX_EXPONENT)) - 1) / (alpha - 1)


F_DIVERGENCES: dict[str, Callable[[Array, float], Array]] = {
    "reverse_kl": lambda x, alpha: x,
    "forward_kl": lambda x, alpha: 1 - jnp.exp(jnp.minimum(-x, MAX_EXPONENT)),
    "js_divergence": lambda x, alpha: math.log(2) + log_sigmoid(x),
    "alpha_divergence": _alpha_score,
}


def _exo(terms: Terms) -> Array:
    x, share = terms.beta * terms.delta, terms.smoothing
    right = sigmoid(x) * (log_sigmoid(x) - jnp.log1p(-share))
    return right + sigmoid(-x) * (log_sigmoid(-x) - jnp.log(share))


def _nca(terms: Terms) -> Array:
    chosen, rejected = terms.beta * terms.chosen, terms.beta * terms.rejected
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def _robust(terms: Terms) -> Array:
    x, share = terms.beta * terms.delta, terms.smoothing
    return (-(1 - share) * log_sigmoid(x) + share * log_sigmoid(-x)) / (1 - 2 * share)


def _sppo(terms: Terms) -> Array:
    half = 0.5 / terms.beta
    return (terms.chosen - half) ** 2 + (terms.rejected + half) ** 2


def _apo_down(terms: Terms) -> Array:
    return sigmoid(terms.beta * terms.chosen) + sigmoid(-terms.beta * (terms.chosen - terms.rejected))


def _discopop(terms: Terms) -> Array:
    x = terms.beta * terms.delta
    share = sigmoid(x / terms.tau)
    # exp(-x) is only looked at where share is not 0, where it does not overflow.
    return -log_sigmoid(x) * (1 - share) + jnp.exp(jnp.minimum(-x, MAX_EXPONENT)) * share


PAIR_LOSSES: dict[str, Callable[[Terms], Array]] = {
    "sigmoid": lambda terms: -log_sigmoid(terms.beta * terms.delta),
    "hinge": lambda terms: jax.nn.relu(1 - terms.beta * terms.delta),
    "ipo": lambda terms: (terms.delta_by_token - 0.5 / terms.beta) ** 2,
    "exo_pair": _exo,
    "nca_pair": _nca,
    "robust": _robust,
    "bco_pair": lambda terms: -log_sigmoid(terms.beta * terms.chosen) - log_sigmoid(-terms.beta * terms.rejected),
    "sppo_hard": _sppo,
    "apo_zero": lambda terms: sigmoid(-terms.beta * terms.chosen) + sigmoid(terms.beta * terms.rejected),
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": lambda terms: -log_sigmoid(terms.beta * terms.delta_by_token),
}


def pair_loss(
    loss_type: str,
    pair: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Float[Array, "*pairs"]:
    """One of PAIR_LOSSES of each pair.

    Args:
        loss_type: its name.
        pair: sums over the completions.
        beta: above 0.
        label_smoothing: from 0 to below 1/2; above 0 for `exo_pair`; of those here only it and `robust` look at it.
        discopop_tau: above 0.
        f_divergence_type: one of F_DIVERGENCES.
        f_alpha_divergence_coef: of `alpha_divergence`.
    """
    chosen, rejected = pair.chosen - pair.ref_chosen, pair.rejected - pair.ref_rejected
    score = F_DIVERGENCES[f_divergence_type]
    of_chosen, of_rejected = (score(x, f_alpha_divergence_coef) for x in (chosen, rejected))
    by_token = of_chosen / jnp.maximum(pair.chosen_length, 1) - of_rejected / jnp.maximum(pair.rejected_length, 1)
    terms = Terms(chosen, rejected, of_chosen - of_rejected, by_token, beta, label_smoothing, discopop_tau)
    return PAIR_LOSSES[loss_type](terms)


def sorted_partners(
    values: Float[Array, "*pairs"], others: Float[Array, "*pairs"], mask: Bool[Array, "*pairs"]
) -> Float[Array, "*pairs"]:
    """For each of `values` that of `others` with the same rank; 0 where `mask` is False, which counts in neither.

    A step takes the gradient of a part of a batch at a time, so what a value is compared with is found beforehand.
    """
    flat, last = mask.reshape(-1), jnp.inf
    order = jnp.argsort(jnp.where(flat, values.reshape(-1), last))
    partners = jnp.sort(jnp.where(flat, others.reshape(-1), last))
    found = jnp.zeros_like(partners).at[order].set(partners)
    return jnp.where(mask, found.reshape(mask.shape), 0.0)


def aot_loss(
    values: Float[Array, "*pairs"], partners: Float[Array, "*pairs"], *, beta: float, label_smoothing: float
) -> Float[Array, "*pairs"]:
    """The smoothed logistic loss of values less their partners."""
    return smoothed_logistic(beta * (values - partners), label_smoothing)


def aot_unpaired_loss(
    chosen: Float[Array, "*pairs"],
    rejected: Float[Array, "*pairs"],
    partners_of_chosen: Float[Array, "*pairs"],
    partners_of_rejected: Float[Array, "*pairs"],
    **options: Any,
) -> Float[Array, "*pairs"]:
    """The same of log-ratios of the chosen against those of the rejected, both of which learn.

    Over a batch each difference would be counted twice, once with the gradient of either side: the value is that of the
    chosen side alone.
    """
    of_chosen = aot_loss(chosen, partners_of_chosen, **options)
    of_rejected = aot_loss(partners_of_rejected, rejected, **options)
    return of_chosen + of_rejected - lax.stop_gradient(of_rejected)


def ld_weights(
    index: Float[Array, "*tokens"], shared_length: Float[Array, "*tokens"], alpha: float
) -> Float[Array, "*tokens"]:
    """What each token of a completion counts: 1, and alpha beyond the length of the pair's shorter completion.

    Liu et al., 2024, "Length Desensitization in Direct Preference Optimization", arXiv:2409.06411, equation 9.

    Args:
        index: number of the token in its completion, from 0.
        shared_length: tokens of the shorter completion.
        alpha: from 0 to 1.
    """
    return jnp.where(index < shared_length, 1.0, alpha)
