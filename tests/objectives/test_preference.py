"""What a preference method computes depends on the pairs alone: not on rows, micro-batches or padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpost.data.completions import encode_judged, encode_pairs
from jaxpost.data.examples import LengthConfig, flattened
from jaxpost.data.loader import Loader
from jaxpost.data.packing import units
from jaxpost.data.store import stored
from jaxpost.errors import ConfigError
from jaxpost.metrics import Contrast, Least, Mean, Tally, over_parts
from jaxpost.objectives.bco import BCO
from jaxpost.objectives.cpo import CPO
from jaxpost.objectives.dpo import DPO
from jaxpost.objectives.dpo_losses import PAIR_LOSSES
from jaxpost.objectives.kto import KTO
from jaxpost.objectives.orpo import ORPO
from jaxpost.objectives.reward import Reward
from jaxpost.train.step import InParts, split_batch
from tests.conftest import make_model, make_noisy_model, make_tokenizer

PAIRS = [
    {
        "prompt": "q" * (1 + i % 3),
        "chosen": "yes" * (1 + i % 4),
        "rejected": "no, " * (1 + (3 * i) % 5),
        "margin": i / 4,
    }
    for i in range(12)
]
OBJECTIVES = {
    "pair losses": DPO(loss_type=[*PAIR_LOSSES], label_smoothing=0.1),
    "sorted": DPO(loss_type=["aot", "aot_unpaired", "sft"], loss_weights=[0.8, 0.2, 1.0], label_smoothing=0.1),
    "ld": DPO(ld_alpha=0.3, reference_free=True),
    "wpo": DPO(use_weighting=True),
    "cpo": CPO(),
    "simpo": CPO(loss_type="simpo", cpo_alpha=0.0, alpha=0.2),
    "orpo": ORPO(),
    "kto": KTO(),
    "apo": KTO(loss_type="apo_zero_unpaired"),
    "bco": BCO(),
    "reward": Reward(center_rewards_coefficient=0.1),
}
JUDGING = (KTO, BCO)
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def noisy(seed, head="lm"):
    return make_noisy_model(seed, head=head, num_hidden_layers=1)


def batch_of(name, num_rows, order=None, multiple=8, **facts):
    """The batch of all pairs in so many rows, or that of the completions one by one."""
    rows = [PAIRS[i] for i in order] if order is not None else PAIRS
    is_judged = isinstance(OBJECTIVES[name], JUDGING)
    encode, size, fact = (encode_judged, 1, "label") if is_judged else (encode_pairs, 2, "margin")
    store = stored(flattened(encode(rows, make_tokenizer(), LengthConfig(), vocab_size=320)))
    loader = Loader(
        units(store, size, {fact: store.values, **facts}),
        global_batch_size=len(rows) * (2 if is_judged else 1),
        num_rows=num_rows,
        num_steps=1,
        pad_id=0,
        seed=0,
        sampling="sequential",
        num_lengths=1,
        multiple=multiple,
        mismatch=64 if is_judged and OBJECTIVES[name].needs_mismatches else None,
    )
    return jax.tree.map(jnp.asarray, loader.batch(0))


def computed(name, batch, num_parts=1):
    """Loss, metrics and gradient, in so many micro-batches."""
    objective, head = OBJECTIVES[name], "reward" if name == "reward" else "lm"
    reference = InParts(noisy(1), num_parts) if objective.needs_reference else None
    graphdef, state = nnx.split(noisy(2, head))
    batch = batch | {column: jnp.full(len(batch["tokens"]), 3.0) for column in objective.remembers}

    @jax.jit
    def run(state, batch):
        annotated = objective.annotate(InParts(nnx.merge(graphdef, state), num_parts), reference, batch)

        def total(state, micro):
            loss, metrics = objective.loss(nnx.merge(graphdef, state), micro)
            return loss.total, {"loss": loss, **metrics}

        gradients, stacked = jax.lax.map(
            lambda micro: jax.grad(total, has_aux=True)(state, micro), split_batch(annotated, num_parts)
        )
        return over_parts(stacked), jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), gradients)

    metrics, gradient = run(state, batch)
    values = {
        key: metric.value() if isinstance(metric, Mean | Contrast) else metric[0] for key, metric in metrics.items()
    }
    return values, jax.tree.map(lambda g: g / metrics["loss"].count, gradient)


def assert_same(one, other):
    (metrics, gradient), (expected, expected_gradient) = one, other
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        # KTO's kl is a difference of two sums over tokens, and as exact as they are.
        size = max(1, abs(expected["logps/chosen"])) if name == "kl" else 1
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, atol=1e-6 * size, err_msg=name)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected_gradient))
    for leaf, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=1e-6 * max(largest, 1))


@every_objective
def test_rows_and_micro_batches_change_nothing(name):
    # Half of the first batch's rows hold nothing.
    expected = computed(name, batch_of(name, 48 if isinstance(OBJECTIVES[name], JUDGING) else 24))
    assert all(np.isfinite(value) for value in expected[0].values())
    # Which completions are mismatched goes by the numbers of the rows, not by the batch.
    order = None if name == "kto" else np.random.default_rng(3).permutation(12)
    assert_same(computed(name, batch_of(name, 4, order), num_parts=4), expected)


def test_weights_of_examples_change_the_loss_alone_whatever_the_rows():
    weight = np.random.default_rng(5).uniform(0.5, 3, 24).astype(np.float32)
    plain, ones = computed("bco", batch_of("bco", 24)), np.ones(24, np.float32)
    assert_same(computed("bco", batch_of("bco", 24, weight=ones)), plain)
    expected = computed("bco", batch_of("bco", 24, weight=weight))
    assert_same(computed("bco", batch_of("bco", 4, weight=weight), num_parts=4), expected)
    assert {name for name in plain[0] if not np.isclose(plain[0][name], expected[0][name])} == {"loss"}


def test_mismatches_do_not_depend_on_the_order_in_a_batch():
    one, other = batch_of("kto", 24), batch_of("kto", 3)
    for batch in (one, other):
        segments = np.asarray(batch["mismatched_segments"])
        assert sum(len(set(row)) - (0 in row) for row in segments.tolist()) == 24

    def texts(batch):
        pairs = zip(np.asarray(batch["mismatched_tokens"]), np.asarray(batch["mismatched_segments"]), strict=True)
        return sorted(tuple(tokens[segments == s]) for tokens, segments in pairs for s in range(1, segments.max() + 1))

    assert texts(one) == texts(other)


def test_extremes_are_those_of_all_parts():
    stacked = {"low": Least(jnp.asarray([3.0, 1.0])), "mean": Mean(jnp.asarray([1.0, 2.0]), jnp.asarray([1.0, 1.0]))}
    reduced = over_parts(stacked)
    assert reduced["low"] == Least(jnp.asarray(1.0)) and reduced["mean"].value() == 1.5


def test_a_difference_of_means_is_that_of_all_batches():
    """Also where each batch has values of one side only."""
    tally, sums = Tally(), [(6.0, 2.0, 0.0, 0.0), (0.0, 0.0, 3.0, 3.0), (2.0, 2.0, 0.0, 0.0)]
    for values in sums[:1]:
        tally.add({"margin": Contrast(*map(jnp.asarray, values))})
    assert tally.values() == {"margin": 0.0}
    for values in sums[1:]:
        tally.add({"margin": Contrast(*map(jnp.asarray, values))})
    assert tally.values() == {"margin": 1.0}
    stacked = Contrast(*map(jnp.asarray, zip(*sums, strict=True)))
    assert over_parts({"margin": stacked})["margin"].value() == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(loss_type=["sigmod"]), "did you mean 'sigmoid'"),
        (lambda: DPO(loss_type=[]), "loss_type is empty"),
        (lambda: DPO(loss_type=["sigmoid"], loss_weights=[1.0, 2.0]), "2 numbers for 1"),
        (lambda: DPO(beta=0.0), "beta is 0.0"),
        (lambda: DPO(label_smoothing=0.5), "label_smoothing is 0.5"),
        (lambda: DPO(loss_type=["exo_pair"]), "exo_pair needs --label_smoothing"),
        (lambda: DPO(discopop_tau=0.0), "discopop_tau"),
        (lambda: DPO(ld_alpha=1.5), "ld_alpha is 1.5"),
        (lambda: DPO(f_divergence_type="kl"), "f_divergence_type is 'kl'"),
        (lambda: DPO(loss_type=["aot"], use_weighting=True), "use_weighting"),
        (lambda: CPO(loss_type="dpo"), "loss_type is 'dpo'"),
        (lambda: CPO(beta=-1.0), "beta is -1.0"),
        (lambda: CPO(loss_type="hinge", label_smoothing=0.1), "does nothing"),
        (lambda: CPO(cpo_alpha=-1.0), "cpo_alpha"),
        (lambda: ORPO(beta=-0.1), "beta is -0.1"),
        (lambda: KTO(beta=0.0), "beta is 0.0"),
        (lambda: KTO(desirable_weight=0.0), "desirable_weight"),
        (lambda: KTO(loss_type="bco"), "loss_type is 'bco'"),
        (lambda: BCO(beta=0.0), "beta is 0.0"),
        (lambda: Reward(center_rewards_coefficient=-1.0), "must not be negative"),
    ],
)
def test_mistakes_name_the_field(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_models_are_what_objectives_take():
    from jaxpost.objectives.base import Model, Objective

    assert isinstance(make_model(), Model)
    assert all(isinstance(objective, Objective) for objective in OBJECTIVES.values())
