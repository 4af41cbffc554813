"""The first steps of preference methods against TRL's trainers: same rows in the same order, another reference."""

import json
from unittest.mock import patch

import numpy as np
import pytest

from jaxpost import save_pretrained
from jaxpost.cli import main
from tests.conftest import make_noisy_model, make_tokenizer

pytest.importorskip("trl")
pytestmark = pytest.mark.parity

TOLERANCE = 1e-4  # relative, of the loss and of every metric
DEVICES = 8  # of tests/conftest.py
NUMBERS = range(16)


def pair(number):
    """A question with a right and a wrong answer, of different lengths."""
    question = f"What is {number} + {number}?" + " Take your time." * (number % 4)
    right = f"{number} + {number} = {2 * number}" + ", naïve ☕" * (number % 3) + "."
    wrong = "I do not know" + " at all" * (number % 5)
    return question, right, wrong


def said(text, role="assistant"):
    return [{"role": role, "content": text}]


PAIRS = [
    {"prompt": said(question, "user"), "chosen": said(right), "rejected": said(wrong)}
    for question, right, wrong in map(pair, NUMBERS)
]
STANDARD = [
    {"prompt": question, "chosen": " " + right, "rejected": " " + wrong}
    for question, right, wrong in map(pair, NUMBERS)
]
IMPLICIT = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in PAIRS]
MARGINS = [{**row, "margin": number / 8} for number, row in enumerate(PAIRS)]
JUDGED = [
    {"prompt": row["prompt"], "completion": row["chosen" if number % 3 else "rejected"], "label": number % 3 > 0}
    for number, row in enumerate(PAIRS)
]


def write_model(folder, seed, **changes):
    save_pretrained(make_noisy_model(seed, **changes), make_tokenizer(), folder, generation_config={"eos_token_id": 1})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy and a reference with other weights."""
    home = tmp_path_factory.mktemp("models")
    return write_model(home / "policy", 0), write_model(home / "reference", 1)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "reward", 2, head="reward")


def our_log(method, folders, rows, output_dir, **changes):
    """What jaxpost logs for each step; two rows a device."""
    data = output_dir / "rows.jsonl"
    output_dir.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy, reference = folders
    flags = {"max_length": 256, "max_steps": 1, "per_device_train_batch_size": 2, "pad_to_multiple_of": 512}
    flags |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "tokenized_cache_dir": "", **changes}
    flags |= {"train_sampling_strategy": "sequential", "output_dir": output_dir / "run", "dataset_name": data}
    if method in ("dpo", "kto", "bco"):
        flags["ref_model_name_or_path"] = reference
    words = [method, "--model_name_or_path", str(policy)]
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    with patch("jaxpost.record.write_curves"):  # drawing takes longer than the step
        assert main(words) == 0
    return [json.loads(line) for line in (output_dir / "run" / "metrics.jsonl").read_text().splitlines()]


def trl_log(method, folders, rows, output_dir, **changes):
    """What TRL logs for each step, which takes all rows at once."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    config_class, trainer_class = trl_classes(method)
    settings = {"max_steps": 1, "max_length": 256, **changes}
    args = config_class(
        output_dir=str(output_dir),
        logging_steps=1,
        per_device_train_batch_size=2 * DEVICES,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        train_sampling_strategy="sequential",
        **settings,
    )
    policy, reference = folders
    kind = AutoModelForSequenceClassification if method == "reward" else AutoModelForCausalLM
    options = {"ref_model": AutoModelForCausalLM.from_pretrained(reference)} if method in ("dpo", "kto") else {}
    tokenizer = AutoTokenizer.from_pretrained(policy)
    if method in ("cpo", "orpo"):
        tokenizer.bos_token = None  # which these trainers put before the prompt even if the tokenizer does not
    trainer = trainer_class(
        kind.from_pretrained(policy),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **options,
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def trl_classes(method):
    import trl
    from trl.experimental import cpo, orpo

    return {
        "dpo": (trl.DPOConfig, trl.DPOTrainer),
        "kto": (trl.KTOConfig, trl.KTOTrainer),
        "reward": (trl.RewardConfig, trl.RewardTrainer),
        "cpo": (cpo.CPOConfig, cpo.CPOTrainer),
        "orpo": (orpo.ORPOConfig, orpo.ORPOTrainer),
    }[method]


def shared(ours, theirs, left_out=()):
    """The metrics that both log."""
    timing = ("epoch", "step_time", "total_flos", "train_loss")
    return sorted(name for name in ours.keys() & theirs.keys() if name not in (*timing, *left_out))


def assert_same(ours, theirs, left_out=()):
    names = shared(ours, theirs, left_out)
    assert len(names) >= 8
    for name in names:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=TOLERANCE, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        pytest.param(PAIRS, {}, id="conversational"),
        pytest.param(STANDARD, {}, id="standard"),
        pytest.param(IMPLICIT, {}, id="implicit prompt"),
        pytest.param(PAIRS, {"max_length": 60}, id="cut"),
        pytest.param(PAIRS, {"loss_type": ["ipo"]}, id="ipo"),
        pytest.param(PAIRS, {"loss_type": ["aot_unpaired"], "label_smoothing": 0.1}, id="aot_unpaired"),
        pytest.param(
            PAIRS, {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, id="mixture"
        ),
        pytest.param(PAIRS, {"ld_alpha": 0.3}, id="ld"),
        pytest.param(PAIRS, {"use_weighting": True}, id="wpo"),
        pytest.param(PAIRS, {"f_divergence_type": "js_divergence"}, id="js"),
    ],
)
def test_first_dpo_step_equals_trl(folders, rows, flags, tmp_path):
    [ours], [theirs] = (
        log("dpo", folders, rows, tmp_path / name, **flags) for log, name in ((our_log, "ours"), (trl_log, "theirs"))
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        pytest.param(JUDGED, {}, id="judged"),
        # TRL looks for other completions among the rows of a device's batch, which here are all there are.
        pytest.param(PAIRS[:DEVICES], {}, id="pairs taken apart"),
        pytest.param(JUDGED, {"desirable_weight": 1.3, "undesirable_weight": 0.7}, id="weights"),
        pytest.param(JUDGED, {"loss_type": "apo_zero_unpaired"}, id="apo_zero_unpaired"),
    ],
)
def test_first_kto_step_equals_trl(folders, rows, flags, tmp_path):
    [ours], [theirs] = (
        log("kto", folders[::-1], rows, tmp_path / name, **flags)
        for log, name in ((our_log, "ours"), (trl_log, "theirs"))
    )
    assert_same(ours, theirs)
    assert ours["kl"] > 0 or flags.get("loss_type")


@pytest.mark.parametrize("flags", [{}, {"center_rewards_coefficient": 0.1}], ids=["plain", "centred"])
@pytest.mark.parametrize("rows", [PAIRS, STANDARD, MARGINS], ids=["conversational", "standard", "margins"])
def test_first_reward_step_equals_trl(reward_folder, rows, flags, tmp_path):
    folders = (reward_folder, None)
    [ours], [theirs] = (
        log("reward", folders, rows, tmp_path / name, **flags) for log, name in ((our_log, "ours"), (trl_log, "theirs"))
    )
    assert_same(ours, theirs)


# TRL takes the mean of the logits of all positions, with prompts and padding; ours is that of the completions. Its rows
# here are text, since it adds an EOS of its own after what the chat template ends with.
LOGITS = ("logits/chosen", "logits/rejected")


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        pytest.param("orpo", {"beta": 0.5}, id="orpo"),
        pytest.param("cpo", {}, id="cpo"),
        pytest.param("cpo", {"loss_type": "hinge", "cpo_alpha": 0.0}, id="hinge"),
        pytest.param("cpo", {"loss_type": "ipo", "cpo_alpha": 0.5}, id="ipo"),
        pytest.param("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "label_smoothing": 0.1}, id="simpo"),
        pytest.param("cpo", {"loss_type": "simpo", "alpha": 0.3, "cpo_alpha": 0.0}, id="alphapo"),
    ],
)
def test_first_step_without_a_reference_equals_trl(folders, method, flags, tmp_path):
    [ours], [theirs] = (
        log(method, folders, STANDARD, tmp_path / name, **flags)
        for log, name in ((our_log, "ours"), (trl_log, "theirs"))
    )
    assert_same(ours, theirs, LOGITS)
