import dataclasses
import json
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

from jaxpost.cli import COMMANDS, main, parse
from jaxpost.methods import SFTConfig, config_yaml


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one two three"}\n' * 4)
    return path


def refused(capsys, command, code):
    """Run a command that must fail; its message, which is one line."""
    assert main(command) == code
    error = capsys.readouterr().err
    assert error.startswith("jaxpost: ")
    assert error.count("\n") == 1
    return error


def sft(model, data, output_dir):
    return ["sft", "--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output_dir)]


def config(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_flags_and_yaml_are_spelled_alike(tmp_path):
    file = config(tmp_path, "learning_rate: 1e-5\nreport_to: [none]\ngradient_checkpointing: no\nmax_length: null\n")
    args = parse(SFTConfig, "sft", ["--config", file, "--max_steps", "3"])
    assert (args.learning_rate, args.report_to, args.gradient_checkpointing) == (1e-5, ["none"], False)
    assert (args.max_steps, args.max_length) == (3, None)


def test_null_takes_a_limit_away_and_the_last_word_wins(tmp_path):
    file = config(tmp_path, "max_length: ~\nsave_total_limit: 3\n")
    assert parse(SFTConfig, "sft", ["--config", file, "--save_total_limit", "none"]).save_total_limit is None
    assert parse(SFTConfig, "sft", ["--config", file]).max_length is None
    assert parse(SFTConfig, "sft", ["--config", file, "--max_length", "64"]).max_length == 64
    assert parse(SFTConfig, "sft", ["--report_to", "none"]).report_to == ["none"]


def test_the_resolved_config_reads_back(tmp_path):
    args = SFTConfig(learning_rate=3e-5, max_length=None, report_to=[], bf16=False, warmup_steps=0.1)
    assert parse(SFTConfig, "sft", ["--config", config(tmp_path, config_yaml(args))]) == args


def test_command_line_wins_over_yaml(tmp_path):
    file = config(tmp_path, "learning_rate: 1e-5\nmax_steps: -1\n")
    args = parse(SFTConfig, "sft", [f"--config={file}", "--learning_rate", "3e-4", "--bf16"])
    assert (args.learning_rate, args.max_steps, args.bf16) == (3e-4, -1, True)


BAD_FLAGS = {
    "--learning_rat 1": "did you mean '--learning_rate'",
    "--max_steps three": "invalid int value: 'three'",
    "--max_steps 0": "max_steps is 0",
    "--learning_rate -1": "learning_rate",
    "--lr_scheduler_type cosin": "did you mean 'cosine'",
    "--loss_type nl": "did you mean 'nll'",
    "--dtype float31": "dtype is 'float31'",
    "--mesh fsdp=3": "needs 3 devices",
    "--per_device_train_batch_size 0": "per_device_train_batch_size is 0",
    "--attn_implementation flesh": "attn_implementation is 'flesh'",
    "--config nowhere.yaml": "nowhere.yaml: No such file",
    "--resume_from_checkpoint true": "holds no checkpoint",
    "--model_name_or_path ./nowhere": "neither a local folder nor",
    "--eval_strategy steps": "has no split 'test'",
    "stray": "'stray' belongs to no flag",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_wrong_flag_is_one_line_and_exit_2_or_3(tiny_folder, data, tmp_path, capsys, flags):
    out = tmp_path / "out"
    code = 3 if "split" in BAD_FLAGS[flags] else 2
    assert BAD_FLAGS[flags] in refused(capsys, [*sft(tiny_folder, data, out), *flags.split()], code)
    assert not (out / "model.safetensors").exists()


BAD_YAML = {
    "learning_rate: 1\nlearning_rate: 2\n": "'learning_rate' is given twice",
    "lerning_rate: 1\n": "did you mean 'learning_rate'",
    "- 1\n": "expected a mapping",
    "a: [\n": "not valid YAML",
    "learning_rate: {a: 1}\n": "invalid float value",
    "max_steps: many\n": "invalid int value: 'many'",
}


@pytest.mark.parametrize("text", BAD_YAML)
def test_a_wrong_yaml_file_is_one_line_and_exit_2(tmp_path, capsys, text):
    assert BAD_YAML[text] in refused(capsys, ["sft", "--config", config(tmp_path, text)], 2)


BAD_DATA = {
    "": "is empty",
    '{"text": "a"}\n{"text": \n': "line 2",
    '{"words": "a"}\n': "has the columns words",
    '{"text": 3}\n': "row 1, column 'text'",
    '{"prompt": "a"}\n': "no column 'completion'",
}


@pytest.mark.parametrize("text", BAD_DATA)
def test_wrong_data_is_one_line_and_exit_3(tiny_folder, tmp_path, capsys, text):
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text(text)
    assert BAD_DATA[text] in refused(capsys, sft(tiny_folder, data, out), 3)
    assert not out.exists()


def test_a_tokenizer_larger_than_the_embedding_is_exit_2(tiny_folder, data, tmp_path, capsys):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    shift = {token: index + 200 for token, index in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["vocab"] = shift
    for token in tokenizer["added_tokens"]:
        token["id"] = shift[token["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "320 embedding rows" in refused(capsys, sft(folder, data, tmp_path / "out"), 2)


BAD_MODELS = {
    "architecture": "model_type 'mamba' is not supported",
    "pickle": "pickled weights can run code",
    "truncated": "not a valid safetensors file",
    "no_tokenizer": "the tokenizer cannot be read",
}


@pytest.mark.parametrize("fault", BAD_MODELS)
def test_a_wrong_model_folder_is_one_line_and_exit_2(tiny_folder, data, tmp_path, capsys, fault):
    folder, out = shutil.copytree(tiny_folder, tmp_path / "model"), tmp_path / "out"
    weights = folder / "model.safetensors"
    if fault == "architecture":
        fields = {**json.loads((folder / "config.json").read_text()), "model_type": "mamba"}
        (folder / "config.json").write_text(json.dumps(fields))
    elif fault == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    else:
        for file in folder.glob("tokenizer*"):
            file.unlink()
    assert BAD_MODELS[fault] in refused(capsys, sft(folder, data, out), 2)
    assert not out.exists()


def test_missing_essentials_and_unknown_commands(tiny_folder, capsys):
    assert main(["sft"]) == 2
    assert main(["sft", "--model_name_or_path", str(tiny_folder)]) == 2
    assert main(["sftt"]) == 2
    assert main(["generate", "--dataset_name", "x.jsonl"]) == 2
    lines = capsys.readouterr().err.splitlines()
    expected = ("--model_name_or_path", "--dataset_name", "did you mean 'sft'", "--model_name_or_path")
    assert all(word in line for word, line in zip(expected, lines, strict=True))


def test_the_usage_names_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert max(map(len, shown.splitlines())) <= shutil.get_terminal_size().columns


def test_the_usage_needs_no_imports():
    """It is what is called to see whether jaxpost is there."""
    code = "import sys; from jaxpost.cli import main; main([]); print({'jax', 'rich'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_version_is_said(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxpost {version('jaxpost')}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_lists_all_flags(name, capsys):
    words = COMMANDS[name].subcommands()[-1:]
    assert main([name, *words, "--help"]) == 0
    shown = capsys.readouterr().out
    for part in COMMANDS[name].opened(name, list(words)).parts:
        assert all(f"\n  --{field.name} " in shown for field in dataclasses.fields(part))


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_runs_is_there(name):
    words = COMMANDS[name].subcommands()[-1:]
    assert callable(COMMANDS[name].opened(name, list(words)).run)


def test_the_config_is_printed_and_nothing_runs(capsys):
    assert main(["sft", "--learning_rate", "1e-4", "--print_config"]) == 0
    assert "\nlearning_rate: 0.0001  # default: 2e-05\n" in capsys.readouterr().out
    assert "did you mean 'nll'" in refused(capsys, ["sft", "--print_config", "--loss_type", "nl"], 2)
    assert "unknown flag --print_confg" in refused(capsys, ["export", "--print_confg"], 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "it takes one of: bash, zsh, fish"),
        (["bsh"], "did you mean 'bash'"),
        (["bash", "-x"], "takes no more words; leave out '-x'"),
    ],
)
def test_completion_is_for_a_shell_that_is_known(words, message, capsys):
    assert message in refused(capsys, ["completion", *words], 2)


def test_a_reader_may_leave():
    command = f"{sys.executable} -m jaxpost completion bash | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("# Completion")
