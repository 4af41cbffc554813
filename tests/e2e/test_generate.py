"""`jaxpost generate`: several completions, stop strings, going on after a stop, mistakes."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from jaxpost import SFTConfig, SFTTrainer, completer, from_pretrained, generate
from jaxpost.cli import main
from jaxpost.errors import ConfigError
from jaxpost.rl.stopping import stopper
from tests.conftest import make_tokenizer

PROMPTS = ["a", "bc", "def", "ghij", "k"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def run(model, prompts, output_file, flags=""):
    base = f"generate --model_name_or_path {model} --dataset_name {prompts} --output_file {output_file}"
    shared = "--max_new_tokens 12 --batch_size 2 --num_return_sequences 2"
    return main(f"{base} {shared} {flags}".split())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tiny_folder, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert run(tiny_folder, prompts, out) == 0
    return lines(out)


def test_completions_of_a_prompt_follow_each_other(whole):
    assert [row["prompt"] for row in whole] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert all(len(row["completion_ids"]) == len(row["logprobs"]) for row in whole)
    assert len({tuple(row["completion_ids"]) for row in whole}) == len(whole)


def test_python_says_the_same(tiny_folder, whole):
    model, tokenizer = from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    said = generate(model, tokenizer, PROMPTS, max_new_tokens=12, num_return_sequences=2)
    assert said == [row["completion"] for row in whole]
    [answer] = generate(model, tokenizer, [[{"role": "user", "content": "a"}]], max_new_tokens=3, temperature=0.0)
    assert isinstance(answer, str) and answer != said[0]


def test_a_trainers_model_answers_as_what_it_wrote(tiny_folder, tmp_path):
    rows = [{"prompt": "a", "completion": "bc"}] * 8
    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1, report_to=["none"])
    trainer = SFTTrainer(str(tiny_folder), args=args, train_dataset=rows)
    trainer.train()
    options = {"max_new_tokens": 4, "temperature": 0.0}
    said = generate(trainer.model, trainer.processing_class, PROMPTS, **options)
    assert said == generate(from_pretrained(tmp_path), trainer.processing_class, PROMPTS, **options)


def test_compiled_programs_are_kept_for_the_next_time(tiny_folder, prompts, tmp_path):
    command = f"generate --model_name_or_path {tiny_folder} --dataset_name {prompts} --max_new_tokens 2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    flags = ["--compilation_cache_dir", str(tmp_path / "xla")]
    subprocess.run([sys.executable, "-m", "jaxpost", *command.split(), *flags], env=environment, check=True)
    assert any((tmp_path / "xla").iterdir())


def test_a_stopped_run_goes_on_and_gives_the_same(tiny_folder, prompts, whole, tmp_path, monkeypatch):
    real, asked = completer.generate, []

    def stops(model, prompts, **options):
        asked.append(options["first_request"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(model, prompts, **options)

    monkeypatch.setattr(completer, "generate", stops)
    out = tmp_path / "out.jsonl"
    assert run(tiny_folder, prompts, out) == 130
    assert not out.exists()
    [kept] = tmp_path.iterdir()
    kept.write_text(kept.read_text() + '{"prompt": "half a li')
    assert run(tiny_folder, prompts, out) == 0
    assert asked == [0, 8, 8]
    assert lines(out) == whole
    assert list(tmp_path.iterdir()) == [out]


def test_other_flags_begin_anew(tiny_folder, prompts, whole, tmp_path):
    assert run(tiny_folder, prompts, tmp_path / "out.jsonl", "--seed 1") == 0
    assert [row["completion_ids"] for row in lines(tmp_path / "out.jsonl")] != [row["completion_ids"] for row in whole]


def test_a_stop_string_ends_a_completion(tiny_folder, prompts, whole, tmp_path):
    letters = (letter for row in whole for letter in row["completion"][2:])
    text = next(letter for letter in letters if letter.isascii() and letter.isalnum())
    assert run(tiny_folder, prompts, tmp_path / "out.jsonl", f"--stop_strings {text}") == 0
    for cut, free in zip(lines(tmp_path / "out.jsonl"), whole, strict=True):
        end = free["completion"].find(text)
        assert cut["completion"] == (free["completion"][: end + 1] if end >= 0 else free["completion"])


def test_a_completion_stops_with_the_token_that_completes_the_text():
    tokenizer = make_tokenizer()
    tokens = tokenizer.encode("one two three", add_special_tokens=False)
    kept = stopper(tokenizer, ["two"])(tokens)
    assert "two" in tokenizer.decode(tokens[:kept]) and "two" not in tokenizer.decode(tokens[: kept - 1])
    assert stopper(tokenizer, ["four"])(tokens) is None
    assert stopper(tokenizer, []) is None
    with pytest.raises(ConfigError, match="stop_strings has an empty text"):
        stopper(tokenizer, [""])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_return_sequences 0", "num_return_sequences is 0; it must be at least 1"),
        ("--top_p 0", "top_p is 0.0; it must be above 0 and at most 1"),
        ("--temperature -1", "temperature is -1.0; it must be at least 0"),
        ("--output_file /proc/none/out.jsonl", "/proc/none/out.jsonl cannot be written"),
    ],
)
def test_mistakes_are_named(tiny_folder, prompts, tmp_path, capsys, flags, message):
    assert run(tiny_folder, prompts, tmp_path / "out.jsonl", flags) == 2
    assert message in capsys.readouterr().err
