"""Frequencies of drawn tokens against the exact distribution, for every filter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.rl.sampling import Sampling, SamplingConfig, likely, sample

DRAWS = 40_000
VOCABULARY = 700  # several chunks
KNOBS = [
    {},
    {"temperature": 0.5},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"repetition_penalty": 1.5},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
]


def logits_and_seen():
    rng = np.random.default_rng(0)
    return rng.normal(0, 2, VOCABULARY).astype(np.float32), rng.random(VOCABULARY) < 0.3


def exact(logits, seen, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """The distribution by sorting, in float64; filters in the order of transformers."""
    x = logits.astype(np.float64)
    x = np.where(seen, np.where(x > 0, x / repetition_penalty, x * repetition_penalty), x) / temperature
    if top_k:
        x[np.argsort(-x)[top_k:]] = -np.inf
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    order = np.argsort(-p)
    p[order[np.cumsum(p[order]) - p[order] >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def chi_square_limit(freedom):
    """The 99.9 % point, by Wilson and Hilferty."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_frequencies_and_log_probabilities_are_those_of_the_distribution(knobs):
    logits, seen = logits_and_seen()
    expected = exact(logits, seen, **knobs)
    uniform = jax.random.uniform(jax.random.key(1), (DRAWS,))
    rows = [jnp.broadcast_to(x, (DRAWS, VOCABULARY)) for x in (logits, seen)]
    tokens, logps = jax.jit(sample)(rows[0], uniform, rows[1], Sampling(**knobs))
    observed = np.bincount(np.asarray(tokens), minlength=VOCABULARY)
    assert not np.any(observed[expected == 0])
    np.testing.assert_allclose(logps, np.log(expected[np.asarray(tokens)]), atol=2e-5)
    common = expected * DRAWS >= 5
    groups = np.append(observed[common], observed[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * DRAWS
    groups, wanted = groups[wanted > 0], wanted[wanted > 0]
    assert np.sum((groups - wanted) ** 2 / wanted) < chi_square_limit(len(wanted) - 1)


def test_no_knob_compiles_anew():
    compiled = jax.jit(lambda *arguments: sample(*arguments))
    arrays = jnp.zeros((2, 9)), jnp.full(2, 0.5), jnp.zeros((2, 9), bool)
    for knobs in KNOBS:
        compiled(*arrays, jax.tree.map(jnp.float32, Sampling(**knobs)))
    assert compiled._cache_size() == 1


def test_greedy_takes_the_greatest_and_scores_it_at_temperature_1():
    logits, seen = logits_and_seen()
    tokens, logps = sample(jnp.asarray(logits)[None], jnp.array([0.9]), jnp.asarray(seen)[None], Sampling(0.0))
    assert int(tokens[0]) == logits.argmax()
    assert float(logps[0]) == pytest.approx(np.log(exact(logits, seen).max()), abs=1e-5)


def test_a_token_of_no_weight_is_never_drawn():
    logits = jnp.where(jnp.arange(600) % 7 == 3, 0.0, -jnp.inf)
    uniform = jnp.concatenate([jnp.linspace(0, 1, 2001)[:-1], jnp.array([0.99999994])])
    tokens, logps = sample(jnp.broadcast_to(logits, (len(uniform), 600)), uniform, None, Sampling())
    assert set(np.asarray(tokens) % 7) == {3}
    np.testing.assert_allclose(logps, -np.log(86), rtol=1e-5)


def test_filters_keep_at_least_the_most_probable_token():
    kept = likely(jnp.asarray([[0.0, 3.0, 1.0]]), None, Sampling(top_p=1e-6, min_p=1.0))
    assert np.isfinite(kept).tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_bad_knobs_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**changes)
