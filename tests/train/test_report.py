"""The curves that a run leaves, and its model card."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import yaml

from jaxpost.train.logging import LoggingConfig, RunLog
from jaxpost.train.report import write_curves, write_model_card


def write_rows(folder, rows):
    with RunLog(folder, LoggingConfig(report_to=[]), total_steps=len(rows)) as log:
        for step, row in rows:
            log.log(step, row)


@pytest.fixture
def drawn(monkeypatch):
    """The figures saved during the test."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def panels(figure):
    """title -> (y label, {series name or None: y values}) of the panels that are shown."""
    return {
        ax.get_title("left"): (ax.get_ylabel(), {line.get_label(): list(line.get_ydata()) for line in ax.lines})
        for ax in figure.axes
        if ax.axison
    }


def test_one_panel_for_each_kind_that_has_data(tmp_path, drawn):
    row = {
        "epoch": 0.1,
        "loss": 2.0,
        "learning_rate": 1e-5,
        "grad_norm": 1.0,
        "tokens_per_second": 100.0,
        "input_time": 1,
    }
    write_rows(tmp_path, [(10, row), (20, row), (20, {"epoch": 0.2, "eval_loss": 1.5, "eval_other_loss": 1.25})])
    path = write_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "history.jsonl", "metrics.jsonl"]
    (figure,) = drawn
    shown = panels(figure)
    assert list(shown) == ["Loss", "Learning rate", "Gradient norm, before clipping", "Speed"]
    assert shown["Loss"][1] == {"loss": [2.0, 2.0], "eval_loss": [1.5], "eval_other_loss": [1.25]}
    assert shown["Speed"][0] == "tokens / s"
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "loss",
        "eval_loss",
        "eval_other_loss",
    ]
    assert all(ax.get_xlabel() == "step (optimizer updates)" for ax in figure.axes if ax.axison)
    assert figure.get_suptitle() == tmp_path.name


def test_reward_metrics_find_their_panels(tmp_path, drawn):
    names = ["reward", "reward_std", "rewards/f/mean", "rewards/f/std", "kl", "entropy", "completions/mean_length"]
    names += ["rewards/chosen", "rewards/accuracies", "mean_token_accuracy", "logps/chosen"]
    write_rows(tmp_path, [(1, dict.fromkeys(names, 0.5))])
    write_curves(tmp_path, title="a $title$")
    found = {title: list(series) for title, (_, series) in panels(drawn[0]).items()}
    assert found == {
        "Accuracy": ["rewards/accuracies", "mean_token_accuracy"],
        "Entropy": ["entropy"],
        "Rewards": ["reward", "rewards/f/mean", "rewards/chosen"],
        "Spread of rewards": ["reward_std", "rewards/f/std"],
        "KL to the reference": ["kl"],
        "Completion length": ["completions/mean_length"],
    }


def test_a_long_noisy_series_gets_its_running_mean(tmp_path, drawn):
    values = [1.0 + (-1) ** step for step in range(120)]
    values[50] = math.nan
    write_rows(tmp_path, [(step, {"loss": value, "learning_rate": 1e-5}) for step, value in enumerate(values)])
    write_curves(tmp_path)
    thin, thick = drawn[0].axes[0].lines
    assert len(thin.get_ydata()) == 120
    mean = np.asarray(thick.get_ydata())
    assert np.isfinite(mean).all() and np.abs(mean - 1.0).max() <= 0.5
    # a window of 5: the mean of 2, 0, 2, 0, 2; and of the three first values at the edge
    np.testing.assert_allclose(mean[[10, 0]], [1.2, 4 / 3])
    assert len(drawn[0].axes[1].lines) == 1


def test_odd_values_can_be_drawn(tmp_path):
    rows = [(1, {"loss": math.inf}), (2, {"loss": math.nan, "grad_norm": math.nan}), (3, {"loss": 1e9})]
    write_rows(tmp_path, rows)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert write_curves(tmp_path) is not None


@pytest.mark.parametrize("rows", [[], [(1, {"epoch": 1.0, "something": 2.0})]])
def test_nothing_to_draw(tmp_path, rows):
    write_rows(tmp_path, rows)
    assert write_curves(tmp_path) is None
    assert not (tmp_path / "curves.png").exists()


def test_no_metrics_file(tmp_path):
    assert write_curves(tmp_path) is None


def test_drawing_leaves_pyplot_alone(tmp_path):
    write_rows(tmp_path, [(1, {"loss": 1.0})])
    code = """
import sys, pathlib
from jaxpost.train.report import write_curves
assert "matplotlib" not in sys.modules
write_curves(pathlib.Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


CARD = {
    "base_model": "Qwen/Qwen3-0.6B",
    "dataset": "openai/gsm8k",
    "method": "sft",
    "config": {"learning_rate": 2e-5, "report_to": ["tensorboard"], "max_steps": 10, "run_name": None},
    "versions": {"jaxpost": "0.1.0", "jax": "0.10.2"},
    "metrics": {"loss": 0.123456789, "num_tokens": 1234567},
    "command": "jaxpost sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name openai/gsm8k",
}


def card(folder, **changes):
    """(front matter, body) of a card as a reader parses it."""
    text = write_model_card(folder, **{**CARD, **changes}).read_text()
    empty, front, body = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), body


def test_card_tells_what_was_done(tmp_path):
    front, body = card(tmp_path)
    assert front == {
        "library_name": "jaxpost",
        "base_model": "Qwen/Qwen3-0.6B",
        "datasets": ["openai/gsm8k"],
        "tags": ["jaxpost", "sft"],
    }
    assert "A fine-tuned version of `Qwen/Qwen3-0.6B`, trained on `openai/gsm8k` with jaxpost's `sft`." in body
    assert "| loss | 0.12346 |\n| num_tokens | 1234567 |" in body
    assert f"```sh\n{CARD['command']}\n```" in body
    assert "jaxpost 0.1.0 · jax 0.10.2" in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]) == CARD["config"]
    assert "curves.png" not in body


def test_card_of_local_files_names_no_folder_and_no_hub_id(tmp_path):
    (tmp_path / "base").mkdir()
    data = tmp_path / "rows.jsonl"
    front, body = card(tmp_path, base_model=str(tmp_path / "base"), dataset=str(data), command="jaxpost sft")
    assert "base_model" not in front and "datasets" not in front
    assert "`base`, trained on `rows.jsonl`" in body
    assert str(tmp_path) not in body


@pytest.mark.parametrize("name", ["./model", "model.gguf", "a/b/c"])
def test_card_local_spellings(tmp_path, name):
    assert "base_model" not in card(tmp_path, base_model=name)[0]


def test_card_of_an_adapter_with_curves(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    (tmp_path / "curves.png").write_bytes(b"")
    front, body = card(tmp_path)
    assert front["tags"] == ["jaxpost", "sft", "lora"]
    assert "A PEFT adapter for" in body and "(curves.png)" in body


def test_card_hides_secrets(tmp_path):
    config = {"hub_token": "hf_SECRET", "eos_token": "<end>", "path": tmp_path}
    _, body = card(
        tmp_path, config=config, command="jaxpost sft --hub_token hf_SECRET --hub-token=hf_SECRET --eos_token <end>"
    )
    assert "SECRET" not in body
    assert "--hub_token *** --hub-token=*** --eos_token <end>" in body and "eos_token: <end>" in body


def test_card_without_metrics_has_no_table(tmp_path):
    assert "Results" not in card(tmp_path, metrics={})[1]
