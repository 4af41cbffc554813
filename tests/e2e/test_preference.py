"""Preference methods and reward models by the command line: references, layouts, resuming, mistakes."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpost import DPOConfig, DPOTrainer, from_pretrained, save_pretrained
from jaxpost.cli import main
from tests.conftest import make_model, make_tokenizer
from tests.e2e.test_lora import assert_same
from tests.marks import slow

ADAPTER = "--use_peft --lora_r 4 --lora_target_modules all-linear"
LOG_2 = float(np.log(2))
PAIRS = [
    {"prompt": "q" * (3 + i % 3), "chosen": "yes" * (1 + i % 4), "rejected": "no, " * (1 + (3 * i) % 5)}
    for i in range(32)
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


def run(method, model, data, output_dir, flags=""):
    base = f"{method} --model_name_or_path {model} --dataset_name {data} --output_dir {output_dir} --report_to none"
    shared = "--per_device_train_batch_size 1 --learning_rate 1e-2 --logging_steps 1 --max_steps 4 --save_steps 2"
    return main([*base.split(), *shared.split(), *flags.split()])


def logged(output_dir, name="loss"):
    return [row[name] for row in map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())]


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


@pytest.fixture(scope="module")
def dpo(tiny_folder, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("dpo") / "out"
    assert run("dpo", tiny_folder, data, out) == 0
    return out


def test_a_full_run_is_compared_with_a_copy_of_its_start(dpo, tiny_folder):
    losses, margins = logged(dpo), logged(dpo, "rewards/margins")
    assert losses[0] == pytest.approx(LOG_2, abs=1e-6) and margins[0] == pytest.approx(0, abs=1e-6)
    assert losses[-1] < losses[0] and margins[-1] > 0
    start, end = weights(tiny_folder), weights(dpo)
    assert any(np.any(start[name] != end[name]) for name in start)


@pytest.mark.parametrize(
    "flags",
    [
        slow("--mesh fsdp=4,tensor=2 --per_device_train_batch_size 2"),
        "--mesh data=2,tensor=4 --gradient_accumulation_steps 4 --padding_free false --share_prompts false",
    ],
)
def test_layout_changes_no_loss(dpo, tiny_folder, data, tmp_path, flags):
    assert run("dpo", tiny_folder, data, tmp_path / "out", flags) == 0
    np.testing.assert_allclose(logged(tmp_path / "out"), logged(dpo), rtol=2e-5)
    assert logged(tmp_path / "out", "num_tokens") == logged(dpo, "num_tokens")


def test_an_adapter_is_compared_with_its_base_and_then_with_what_it_was(tiny_folder, data, tmp_path):
    assert run("dpo", tiny_folder, data, tmp_path / "first", ADAPTER) == 0
    losses = logged(tmp_path / "first")
    assert losses[0] == pytest.approx(LOG_2, abs=1e-6) and losses[-1] < losses[0]
    assert not (tmp_path / "first" / "model.safetensors").exists()
    assert run("dpo", tmp_path / "first", data, tmp_path / "second") == 0
    assert logged(tmp_path / "second")[0] == pytest.approx(LOG_2, abs=1e-6)
    first, second = (weights(tmp_path / name, "adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert any(np.any(first[name] != second[name]) for name in first)


def test_a_reference_of_its_own(dpo, tiny_folder, data, tmp_path):
    assert run("dpo", tiny_folder, data, tmp_path / "out", f"--ref_model_name_or_path {dpo}") == 0
    assert logged(tmp_path / "out")[0] > LOG_2 + 0.01  # the reference prefers the chosen already


def test_a_reference_that_follows_at_every_step_is_the_policy(tiny_folder, data, tmp_path):
    flags = "--sync_ref_model --ref_model_sync_steps 1 --ref_model_mixup_alpha 1"
    assert run("dpo", tiny_folder, data, tmp_path / "out", flags) == 0
    np.testing.assert_allclose(logged(tmp_path / "out"), LOG_2, atol=1e-6)


def test_resumed_equals_uninterrupted_bit_for_bit_with_a_moving_reference(tiny_folder, data, tmp_path):
    flags = "--sync_ref_model --ref_model_sync_steps 2 --lr_scheduler_type constant"
    assert run("dpo", tiny_folder, data, tmp_path / "whole", flags) == 0
    assert run("dpo", tiny_folder, data, tmp_path / "parts", f"{flags} --max_steps 2") == 0
    assert run("dpo", tiny_folder, data, tmp_path / "parts", f"{flags} --resume_from_checkpoint true") == 0
    assert_same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def test_python_face_takes_a_loaded_reference_and_leaves_it_as_it_was(tiny_folder, tmp_path):
    reference = from_pretrained(tiny_folder)
    before = np.asarray(reference(np.arange(3, 27).reshape(2, 12)))
    args = DPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=1,
        max_steps=2,
        report_to=["none"],
        save_strategy="no",
        eval_strategy="steps",
    )
    trainer = DPOTrainer(str(tiny_folder), reference, args, None, PAIRS, PAIRS[:8])
    metrics = trainer.train()
    assert metrics["eval_rewards/accuracies"] >= 0 and trainer.evaluate()["eval_loss"] == metrics["eval_loss"]
    np.testing.assert_allclose(np.asarray(reference(np.arange(3, 27).reshape(2, 12))), before, atol=1e-6)


@pytest.mark.parametrize("method", ["kto", "orpo", slow("cpo"), "simpo"])
def test_the_other_methods_learn(method, tiny_folder, data, tmp_path):
    assert run(method, tiny_folder, data, tmp_path / "out", "--max_steps 6") == 0
    losses = logged(tmp_path / "out")
    assert losses[-1] < losses[0] and np.isfinite(logged(tmp_path / "out", "rewards/margins")).all()


@pytest.mark.parametrize("flags", ["", ADAPTER], ids=["whole", "adapter"])
def test_a_reward_model_ranks_what_it_was_taught(flags, tiny_folder, data, tmp_path):
    assert run("reward", tiny_folder, data, tmp_path / "out", f"{flags} --max_steps 8") == 0
    accuracies = logged(tmp_path / "out", "accuracy")
    assert accuracies[-1] >= 0.9 > accuracies[0]
    model, tokenizer = from_pretrained(tmp_path / "out", head="reward"), make_tokenizer()
    chosen, rejected = (tokenizer(f"q{text}<|im_end|>")["input_ids"] for text in ("yesyes", "no, no, "))
    assert model(np.array([chosen]))[0, -1] > model(np.array([rejected]))[0, -1]


@pytest.mark.parametrize(
    ("method", "rows", "flags", "code", "message"),
    [
        ("dpo", [{**PAIRS[0], "rejected": PAIRS[0]["chosen"]}], "", 3, "row 1, column 'rejected' is the same as"),
        ("dpo", [{**PAIRS[0], "rejected": ""}], "", 3, "row 1, column 'rejected' is empty"),
        ("dpo", [{"prompt": "q", "completion": "a"}], "", 3, "accepted are 'chosen' with 'rejected'"),
        ("dpo", [{**PAIRS[0], "chosen": None}], "", 3, "row 1, column 'chosen'"),
        ("dpo", [{**PAIRS[0], "prompt": "q" * 50}], "--max_length 20", 3, "none of the 1 rows has a token to train on"),
        ("reward", [{**PAIRS[0], "margin": "wide"}], "", 3, "column 'margin' must be a finite number"),
        ("kto", [{"prompt": "q", "completion": "a", "label": True}] * 4, "", 3, "all 4 completions are desirable"),
        ("kto", [{"prompt": "q", "completion": "a", "label": 3}] * 4, "", 3, "column 'label' must be true or false"),
        ("dpo", PAIRS, "--loss_type sigmod", 2, "did you mean 'sigmoid'"),
        ("dpo", PAIRS, "--sync_ref_model --use_peft", 2, "neither an adapter nor a ref_model"),
        ("dpo", PAIRS, "--ref_model_name_or_path {other}", 2, "320 rows, the policy|embedding rows"),
        ("dpo", PAIRS, "--packing true", 2, "--packing is a flag of sft, not of dpo"),
    ],
)
def test_mistakes_are_one_line(method, rows, flags, code, message, tiny_folder, tmp_path, capsys):
    if "{other}" in flags:
        save_pretrained(make_model(vocab_size=400), make_tokenizer(), tmp_path / "other")
        flags = flags.format(other=tmp_path / "other")
    data = jsonl(tmp_path / "rows.jsonl", rows)
    assert run(method, tiny_folder, data, tmp_path / "out", flags) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("jaxpost: ") and "\n" not in error
    assert any(part in error for part in message.split("|")), error
    assert not (tmp_path / "out").exists()


def test_bad_pairs_are_skipped_and_counted(tiny_folder, tmp_path, capsys):
    rows = [*PAIRS, {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    assert run("dpo", tiny_folder, data, tmp_path / "out", "--on_bad_row skip --max_steps 1") == 0
    assert "1 rows skipped: 1 x column 'rejected' is the same as 'chosen'" in capsys.readouterr().out
