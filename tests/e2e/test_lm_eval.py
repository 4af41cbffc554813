"""lm-evaluation-harness's questions answered, by a stand-in of its requests; and by the harness where it is there."""

import importlib.util
import json
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxpost import from_pretrained, lm_eval, save_pretrained
from jaxpost.cli import main
from jaxpost.errors import ConfigError, DataError
from jaxpost.lm_eval import JaxpostLM, asked_for
from tests.conftest import make_noisy_model, make_tokenizer

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
PAIRS = [("a context", " and more"), ("", "without"), ("spaces  ", "here"), ("x", "y" * 40), ("x" * 300, "end")]


class Request(NamedTuple):
    """As the harness's Instance."""

    args: tuple


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked") / "model"
    save_pretrained(make_noisy_model(4), make_tokenizer(), folder, generation_config={"eos_token_id": 1})
    return folder


@pytest.fixture(scope="module")
def asked(folder):
    return JaxpostLM(str(folder), batch_size=2)


@pytest.fixture(scope="module")
def logps(folder):
    """Log-probabilities [T, V] after each token, by a plain forward pass."""
    model = from_pretrained(folder)
    return lambda ids: np.asarray(jax.nn.log_softmax(model(np.array([ids]))[0]))


def ids_of(text):
    return make_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_continuations_have_the_log_probabilities_of_a_forward_pass(asked, logps):
    found = asked.loglikelihood([Request(pair) for pair in PAIRS])
    greedy = []
    for (context, continuation), (logp, is_greedy) in zip(PAIRS, found, strict=True):
        spaces = len(context) - len(context.rstrip())  # which belong to the continuation
        context, continuation = context.rstrip(), " " * spaces + continuation
        before = ids_of(context) if context else [0]
        whole = (before + ids_of(continuation))[-257:]
        scores = logps(whole[:-1])[-len(ids_of(continuation)) :]
        targets = whole[-len(scores) :]
        assert logp == pytest.approx(float(scores[np.arange(len(targets)), targets].sum()), rel=1e-5)
        assert is_greedy == (scores.argmax(axis=1).tolist() == targets)
        greedy.append((context, scores.argmax(axis=1)[0]))
    # What the model would say itself is said to be so.
    context, token = greedy[0]
    text = make_tokenizer().decode([token])
    if ids_of(context + text) == [*ids_of(context), token]:
        assert asked.loglikelihood([Request((context, text))])[0][1]
    assert asked.loglikelihood([]) == []


def test_long_texts_are_read_in_windows_that_predict_every_token_once(asked, logps):
    text = "".join(chr(97 + i * 7 % 26) for i in range(600))
    ids, total = [0, *ids_of(text)], 0.0
    for begin in range(0, 600, 256):
        end = min(begin + 256, 600)
        scores = logps(ids[max(0, end - 256) : end])[begin - end :]
        total += float(scores[np.arange(end - begin), ids[begin + 1 : end + 1]].sum())
    whole, short = asked.loglikelihood_rolling([Request((text,)), Request(("ab",))])
    assert whole == pytest.approx(total, rel=1e-5)
    first = logps([0, *ids_of("a")])
    assert short == pytest.approx(float(first[0, ids_of("a")[0]] + first[1, ids_of("b")[0]]), rel=1e-5)


def test_windows_are_the_harnesses(asked, monkeypatch):
    monkeypatch.setattr(asked, "_room", 4)
    # The example of `LM.loglikelihood_rolling`.
    windows = [(*context, *continuation)[:-1] for context, continuation in asked._windows(list(range(10)))]
    predicted = [continuation for _, continuation in asked._windows(list(range(10)))]
    assert windows == [(0, 0, 1, 2), (3, 4, 5, 6), (5, 6, 7, 8)]
    assert predicted == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_completions_end_before_the_text_that_ends_them(asked):
    def said(context, **more):
        kwargs = {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0, **more}
        return JaxpostLM(asked.completer, batch_size=2).generate_until([Request((context, kwargs))])[0]

    free = said("ab")
    end = next(letter for i, letter in enumerate(free) if i > 2 and letter.isascii() and letter not in free[:i])
    assert said("ab", until=[end]) == said("ab", until=["", end]) == free.split(end)[0] != free
    # In one call: others with other kwargs between, each in its place, and one that is longer than there is room for.
    greedy = {"max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    mixed = [("ab", greedy), ("c" * 400, greedy), ("ab", {**greedy, "max_gen_toks": 2}), ("ab", greedy)]
    one, long, short, again = asked.generate_until([Request(args) for args in mixed])
    assert one == again != long and one.startswith(short) and len(short) < len(one)
    drawn = {**greedy, "do_sample": True, "temperature": 2.0}
    first, second = asked.generate_until([Request(("ab", drawn))] * 2)
    assert first != second


def test_what_tasks_ask_for():
    config, until = asked_for(
        {"until": "\n", "max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "top_p": 0.9}, 3
    )
    assert (config.max_new_tokens, config.temperature, config.top_p, config.seed, until) == (7, 0.5, 0.9, 3, ["\n"])
    config, until = asked_for({"temperature": 0.5, "do_sample": False, "num_beams": 1, "until": ["", "x"]}, 0)
    assert (config.max_new_tokens, config.temperature, until) == (256, 0.0, ["x"])
    assert asked_for({"temperature": 0.5}, 0)[0].temperature == 0.5
    with pytest.raises(ConfigError, match="ask for beams"):
        asked_for({"num_beams": 4}, 0)
    with pytest.raises(ConfigError, match="ask for penalty_alpha"):
        asked_for({"penalty_alpha": 4}, 0)


def test_what_cannot_be_asked_is_named(asked):
    with pytest.raises(DataError, match="a continuation has 0 tokens"):
        asked.loglikelihood([Request(("x", ""))])
    with pytest.raises(DataError, match="a continuation has 300 tokens; the model reads 1 to 256"):
        asked.loglikelihood([Request(("x", "y" * 300))])
    with pytest.raises(ConfigError, match="asks for 256 tokens; the model reads 256 in all"):
        asked.generate_until([Request(("x", {}))])


def test_templates_are_the_tokenizers(asked):
    chat = [{"role": "user", "content": "q"}]
    assert asked.apply_chat_template(chat) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    opened = [*chat, {"role": "assistant", "content": "It is"}]
    assert asked.apply_chat_template(opened, add_generation_prompt=False).endswith("assistant\nIt is")
    assert asked.chat_template(True) == make_tokenizer().chat_template and asked.chat_template() == ""
    assert "/" not in asked.tokenizer_name


def evaluate(folder, flags):
    return main(f"evaluate --model_name_or_path {folder} {flags}".split())


def test_without_the_package_the_error_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    assert evaluate(folder, "--tasks gsm8k") == 2
    assert capsys.readouterr().err == ("jaxpost: --tasks needs lm-evaluation-harness: pip install 'jaxpost[lm-eval]'\n")
    for flags, message in (
        ("--tasks gsm8k --limit 0", "limit is 0"),
        ("--tasks gsm8k --num_fewshot -1", "num_fewshot is -1"),
        ("--tasks gsm8k --max_new_tokens 3", "--max_new_tokens has no effect with --tasks"),
        ("--limit 3 --dataset_name x.jsonl", "--limit has no effect alone; it goes with --tasks"),
    ):
        assert evaluate(folder, flags) == 2
        assert message in capsys.readouterr().err


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata:
  version: 1
"""
CHOICES = """output_type: multiple_choice
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list:
  - metric: acc
"""
WORDS = """output_type: generate_until
doc_to_target: answer
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def task_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    rows = [{"question": f"is {i} odd? ", "answer": ["no", "yes"][i % 2]} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in (("tiny_choices", CHOICES), ("tiny_words", WORDS)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    return folder


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_the_harness_asks_and_writes_its_results(folder, task_dir, tmp_path, capsys, logps):
    out = tmp_path / "results.json"
    shared = f"--task_dir {task_dir} --output_file {out}"
    assert evaluate(folder, f"--tasks tiny_choices tiny_words {shared}") == 0
    results = json.loads(out.read_text())["results"]
    right = 0
    for i in range(6):
        before, scores = ids_of(f"is {i} odd?"), []
        for ids in (ids_of(" yes"), ids_of(" no")):
            rows = logps([*before, *ids])[len(before) - 1 : -1]
            scores.append(rows[np.arange(len(ids)), ids].sum())
        right += (scores[0] > scores[1]) == (i % 2 == 1)
    assert results["tiny_choices"]["acc,none"] == pytest.approx(right / 6)
    assert results["tiny_words"]["exact_match,none"] == 0
    assert "tiny_choices" in capsys.readouterr().err
    assert evaluate(folder, f"--tasks tiny_choices {shared} --limit 2 --apply_chat_template") == 0


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_mistakes_about_tasks_are_one_line(folder, task_dir, tmp_path, capsys):
    shared = f"--task_dir {task_dir} --output_file {tmp_path / 'out.json'}"
    (task_dir / "broken.yaml").write_text(TASK.format(name="broken", data="/nowhere.jsonl") + CHOICES)
    for flags, code, message in (
        (f"--tasks tiny_choice {shared}", 2, "no task 'tiny_choice' (did you mean 'tiny_choices'?)"),
        (f"--tasks tiny_choices {shared} --task_dir /nowhere", 2, "there is no folder /nowhere"),
        (f"--tasks broken {shared}", 3, "tasks: they cannot be loaded"),
    ):
        assert evaluate(folder, flags) == code
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out.json").exists()
