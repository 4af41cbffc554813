"""Every preference loss and every option in float64 against TRL's own code, on random log-probabilities.

TRL's loss is the trainer's method, run on a stand-in for the trainer and a model that returns given log-probabilities.
"""

from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.objectives.cpo_losses import CPO_LOSSES, alpha_reward, cpo_loss
from jaxpost.objectives.dpo_losses import (
    F_DIVERGENCES,
    PAIR_LOSSES,
    PairLogps,
    aot_loss,
    aot_unpaired_loss,
    ld_weights,
    pair_loss,
    sorted_partners,
)
from jaxpost.objectives.kto_losses import apo_zero_unpaired, kl_estimate, kto_loss
from jaxpost.objectives.orpo_losses import log_odds_ratio
from jaxpost.objectives.reward_losses import bradley_terry, centring

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = pytest.mark.parity

VALUE, GRADIENT = 1e-6, 1e-5
PAIRS, TOKENS = 7, 12


@contextmanager
def float64():
    with jax.enable_x64(True):
        yield


def assert_equal(ours, theirs, scale=1.0):
    """Value and gradient of ours (a function of arrays) and of theirs (of tensors), each (function, leaves)."""
    function, leaves = ours
    with float64():
        arrays = [jnp.asarray(leaf, jnp.float64) for leaf in leaves]
        value, gradients = jax.value_and_grad(function, tuple(range(len(arrays))))(*arrays)
        assert value.dtype == jnp.float64
    tensors = [torch.tensor(leaf, dtype=torch.float64, requires_grad=True) for leaf in leaves]
    expected = theirs(*tensors)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=VALUE * scale, atol=VALUE * scale)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=GRADIENT, atol=GRADIENT)


class Trainer(SimpleNamespace):
    """As much of a trainer as its loss looks at."""

    def __init__(self, **settings):
        def same(x):
            return x

        accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)
        plain = torch.nn.Module()
        plain.is_gradient_checkpointing = False
        super().__init__(
            model=plain,
            accelerator=accelerator,
            aux_loss_enabled=False,
            precompute_ref_logps=False,
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
            **settings,
        )


def speaking(logps, collision=None):
    """A model that gives the tokens these log-probabilities; what is only logged is 0."""
    others = dict.fromkeys(("entropy", "mean_logits", "is_top1", "log_sum_sq_probs"), torch.zeros_like(logps))
    others["is_top1"] = torch.zeros_like(logps, dtype=torch.bool)
    if collision is not None:
        others["log_sum_sq_probs"] = torch.tensor(collision)
    return lambda **_: SimpleNamespace(log_probs=logps, **others)


def random_pairs(seed=0, spread=1.0):
    """Log-probabilities of policy and reference, and which tokens count, [2 * PAIRS, TOKENS]; chosen ones first."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, TOKENS + 1, 2 * PAIRS)
    mask = np.arange(TOKENS) < lengths[:, None]
    policy = -np.abs(rng.normal(1.5, 1.0, mask.shape)) * spread
    return policy * mask, -np.abs(rng.normal(1.5, 1.0, mask.shape)) * mask, mask


DPO_DEFAULTS = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "ld_alpha": None,
    "use_weighting": False,
}


def trl_dpo(policy, reference, mask, collision, options):
    from trl import DPOTrainer

    o = SimpleNamespace(**DPO_DEFAULTS | options)
    trainer = Trainer(
        ref_model=speaking(torch.tensor(reference)),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=o.discopop_tau),
        loss_types=o.loss_type,
        loss_weights=o.loss_weights or [1.0] * len(o.loss_type),
        **{name: vars(o)[name] for name in ("beta", "label_smoothing", "ld_alpha", "use_weighting")},
        **{name: vars(o)[name] for name in ("f_divergence_type", "f_alpha_divergence_coef")},
    )
    # Position t predicts token t + 1; the first token is of the prompt.
    completion = torch.tensor(np.pad(mask, ((0, 0), (1, 0)))).long()
    inputs = {"input_ids": completion, "attention_mask": torch.ones_like(completion), "completion_mask": completion}
    return DPOTrainer._compute_loss(trainer, speaking(policy * torch.tensor(mask), collision), inputs, False)


def our_dpo(policy, reference, mask, collision, options):
    o = SimpleNamespace(**DPO_DEFAULTS | options)
    mask, reference, collision = (jnp.asarray(array, policy.dtype) for array in (mask, reference, collision))
    lengths, counted = jnp.sum(mask, axis=1), mask
    if o.ld_alpha is not None:
        shared = jnp.tile(jnp.minimum(*jnp.split(lengths, 2)), 2)
        index, shared = jnp.arange(TOKENS, dtype=policy.dtype)[None], shared[:, None]
        counted = counted * ld_weights(index + 0 * mask, shared + 0 * mask, o.ld_alpha)
    sums, ref_sums = (jnp.sum(logps * counted, axis=1) for logps in (policy, reference))
    pair = PairLogps(*jnp.split(sums, 2), *jnp.split(ref_sums, 2), *jnp.split(lengths, 2))
    weights = 1.0
    if o.use_weighting:
        aligned = jnp.sum((policy - collision) * mask, axis=1) / lengths
        weights = jnp.prod(jnp.stack(jnp.split(jax.lax.stop_gradient(jnp.exp(aligned)), 2)), axis=0)
    losses = [our_pair_loss(kind, pair, policy, mask, o) * weights for kind in o.loss_type]
    return sum(w * jnp.mean(loss) for w, loss in zip(o.loss_weights or [1.0] * len(losses), losses, strict=True))


def our_pair_loss(kind, pair, policy, mask, o):
    smoothed = {"beta": o.beta, "label_smoothing": o.label_smoothing}
    everywhere = jnp.ones(PAIRS, bool)
    chosen, rejected = pair.chosen - pair.ref_chosen, pair.rejected - pair.ref_rejected
    if kind == "sft":
        return -jnp.sum(policy[:PAIRS] * mask[:PAIRS]) / jnp.sum(mask[:PAIRS])
    if kind == "aot":
        values = pair.chosen - pair.rejected
        return aot_loss(values, sorted_partners(values, pair.ref_chosen - pair.ref_rejected, everywhere), **smoothed)
    if kind == "aot_unpaired":
        partners = sorted_partners(chosen, rejected, everywhere), sorted_partners(rejected, chosen, everywhere)
        return aot_unpaired_loss(chosen, rejected, *map(jax.lax.stop_gradient, partners), **smoothed)
    names = ("discopop_tau", "f_divergence_type", "f_alpha_divergence_coef")
    return pair_loss(kind, pair, **smoothed, **{name: vars(o)[name] for name in names})


def check_dpo(options, seed=0):
    policy, reference, mask = random_pairs(seed)
    collision = -np.abs(np.random.default_rng(seed + 9).normal(1.0, 0.3, mask.shape))
    fixed = reference, mask, collision, options
    assert_equal((lambda x: our_dpo(x, *fixed), [policy]), lambda x: trl_dpo(x, *fixed))


ALL = [*PAIR_LOSSES, "aot", "aot_unpaired", "sft"]
SCORED = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"]  # of f-divergence scores


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("kind", ALL)
def test_dpo_losses(kind, beta):
    smoothing = 0.1 if kind in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0
    check_dpo({"loss_type": [kind], "beta": beta, "label_smoothing": smoothing})


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
@pytest.mark.parametrize("kind", SCORED)
def test_dpo_losses_of_f_divergences(kind, divergence):
    check_dpo({"loss_type": [kind], "f_divergence_type": divergence, "label_smoothing": 0.1}, seed=1)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("kind", SCORED)
def test_dpo_losses_of_the_alpha_divergence(kind, alpha):
    """TRL clamps exponents by a table that has no float64: what it does there is written out, and run if it is 1."""
    options = {"loss_type": [kind], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    options |= {"label_smoothing": 0.1}
    if alpha == 1.0:
        return check_dpo(options)
    policy, reference, mask = random_pairs(2)
    fixed = reference.astype(np.float32), mask, np.zeros(mask.shape, np.float32), options
    with float64():
        value, gradient = jax.value_and_grad(lambda x: our_dpo(x, *fixed))(jnp.asarray(policy, jnp.float64))
    tensor = torch.tensor(policy, dtype=torch.float32, requires_grad=True)
    expected = trl_dpo(tensor, *fixed)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=3e-6)  # float32 there
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=GRADIENT, atol=GRADIENT)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["aot", "aot_unpaired", "hinge"]},
        {"ld_alpha": 0.0},
        {"ld_alpha": 0.4, "loss_type": ["sigmoid", "ipo"]},
        {"use_weighting": True},
        {"use_weighting": True, "loss_type": ["robust", "sppo_hard"], "label_smoothing": 0.2, "ld_alpha": 0.5},
        {"loss_type": ["discopop"], "discopop_tau": 0.3},
    ],
    ids=str,
)
def test_dpo_options(options):
    check_dpo(options, seed=3)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_extreme_log_ratios_stay_finite(kind, divergence):
    options = {
        "loss_type": [kind],
        "f_divergence_type": divergence,
        "label_smoothing": 0.1,
        "f_alpha_divergence_coef": 3.0,
    }
    if kind == "ipo" and divergence in ("forward_kl", "alpha_divergence"):
        pytest.skip("the square of a score of exp(80) is beyond float32, there as here")
    mask = np.ones((2 * PAIRS, TOKENS), bool)
    reference, collision = np.zeros(mask.shape), np.zeros(mask.shape)
    for scale in (40.0, -40.0, 1e4):
        policy = scale * np.resize([1.0, -1.0], (2 * PAIRS, 1)) * mask
        value, gradient = jax.value_and_grad(lambda x: our_dpo(x, reference, mask, collision, options))(
            jnp.asarray(policy, jnp.float32)
        )
        assert np.isfinite(gradient).all() and np.isfinite(value)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [0.0, 0.3, -0.5])
@pytest.mark.parametrize("kind", CPO_LOSSES)
def test_cpo(kind, alpha, smoothing):
    from trl.experimental.cpo import CPOTrainer

    settings = {"beta": 0.4, "label_smoothing": smoothing, "simpo_gamma": 0.7}
    trainer = Trainer(alpha=alpha, loss_type=kind, **settings)
    rng = np.random.default_rng(4)
    leaves = [-np.abs(rng.normal(1.0, 0.5, PAIRS)) for _ in range(2)]

    def ours(chosen, rejected):
        return jnp.mean(cpo_loss(kind, alpha_reward(chosen, alpha), alpha_reward(rejected, alpha), **settings))

    assert_equal((ours, leaves), lambda *logps: CPOTrainer.cpo_loss(trainer, *logps)[0].mean())


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(beta):
    from trl.experimental.orpo import ORPOTrainer

    rng = np.random.default_rng(5)
    leaves = [-np.abs(rng.normal(1.0, 0.7, PAIRS)) - 0.01 for _ in range(2)]

    def ours(chosen, rejected):
        return jnp.mean(-beta * jax.nn.log_sigmoid(log_odds_ratio(chosen, rejected)))

    # TRL's own sum is in float32.
    assert_equal((ours, leaves), lambda *logps: -ORPOTrainer.odds_ratio_loss(Trainer(beta=beta), *logps)[0].mean())


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.6)])
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("moved", [0.1, -0.1], ids=["kl", "no kl"])
def test_kto(kind, weights, moved):
    from trl import KTOTrainer

    rng = np.random.default_rng(6)
    policy, reference, mask = random_pairs(6)
    label = np.resize([True, False, True], len(mask))
    other = -np.abs(rng.normal(20, 4, len(mask)))
    options = {"beta": 0.2, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    reference_model, args = speaking(torch.tensor(reference)), SimpleNamespace(gradient_checkpointing_kwargs=None)
    trainer = Trainer(loss_type=kind, calculate_KL=kind == "kto", ref_model=reference_model, args=args, **options)
    trainer._compute_kl_logps = lambda model, _: torch.tensor(other if model is reference_model else other + moved)
    completion = torch.tensor(np.pad(mask, ((0, 0), (1, 0)))).long()
    inputs = {"input_ids": completion, "attention_mask": torch.ones_like(completion), "completion_mask": completion}
    inputs["label"] = torch.tensor(label)

    def ours(logps):
        ratios = jnp.sum((logps - reference) * mask, axis=1)
        if kind == "apo_zero_unpaired":
            return jnp.mean(apo_zero_unpaired(ratios, jnp.asarray(label, float), **options))
        kl = kl_estimate(jnp.asarray(other + moved), jnp.asarray(other), jnp.ones(len(mask), bool))
        return jnp.mean(kto_loss(ratios, jnp.broadcast_to(kl, ratios.shape), jnp.asarray(label, float), **options))

    assert_equal(
        (ours, [policy]),
        lambda logps: KTOTrainer._compute_loss(trainer, speaking(logps * torch.tensor(mask)), inputs, False),
    )


@pytest.mark.parametrize("centre", [None, 0.05])
@pytest.mark.parametrize("has_margin", [False, True])
def test_reward(has_margin, centre):
    from trl import RewardTrainer

    rng = np.random.default_rng(7)
    rewards, margin = rng.normal(0, 2, 2 * PAIRS), np.abs(rng.normal(0, 1, PAIRS)) * has_margin

    def ours(rewards):
        chosen, rejected = jnp.split(rewards, 2)
        return jnp.mean(
            bradley_terry(chosen, rejected, jnp.asarray(margin)) + (centre or 0.0) * centring(chosen, rejected)
        )

    def theirs(rewards):
        inputs = {"attention_mask": torch.ones(1)} | ({"margin": torch.tensor(margin)} if has_margin else {})
        trainer = Trainer(args=SimpleNamespace(center_rewards_coefficient=centre))
        return RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=rewards[:, None]), inputs)

    assert_equal((ours, [rewards]), theirs)
