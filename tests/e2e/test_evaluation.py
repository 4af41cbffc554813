"""Evaluation of preferences in a run: the reference asked once, metrics of one's own, the best checkpoint."""

import json

import numpy as np
import pytest

from jaxpost import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig
from jaxpost.errors import ConfigError
from jaxpost.methods import METHODS
from jaxpost.train import precompute
from jaxpost.train.evaluate import by_example
from jaxpost.trainer import Trainer
from tests.e2e.test_preference import ADAPTER, PAIRS, jsonl, run
from tests.marks import slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    jsonl(folder / "train.jsonl", PAIRS)
    jsonl(folder / "test.jsonl", PAIRS[3:14])
    return folder


@pytest.fixture(scope="module")
def plain(tiny_folder, data, tmp_path_factory):
    """A run that asks the reference at every step."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert run("dpo", tiny_folder, data, out, "--eval_strategy steps --eval_steps 2") == 0
    return out


def evaluated(folder, name="eval_loss"):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if name in row]


def test_a_reference_that_is_asked_once_says_the_same(plain, tiny_folder, data, tmp_path):
    cache = f"--tokenized_cache_dir {tmp_path / 'cache'} --eval_strategy steps --eval_steps 2"
    flags = f"{cache} --precompute_ref_log_probs --precompute_ref_batch_size 3"
    assert run("dpo", tiny_folder, data, tmp_path / "one", flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    np.testing.assert_allclose(losses, evaluated(plain, "loss"), rtol=2e-6)
    np.testing.assert_allclose(evaluated(tmp_path / "one"), evaluated(plain), rtol=2e-6)
    # Tokenised rows and answers, of either set; a run with another beta asks nothing new.
    entries = sorted((tmp_path / "cache").iterdir())
    assert len(entries) == 4
    assert run("dpo", tiny_folder, data, tmp_path / "two", f"{flags} --beta 0.3") == 0
    assert sorted((tmp_path / "cache").iterdir()) == entries
    # Another reference is asked again.
    assert run("dpo", tiny_folder, data, tmp_path / "three", f"{flags} --ref_model_name_or_path {plain}") == 0
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_answers_that_another_process_lacks_are_asked_anew(tiny_folder, data, tmp_path, monkeypatch):
    asked = []

    def noted(*given):
        asked.append(by_example(*given))
        return asked[-1]

    monkeypatch.setattr(precompute, "by_example", noted)
    flags = f"--tokenized_cache_dir {tmp_path / 'cache'} --precompute_ref_log_probs --max_steps 1"
    for name, everywhere, times in (("first", True, 1), ("here", True, 1), ("lacking", False, 2)):
        monkeypatch.setattr(precompute, "all_agree", lambda here, everywhere=everywhere: here and everywhere)
        assert run("dpo", tiny_folder, data, tmp_path / name, flags) == 0
        assert len(asked) == times, name
    np.testing.assert_array_equal(asked[0], asked[1])
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_adapters_base_can_be_asked_once(tiny_folder, data, tmp_path):
    for name, flags in (("online", ""), ("once", "--precompute_ref_log_probs --tokenized_cache_dir=")):
        assert run("dpo", tiny_folder, data, tmp_path / name, f"{ADAPTER} {flags}") == 0
    np.testing.assert_allclose(*(evaluated(tmp_path / name, "loss") for name in ("online", "once")), rtol=2e-6)


@pytest.mark.parametrize("method", ["kto", slow("kto --loss_type apo_zero_unpaired"), slow("bco")])
def test_judged_completions_can_be_asked_once(tiny_folder, data, tmp_path, method):
    method, *flags = method.split(maxsplit=1)
    for name, more in (("online", []), ("once", ["--precompute_ref_log_probs"])):
        assert run(method, tiny_folder, data, tmp_path / name, " ".join([*flags, *more])) == 0
    np.testing.assert_allclose(*(evaluated(tmp_path / name, "loss") for name in ("online", "once")), rtol=2e-6)


def test_what_cannot_be_asked_once_says_so(tiny_folder, data, tmp_path, capsys):
    assert run("dpo", tiny_folder, data, tmp_path / "dpo", "--precompute_ref_log_probs --sync_ref_model") == 2
    assert "drop one" in capsys.readouterr().err
    assert run("dpo", tiny_folder, data, tmp_path / "dpo", "--precompute_ref_batch_size 0") == 2
    assert "precompute_ref_batch_size" in capsys.readouterr().err
    args = DPOConfig(output_dir=str(tmp_path / "later"), precompute_ref_log_probs=True, report_to=["none"])
    trainer = DPOTrainer(str(tiny_folder), args=args, train_dataset=PAIRS)
    with pytest.raises(ConfigError, match="give eval_dataset from the start"):
        trainer.evaluate(PAIRS[:4])


def config(kind, folder, **changes):
    shared = {"max_steps": 2, "report_to": ["none"], "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 1}
    return kind(output_dir=str(folder), per_device_train_batch_size=1, learning_rate=1e-2, **shared | changes)


def test_metrics_of_ones_own_are_of_the_rewards_of_examples(tiny_folder, tmp_path):
    seen = []

    def compute(prediction):
        rewards, labels = prediction
        seen.append(rewards)
        return {"right": np.mean(np.argmax(rewards, axis=1) == labels), "eval_spread": rewards.std()}

    args = config(DPOConfig, tmp_path / "out")
    trainer = DPOTrainer(str(tiny_folder), None, args, None, PAIRS, PAIRS[5:16], compute_metrics=compute)
    metrics = trainer.train()
    assert seen[-1].shape == (11, 2) and np.ptp(seen[-1]) > 0
    assert metrics["eval_right"] == pytest.approx(metrics["eval_rewards/accuracies"])
    assert metrics["eval_spread"] == pytest.approx(seen[-1].std())
    np.testing.assert_allclose(seen[-1].mean(axis=0)[0], metrics["eval_rewards/chosen"], rtol=1e-4)


def test_metrics_of_judged_completions_have_their_labels(tiny_folder, tmp_path):
    rows = [{"prompt": "q", "completion": "yes" * (1 + i % 3), "label": i % 3 > 0} for i in range(12)]
    found = []
    args = config(KTOConfig, tmp_path / "out", max_steps=1)
    trainer = KTOTrainer(
        str(tiny_folder),
        None,
        args,
        None,
        rows,
        rows[:7],
        compute_metrics=lambda p: found.append(p) or {"count": len(p[0])},
    )
    assert trainer.train()["eval_count"] == 7
    assert found[0].predictions.shape == (7,)
    np.testing.assert_array_equal(found[0].label_ids, [row["label"] for row in rows[:7]])


def test_fine_tuning_has_no_rewards(tiny_folder):
    rows = [{"prompt": "q", "completion": "yes"}] * 4
    args = SFTConfig(report_to=["none"])
    with pytest.raises(ConfigError, match="sft has no rewards"):
        Trainer(METHODS["sft"], str(tiny_folder), args, rows, rows, compute_metrics=lambda prediction: {})


BEST = "--eval_strategy steps --eval_steps 1 --save_steps 1 --load_best_model_at_end"


@pytest.mark.parametrize(
    ("flags", "metric"),
    [("--metric_for_best_model rewards/chosen", "eval_rewards/chosen"), slow("--greater_is_better true", "eval_loss")],
)
def test_the_best_checkpoint_is_kept_and_written(tiny_folder, data, tmp_path, flags, metric):
    flags = f"{BEST} {flags} --learning_rate 1e-1 --max_steps 5 --save_total_limit 1 --lr_scheduler_type constant"
    assert run("dpo", tiny_folder, data, tmp_path / "out", flags) == 0
    values, losses = evaluated(tmp_path / "out", metric), evaluated(tmp_path / "out")
    best = int(np.argmax(values))
    steps = {int(path.name) for path in (tmp_path / "out" / "checkpoints").iterdir() if path.name.isdigit()}
    assert steps == {best + 1, 5} and best < 4
    # The written model is that of the best step: it has the loss of that step's evaluation.
    args = config(DPOConfig, tmp_path / "check")
    trainer = DPOTrainer(str(tmp_path / "out"), str(tiny_folder), args, None, PAIRS, PAIRS[3:14])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--load_best_model_at_end", "give both the same"),
        ("--load_best_model_at_end --eval_strategy steps --eval_steps 3 --save_steps 4", "multiple of eval_steps"),
        ("--metric_for_best_model loss", "need --load_best_model_at_end"),
        (f"{BEST} --metric_for_best_model rewards/acuracies", "did you mean 'eval_rewards/accuracies'"),
    ],
)
def test_mistakes_about_the_best_are_one_line(tiny_folder, data, tmp_path, capsys, flags, message):
    assert run("dpo", tiny_folder, data, tmp_path / "out", flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()
