"""Scores of a reward model, and the held-out metrics of trained models, by the command line and from Python."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxpost import from_pretrained, save_pretrained, score
from jaxpost.cli import main
from jaxpost.errors import ConfigError, DataError
from jaxpost.metrics import wilson_interval
from tests.conftest import make_noisy_model, make_tokenizer
from tests.e2e.test_preference import ADAPTER, PAIRS, jsonl, run
from tests.marks import slow

TEXTS = [
    {"text": "some text " * 3, "id": 7},
    {"text": "ä"},
    {"text": "a longer text, of another kind" * 4},
    {"text": "x"},
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "model"
    save_pretrained(make_noisy_model(3, head="reward"), make_tokenizer(), folder)
    return folder


def expected(judge, texts):
    """Scores of single texts by the model alone."""
    model, tokenizer = from_pretrained(judge, head="reward"), make_tokenizer()
    return [float(model(np.array([tokenizer(text)["input_ids"]]))[0, -1]) for text in texts]


def test_texts_are_scored_in_order_with_their_columns(judge, tmp_path, capsys):
    data, out = jsonl(tmp_path / "texts.jsonl", TEXTS), tmp_path / "new" / "scores.jsonl"
    words = f"evaluate --model_name_or_path {judge} --dataset_name {data} --output_file {out} --batch_size 1"
    assert main(words.split()) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in rows] == [row["text"] for row in TEXTS] and rows[0]["id"] == 7
    texts = [row["text"] + "<|im_end|>" for row in TEXTS]
    np.testing.assert_allclose([row["score"] for row in rows], expected(judge, texts), rtol=2e-5, atol=1e-6)
    assert "4 rows, mean score" in capsys.readouterr().err


def test_python_scores_pairs_as_training_reads_them(judge):
    model, tokenizer = from_pretrained(judge, head="reward"), make_tokenizer()
    scores = score(model, tokenizer, PAIRS, batch_size=5)
    assert scores.shape == (32, 2)
    texts = [row["prompt"] + row["rejected"] + "<|im_end|>" for row in PAIRS[:3]]
    np.testing.assert_allclose(scores[:3, 1], expected(judge, texts), rtol=2e-5, atol=1e-6)
    messages = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    assert score(model, tokenizer, messages).shape == (1,)
    short = score(model, tokenizer, TEXTS, max_length=3)
    np.testing.assert_allclose(short[0], expected(judge, [TEXTS[0]["text"][:3]])[0], rtol=2e-5)


def test_the_three_lines_of_the_readme_score_a_text(judge, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if " score(" in block]
    assert len([line for line in lines.splitlines() if line]) == 3 and judge.parent.name.startswith("judge")
    (judge.parent / "judge").symlink_to(judge)
    monkeypatch.chdir(judge.parent)
    space = {}
    exec(lines, space)
    np.testing.assert_allclose(space["scores"], expected(judge, ["Paris.<|im_end|>"]), rtol=2e-5, atol=1e-6)


def test_what_cannot_be_scored_is_named(judge, tiny_folder, tmp_path, capsys):
    data, out = jsonl(tmp_path / "texts.jsonl", [*TEXTS, {"text": ""}]), tmp_path / "scores.jsonl"
    command = ["evaluate", "--dataset_name", str(data), "--output_file", str(out), "--model_name_or_path"]
    assert main([*command, str(judge)]) == 3
    assert "row 5" in capsys.readouterr().err
    assert main([*command, str(tiny_folder)]) == 2
    assert "no trained reward head" in capsys.readouterr().err
    assert main(command[:3]) == 2
    assert "needs --model_name_or_path" in capsys.readouterr().err
    assert main([*command, str(judge), "--batch_size", "0"]) == 2
    assert "batch_size is 0" in capsys.readouterr().err
    other = jsonl(tmp_path / "other.jsonl", [{"question": "x"}])
    assert main([*command, str(judge), "--dataset_name", str(other)]) == 3
    assert not out.exists()
    jsonl(data, TEXTS)
    assert main([*command, str(tiny_folder), "--allow_untrained_head"]) == 0
    assert out.exists()
    with pytest.raises(ConfigError, match='head="reward"'):
        score(from_pretrained(tiny_folder), make_tokenizer(), TEXTS)
    with pytest.raises(DataError, match="row 1"):
        score(from_pretrained(judge, head="reward"), make_tokenizer(), [{"text": ""}, *TEXTS])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    jsonl(folder / "train.jsonl", PAIRS)
    jsonl(folder / "test.jsonl", PAIRS[3:14])
    return folder


def last_evaluation(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval_loss" in row][-1]


@pytest.mark.parametrize("method", ["dpo", "reward", slow("kto"), slow("bco"), slow("orpo")])
def test_evaluation_later_says_what_the_run_said(tiny_folder, data, tmp_path, capsys, method):
    out = tmp_path / "out"
    assert run(method, tiny_folder, data, out, f"{ADAPTER} --eval_strategy steps --eval_steps 4") == 0
    capsys.readouterr()
    command = f"evaluate {method} --model_name_or_path {out} --dataset_name {data} --output_dir {tmp_path / 'later'}"
    assert main(command.split()) == 0
    found = json.loads((tmp_path / "later" / "eval_results.json").read_text())
    logged = last_evaluation(out)
    of_the_run = ("eval_delta", "eval_loss") if method == "bco" else ()  # the shift is of the training rows
    for name in found.keys() - {*of_the_run}:
        np.testing.assert_allclose(found[name], logged[name], rtol=2e-5, atol=2e-6, err_msg=name)
    if method in ("kto", "bco"):  # whose batches hold one label each
        margin = found["eval_rewards/chosen"] - found["eval_rewards/rejected"]
        assert found["eval_rewards/margins"] == pytest.approx(margin, abs=1e-6) != 0
    printed = capsys.readouterr().out
    assert f"eval_loss {found['eval_loss']:.6g}" in printed
    if method in ("dpo", "reward"):
        assert "95 % interval" in printed and "11 pairs" in printed


def test_a_file_is_evaluated_as_a_whole_and_mistakes_are_one_line(judge, tiny_folder, data, tmp_path, capsys):
    test = data / "test.jsonl"
    assert main(f"evaluate reward --model_name_or_path {judge} --dataset_name {test}".split()) == 0
    assert "11 pairs" in capsys.readouterr().out
    assert main(f"evaluate dpo --model_name_or_path {tiny_folder} --dataset_name {test}".split()) == 2
    assert "--ref_model_name_or_path" in capsys.readouterr().err
    assert main(f"evaluate reward --model_name_or_path {tiny_folder} --dataset_name {test}".split()) == 2
    assert "no trained reward head" in capsys.readouterr().err
    assert main(f"evaluate dpo --model_name_or_path {tiny_folder} --dataset_name {test} --use_peft".split()) == 2
    assert "use_peft" in capsys.readouterr().err
    assert main(f"evaluate dpo --model_name_or_path {tiny_folder}".split()) == 2
    assert "--dataset_name" in capsys.readouterr().err


def test_intervals_are_wilsons():
    np.testing.assert_allclose(wilson_interval(45, 50), (0.7864, 0.9565), atol=1e-4)
    low, high = wilson_interval(50, 50)
    assert 0.92 < low < 0.93 and high == pytest.approx(1)
