"""Fifty steps of preference methods against TRL's trainers: same rows, same order, each step's loss and margin."""

import numpy as np
import pytest

from tests.parity.test_preference_step import DEVICES, our_log, pair, trl_log, write_model

pytest.importorskip("trl")
pytestmark = pytest.mark.parity

STEPS, TOLERANCE = 50, 1e-3  # absolute
ROWS = [
    {"prompt": question, "chosen": " " + right, "rejected": " " + wrong}
    for question, right, wrong in map(pair, range(48))
]
# As many as a step takes, for TRL looks for other completions among the rows of a device's batch, which are all here.
JUDGED = [
    {"prompt": row["prompt"], "completion": row["chosen" if number % 3 else "rejected"], "label": number % 3 > 0}
    for number, row in enumerate(ROWS[: 2 * DEVICES])
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    heads = {"policy": "lm", "reference": "lm", "judge": "reward"}
    return {name: write_model(home / name, seed, head=head) for seed, (name, head) in enumerate(heads.items())}


@pytest.mark.parametrize(
    ("method", "rows", "start", "margin", "flags"),
    [
        pytest.param("dpo", ROWS, ("policy", "policy"), "rewards/margins", {}, id="dpo"),
        pytest.param(
            "dpo",
            ROWS,
            ("policy", "policy"),
            "rewards/margins",
            {"loss_type": ["ipo"]},
            id="ipo",
            marks=pytest.mark.slow,
        ),
        pytest.param("kto", JUDGED, ("reference", "policy"), "rewards/margins", {}, id="kto", marks=pytest.mark.slow),
        pytest.param("orpo", ROWS, ("policy", "policy"), "rewards/margins", {}, id="orpo", marks=pytest.mark.slow),
        pytest.param("reward", ROWS, ("judge", "judge"), "margin", {}, id="reward"),
    ],
)
def test_fifty_steps_equal_trl(models, method, rows, start, margin, flags, tmp_path):
    folders, shared = [models[name] for name in start], {"max_steps": STEPS, "learning_rate": 1e-4, **flags}
    ours = our_log(method, folders, rows, tmp_path / "ours", pad_to_multiple_of=64, **shared)
    theirs = trl_log(method, folders, rows, tmp_path / "theirs", **shared)
    for name in ("loss", margin):
        one, other = (np.array([row[name] for row in log]) for log in (ours, theirs))
        assert len(one) == len(other) == STEPS
        print(f"{name}: at most {np.max(np.abs(one - other)):.1e} apart; from {one[0]:.4f} to {one[-1]:.4f}")
        np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=0, err_msg=name)
    assert np.ptp([row["loss"] for row in ours]) > 50 * TOLERANCE
