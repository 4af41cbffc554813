"""Every loss of GRPO and every option of it, in float64, against TRL's own code on given log-probabilities.

TRL's loss is the trainer's method, run on a stand-in for the trainer; ours is the objective's, with sequences of
different lengths in common rows. Only the last sum of ours is float32, as in training.
"""

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.metrics import Tally
from jaxpost.objectives.grpo import GRPO
from jaxpost.objectives.grpo_losses import LOSS_TYPES
from jaxpost.objectives.logps import TokenScores, next_tokens
from jaxpost.objectives.rloo import RLOO

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = pytest.mark.parity

VALUE, GRADIENT = 1e-6, 1e-5
ROWS, PER_ROW, LONGEST = 3, 4, 9
COUNT = ROWS * PER_ROW
DEFAULTS = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "delta": None,
    "beta": 0.0,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "off_policy_mask_threshold": None,
    "use_bias_correction_kl": False,
    "max_completion_length": 16,
}
OPTIONS = [
    {},
    {"beta": 0.3},
    {"beta": 0.3, "use_bias_correction_kl": True},
    {"delta": 1.4},
    {"entropy_coef": 0.07},
    {"entropy_coef": 0.07, "top_entropy_quantile": 0.4},
    {"off_policy_mask_threshold": 0.05},
    {"beta": 0.3, "delta": 1.4, "entropy_coef": 0.07, "top_entropy_quantile": 0.6, "off_policy_mask_threshold": 0.05},
]


def random_inputs(seed=0):
    """[COUNT, LONGEST] of sequences, and their lengths and advantages."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LONGEST + 1, COUNT)
    logps = -np.abs(rng.normal(1.5, 1.0, (COUNT, LONGEST)))
    near = {name: logps + rng.normal(0, 0.3, logps.shape) for name in ("old", "ref", "sampled")}
    return {
        "logps": logps,
        "entropy": np.abs(rng.normal(1.0, 0.5, logps.shape)),
        "lengths": lengths,
        "mask": np.arange(LONGEST) < lengths[:, None],
        "advantages": np.where(rng.random(COUNT) < 0.2, 0.0, rng.normal(size=COUNT)),
        **near,
    }


def trl_loss(given, options):
    """Loss, its gradient by the log-probabilities, and the metrics."""
    from trl import GRPOTrainer

    o = SimpleNamespace(**DEFAULTS | options)
    same = lambda x, **_: x  # noqa: E731
    logps = torch.tensor(given["logps"], requires_grad=True)
    entropy = torch.tensor(given["entropy"], requires_grad=True)
    model = SimpleNamespace(training=True)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
        accelerator=SimpleNamespace(
            gather=same, reduce=same, pad_across_processes=same, num_processes=1, sync_gradients=True
        ),
        args=SimpleNamespace(
            use_bias_correction_kl=o.use_bias_correction_kl,
            delta=o.delta,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        ),
        model=model,
        epsilon_low=o.epsilon,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=o.entropy_coef != 0,
        use_adaptive_entropy=False,
        _metrics={"train": defaultdict(list)},
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        **vars(o),
    )
    trainer.get_high_entropy_mask = lambda *args: GRPOTrainer.get_high_entropy_mask(trainer, *args)
    mask = torch.tensor(given["mask"]).long()
    inputs = {
        "prompt_ids": torch.zeros(COUNT, 1, dtype=torch.long),
        "prompt_mask": torch.ones(COUNT, 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": torch.tensor(given["advantages"]),
        "old_per_token_logps": torch.tensor(given["old"]),
        "ref_per_token_logps": torch.tensor(given["ref"]),
        "sampling_per_token_logps": torch.tensor(given["sampled"]),
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, model, inputs)
    loss.backward()
    metrics = {name: np.mean(values) for name, values in trainer._metrics["train"].items()}
    of_entropy = np.zeros_like(given["entropy"]) if entropy.grad is None else entropy.grad.numpy()
    return loss.item(), logps.grad.numpy(), of_entropy, metrics


def in_rows(values, given):
    """[COUNT, LONGEST] as [ROWS, T]: each sequence after a token that predicts its first one, padding at the end."""
    length = PER_ROW * (LONGEST + 1)
    rows, places = np.zeros((ROWS, length)), np.zeros((COUNT, LONGEST), int)
    for row in range(ROWS):
        begin = 0
        for number in range(row * PER_ROW, (row + 1) * PER_ROW):
            size = given["lengths"][number]
            rows[row, begin : begin + size] = values[number, :size]
            places[number, :size] = row * length + begin + np.arange(size)
            begin += size + 1
    return rows, places


def our_batch(given):
    sizes = given["lengths"].reshape(ROWS, PER_ROW) + 1
    segments = np.zeros((ROWS, PER_ROW * (LONGEST + 1)), np.int32)
    positions = np.zeros_like(segments)
    for row in range(ROWS):
        ends = np.cumsum(sizes[row])
        for number, (end, size) in enumerate(zip(ends, sizes[row], strict=True), start=1):
            segments[row, end - size : end], positions[row, end - size : end] = number, np.arange(size)
    columns = {name: in_rows(given[name], given)[0] for name in ("old", "ref", "sampled")}
    return {
        "tokens": np.zeros_like(segments),
        "positions": positions,
        "segments": segments,
        "loss_mask": ((segments > 0) & (positions > 0)).astype(np.float32),
        "examples": np.ones((ROWS, PER_ROW)),
        "num_trained": np.asarray(sizes, np.float64) - 1,
        "advantages": given["advantages"].reshape(ROWS, PER_ROW),
        "old_logps": columns["old"],
        "ref_logps": columns["ref"],
        "sampled_logps": columns["sampled"],
    }


class Speaking:
    """A model that gives tokens these log-probabilities and distributions of this entropy."""

    def __init__(self, logps, entropy):
        self.logps, self.entropy = logps, entropy

    def hidden(self, *_):
        raise AssertionError

    unembed = unembedding = score = hidden


def our_loss(objective, given, module):
    """As `trl_loss`, of any method."""
    (logps, places), (entropy, _) = in_rows(given["logps"], given), in_rows(given["entropy"], given)

    def scores(model, batch, **_):
        zeros, mask = jnp.zeros_like(model.logps), next_tokens(batch)[1]
        parts = [jnp.where(mask, x, 0) for x in (model.logps, model.entropy)]
        return TokenScores(*parts, zeros, zeros, zeros), mask, jnp.zeros(())

    with jax.enable_x64(True):
        batch = {name: jnp.asarray(value) for name, value in our_batch(given).items()}
        memory = {name: jnp.zeros(ROWS) for name in objective.remembers}
        with patch(f"jaxpost.objectives.{module}.score_batch", scores):
            said = jnp.asarray(logps), jnp.asarray(entropy)
            batch = objective.annotate(Speaking(*said), None, batch | memory)

            def total(said):
                loss, metrics = objective.loss(Speaking(*said), batch)
                return loss.total / loss.count, metrics

            (value, metrics), gradients = jax.value_and_grad(total, has_aux=True)(said)
        tally = Tally()
        tally.add(metrics)
        of_logps, of_entropy = (np.where(given["mask"], np.asarray(x).reshape(-1)[places], 0) for x in gradients)
    return float(value), of_logps, of_entropy, tally.values()


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=VALUE, atol=VALUE)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=GRADIENT, atol=GRADIENT)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=GRADIENT, atol=GRADIENT)
    common = ours[3].keys() & theirs[3].keys()
    assert "entropy" in common
    for name in common:
        np.testing.assert_allclose(ours[3][name], theirs[3][name], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_grpo(loss_type, level, options):
    given = random_inputs()
    chosen = {**options, "loss_type": loss_type, "importance_sampling_level": level}
    if loss_type == "cispo":
        chosen |= {"epsilon_high": 1.1, "delta": None}  # the greatest weight, not what is added to 1
    assert_same(our_loss(GRPO(**DEFAULTS | chosen), given, "grpo"), trl_loss(given, chosen))


def test_rloo():
    from trl import RLOOTrainer

    given = random_inputs(1)
    same = lambda x, **_: x  # noqa: E731
    logps, entropy = torch.tensor(given["logps"], requires_grad=True), torch.tensor(given["entropy"])
    mask = torch.tensor(given["mask"]).long()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
        accelerator=SimpleNamespace(gather=same, reduce=same),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.28,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros_like(mask)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask}
    inputs |= {"advantages": torch.tensor(given["advantages"])}
    loss = RLOOTrainer._compute_loss(trainer, None, {**inputs, "old_logps": (torch.tensor(given["old"]) * mask).sum(1)})
    loss.backward()
    metrics = {name: np.mean(values) for name, values in trainer._metrics["train"].items()}
    ours = our_loss(RLOO(epsilon=0.2, epsilon_high=0.28), given, "rloo")
    assert_same(ours, (loss.item(), logps.grad.numpy(), np.zeros_like(given["entropy"]), metrics))
