import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.rl.generate import generate
from jaxpost.rl.sampling import sample
from tests.conftest import make_model

PROMPTS = [np.arange(3, 3 + length) for length in (5, 2, 9)]


def test_greedy_equals_a_forward_pass_per_token():
    model = make_model()
    completions = generate(model, PROMPTS, max_new_tokens=6, eos_ids=[], temperature=0.0, batch_size=2)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        tokens = list(prompt)
        for token, logp in zip(completion.tokens, completion.logps, strict=True):
            scores = np.asarray(jax.nn.log_softmax(model(jnp.asarray([tokens]))[0, -1]))
            assert token == scores.argmax()
            assert logp == pytest.approx(scores[token], abs=1e-5)
            tokens.append(token)


def test_end_token_ends_and_is_kept():
    model = make_model()
    free = generate(model, PROMPTS[:1], max_new_tokens=6, eos_ids=[], temperature=0.0)[0]
    cut = generate(model, PROMPTS[:1], max_new_tokens=6, eos_ids=[free.tokens[2]], temperature=0.0)[0]
    assert cut.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]
    assert cut.ended
    assert not free.ended


def test_same_seed_same_tokens():
    run = lambda seed: [c.tokens for c in generate(make_model(), PROMPTS, max_new_tokens=8, eos_ids=[], seed=seed)]  # noqa: E731
    assert run(1) == run(1) != run(2)


def test_sampling_follows_the_softmax():
    logits = jnp.asarray([[0.0, 1.0, 2.0, -1.0]])
    draws = 4000
    tokens, logps = sample(jnp.repeat(logits, draws, axis=0), jax.random.key(0), 0.5)
    expected = np.asarray(jax.nn.softmax(logits[0] / 0.5))
    observed = np.bincount(np.asarray(tokens), minlength=4)
    # Chi-square with 3 degrees of freedom: 16.3 is its 99.9 % point.
    assert np.sum((observed - draws * expected) ** 2 / (draws * expected)) < 16.3
    np.testing.assert_allclose(np.exp(logps), expected[np.asarray(tokens)], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"prompts": [np.array([], int)]}, "prompt 0 is empty"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 4, "eos_ids": [1], **changes}
    with pytest.raises(ConfigError, match=message):
        generate(make_model(), **arguments)
