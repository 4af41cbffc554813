"""`jaxpost evaluate` of completions: their rewards, and the win rate that a reward model gives."""

import json

import numpy as np
import pytest

from jaxpost import from_pretrained, save_pretrained, score
from jaxpost.cli import main, parse
from jaxpost.evaluation import EvaluateConfig
from jaxpost.metrics import normal_interval, wilson_interval
from jaxpost.reward_model import reward_model
from jaxpost.rewarded import run_rewarded, summary
from jaxpost.rl.rewards import Scored
from jaxpost.win_rate import run_win_rate
from tests.conftest import make_noisy_model, make_tokenizer
from tests.e2e.test_preference import jsonl

REWARDS = """
def even(prompts, completions, completion_ids, answer, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer)
    return [float(len(text_of(c)) % 2 == 0) for c in completions]

def text_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]

def length(completions, **kwargs):
    return [None if prompt == "b" else len(text_of(c)) / 2 for c, prompt in zip(completions, kwargs["prompts"])]

def picky(completions, answer, **kwargs):
    if "3" in answer:
        raise ValueError("not 3")
    return [1.0] * len(completions)
"""
PROMPTS = [{"prompt": text, "answer": str(i)} for i, text in enumerate("abcdefg")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two models, a judge, prompts and reward functions."""
    home = tmp_path_factory.mktemp("home")
    for name, seed in (("ours", 4), ("theirs", 5)):
        ends = {"eos_token_id": 1}
        save_pretrained(make_noisy_model(seed), make_tokenizer(), home / name, generation_config=ends)
    save_pretrained(make_noisy_model(3, head="reward"), make_tokenizer(), home / "judge")
    jsonl(home / "prompts.jsonl", PROMPTS)
    (home / "rewards.py").write_text(REWARDS)
    return home


def config(home, flags):
    flags = flags.replace("@", f"{home}/")
    shared = f"--model_name_or_path {home / 'ours'} --dataset_name {home / 'prompts.jsonl'} --max_new_tokens 8"
    return parse(EvaluateConfig, "evaluate", f"{shared} --batch_size 2 {flags}".split())


def evaluated(home, flags):
    flags = flags.replace("@", f"{home}/")
    shared = f"evaluate --model_name_or_path {home / 'ours'} --dataset_name {home / 'prompts.jsonl'}"
    return main(f"{shared} --max_new_tokens 8 {flags}".split())


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rewards_of_completions_and_what_they_sum_up_to(home, tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    functions = "--reward_funcs @rewards.py:even @rewards.py:length --temperature 1"
    metrics = run_rewarded(config(home, f"{functions} --num_return_sequences 3 --output_file {out}"))
    rows = lines(out)
    assert [(row["prompt"], row["answer"]) for row in rows] == [
        (row["prompt"], row["answer"]) for row in PROMPTS for _ in range(3)
    ]
    even = np.array([row["rewards"]["even"] for row in rows]).reshape(-1, 3)
    assert even.ravel().tolist() == [float(len(row["completion"]) % 2 == 0) for row in rows]
    assert 0 < even.mean() < 1
    assert metrics["even"] == pytest.approx(even.mean())
    assert metrics["even/pass@3"] == pytest.approx(even.any(axis=1).mean())
    halves = [len(row["completion"]) / 2 for row in rows if row["prompt"] != "b"]
    assert metrics["length"] == pytest.approx(np.mean(halves)) and "length/pass@3" not in metrics
    assert [row["rewards"]["length"] for row in rows[3:6]] == [None] * 3
    err = capsys.readouterr().err
    assert "length: no reward for 3 of 21 completions\n" in err
    assert "even pass@3" in err and "of 7 prompts)" in err and "length " in err and "6 prompts)" in err
    assert f"{sum(not row['ended'] for row in rows)} of 21 cut after 8" in err


def test_greedy_is_the_default_and_shares_have_wilsons_interval(home, tmp_path, capsys):
    flags = f"--reward_funcs @rewards.py:even numeric_answer --output_file {tmp_path / 'rows.jsonl'}"
    assert evaluated(home, flags) == 0
    rows = lines(tmp_path / "rows.jsonl")
    right = int(sum(row["rewards"]["even"] for row in rows))
    low, high = wilson_interval(right, 7)
    assert f"even {right / 7:.3f} (95 % interval {low:.3f} to {high:.3f}, {right} of 7" in capsys.readouterr().err
    assert {row["rewards"]["numeric_answer"] for row in rows} <= {0.0, 1.0}
    flags = f"generate --model_name_or_path {home / 'ours'} --dataset_name {home / 'prompts.jsonl'} --temperature 0"
    assert main(f"{flags} --max_new_tokens 8 --output_file {tmp_path / 'said.jsonl'}".split()) == 0
    assert [row["completion"] for row in lines(tmp_path / "said.jsonl")] == [row["completion"] for row in rows]


def test_a_function_that_fails_is_counted_or_ends_the_evaluation(home, tmp_path, capsys):
    flags = f"--reward_funcs @rewards.py:picky --output_file {tmp_path / 'rows.jsonl'}"
    assert evaluated(home, flags) == 0
    assert "no reward for 1 of 7 completions, 1 of them since it fails: ValueError: not 3" in capsys.readouterr().err
    assert evaluated(home, f"{flags}2 --max_reward_failures 0") == 3
    assert "picky fails for 1 of 7 completions; for row 4" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_messages_reach_functions_and_the_judge_as_messages(home, tmp_path):
    data = jsonl(tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": "q"}], "answer": "1"}] * 2)
    shared = f"--dataset_name {data} --output_file {tmp_path / 'rows.jsonl'}"
    assert evaluated(home, f"{shared} --reward_funcs @rewards.py:even") == 0
    assert len(lines(tmp_path / "rows.jsonl")) == 2
    assert evaluated(home, f"{shared} --judge @judge --against @theirs") == 0
    row = lines(tmp_path / "rows.jsonl")[0]
    judge, said = from_pretrained(home / "judge", head="reward"), [{"role": "assistant", "content": row["completion"]}]
    alone = score(judge, make_tokenizer(), [{"prompt": [{"role": "user", "content": "q"}], "completion": said}])
    assert row["score"] == pytest.approx(float(alone[0]), rel=1e-4)


def test_the_win_rate_is_the_share_of_prompts_with_the_higher_score(home, tmp_path, capsys):
    flags = f"--judge @judge --temperature 1 --output_file {tmp_path / 'rows.jsonl'}"
    metrics = run_win_rate(config(home, f"{flags} --against @theirs"))
    rows = lines(tmp_path / "rows.jsonl")
    judge = from_pretrained(home / "judge", head="reward")
    for name, value in (("completion", "score"), ("against", "against_score")):
        texts = [{"prompt": row["prompt"], "completion": row[name]} for row in rows]
        scores = score(judge, make_tokenizer(), texts)
        np.testing.assert_allclose([row[value] for row in rows], scores, rtol=1e-4, atol=1e-6)
    wins = [float(row["score"] > row["against_score"]) for row in rows]
    assert [row["win"] for row in rows] == wins and metrics["win_rate"] == pytest.approx(np.mean(wins))
    low, high = wilson_interval(sum(wins), 7)
    err = capsys.readouterr().err
    assert f"win rate {np.mean(wins):.3f} (95 % interval {low:.3f} to {high:.3f}, {sum(wins):g} of 7 prompts)" in err
    # The other way round, by a file of what the first one has said.
    said = jsonl(tmp_path / "said.jsonl", [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    again = config(home, f"{flags} --against_file {said} --model_name_or_path @theirs")
    assert run_win_rate(again)["win_rate"] == pytest.approx(1 - metrics["win_rate"])


def test_a_judge_scores_a_completion_that_ended_at_once(home):
    scores = reward_model(str(home / "judge"), "judge", dtype="float32", batch_size=2)
    judge, tokenizer = from_pretrained(home / "judge", head="reward"), make_tokenizer()

    def alone(text):
        return float(judge(np.array([tokenizer(text, add_special_tokens=False)["input_ids"]]))[0, -1])

    expected = [alone(f"q{text}<|im_end|>") for text in ("", "a")]
    np.testing.assert_allclose(scores(["q", "q"], ["", "a"]), expected, rtol=1e-4)
    chats = [[{"role": "user", "content": "q"}]] * 2
    said = [[{"role": "assistant", "content": text}] for text in ("", "a")]
    texts = [tokenizer.apply_chat_template([*chats[0], *answer], tokenize=False) for answer in said]
    np.testing.assert_allclose(scores(chats, said), [alone(text) for text in texts], rtol=1e-4)


def test_a_model_against_itself_ties(home, tmp_path, capsys):
    assert evaluated(home, f"--judge @judge --against @ours --output_file {tmp_path / 'rows.jsonl'}") == 0
    assert "win rate 0.500" in capsys.readouterr().err
    assert {row["win"] for row in lines(tmp_path / "rows.jsonl")} == {0.5}


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--reward_funcs nothing", 2, "reward_funcs: no function 'nothing'"),
        ("--reward_funcs @none.py:even", 2, "there is no file"),
        ("--reward_funcs exact_answer --num_return_sequences 2", 2, "give --temperature"),
        ("--reward_funcs exact_answer --judge @judge", 2, "different evaluations; give one of them"),
        ("--reward_funcs exact_answer --max_new_tokens 256", 2, "the model reads 256 tokens"),
        ("--reward_funcs exact_answer --dataset_name @long.jsonl", 3, "lower --max_new_tokens"),
        (
            "--reward_funcs exact_answer --against @theirs",
            2,
            "--against has no effect with --reward_funcs; it goes with",
        ),
        ("--temperature 1", 2, "--max_new_tokens has no effect alone; it goes with --judge or --reward_funcs"),
        ("--judge @judge", 2, "either --against MODEL or --against_file FILE"),
        ("--judge @judge --against @theirs --against_file x", 2, "either --against MODEL or --against_file FILE"),
        ("--judge @theirs --against @theirs", 2, "theirs has no trained reward head"),
        ("--judge @judge --against @nowhere", 2, "neither a local folder"),
        ("--judge @judge --against_file @prompts.jsonl", 3, "no column 'completion'"),
        ("--judge @judge --against_file @rows.jsonl", 3, "2 completions for 7 prompts"),
        ("--judge @judge --against @theirs --num_return_sequences 2", 2, "has no effect with --judge"),
        ("--judge @judge --against @theirs --dataset_name @rows.jsonl", 3, "as the judge reads it"),
        ("--tasks a --judge @judge", 2, "--tasks and --judge"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(home, tmp_path, capsys, flags, code, message):
    jsonl(home / "rows.jsonl", [{"completion": "x", "prompt": 3}] * 2)
    jsonl(home / "long.jsonl", [{"prompt": "x" * 249, "answer": "y"}])
    out = tmp_path / "out.jsonl"
    assert evaluated(home, f"{flags} --output_file {out}") == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not out.exists()


def test_completions_of_other_prompts_are_refused(home, tmp_path, capsys):
    rows = [{"prompt": row["prompt"], "completion": "x"} for row in PROMPTS]
    rows[2]["prompt"] = "z"
    said = jsonl(tmp_path / "said.jsonl", rows)
    assert evaluated(home, f"--judge @judge --against_file {said}") == 3
    assert "row 3 completes another prompt" in capsys.readouterr().err


def scored(rewards, failed=None):
    rewards = np.array(rewards, np.float32)
    failed = np.zeros(rewards.shape, bool) if failed is None else np.array(failed)
    return Scored(rewards, failed, {}, {}, ["broke" if failed.any() else ""] * rewards.shape[1])


def test_sums_are_of_prompts():
    nan = np.nan
    metrics, said = summary(scored([[1], [0], [0], [0], [1], [nan]]), ["right"], 2)
    assert metrics == {"right": 0.5, "right/pass@2": pytest.approx(2 / 3)}
    low, high = normal_interval([0.5, 0.0, 1.0])
    assert f"(95 % interval {low:.4g} to {high:.4g}, 3 prompts)" in said[1]
    metrics, said = summary(scored([[0.5], [2.5], [nan]], [[False], [False], [True]]), ["size"], 1)
    assert metrics == {"size": 1.5}
    assert said[0] == "size: no reward for 1 of 3 completions, 1 of them since it fails: broke"
    assert summary(scored([[nan]], [[True]]), ["none"], 1)[0] == {}
    assert summary(scored([[3.0]]), ["one"], 1)[1] == ["one 3 (one of the prompts alone)"]


def test_the_interval_of_a_mean():
    np.testing.assert_allclose(normal_interval([1.0, 2.0, 3.0, 4.0]), (1.23484, 3.76516), atol=1e-5)
