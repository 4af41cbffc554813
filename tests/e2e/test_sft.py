"""`jaxpost sft` from a folder and a file to a folder, as a user runs it."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpost
from jaxpost.cli import main
from jaxpost.data.word_problems import write
from tests.marks import slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder, num_rows=60, seed=0)
    return folder


def sft(model, data, output_dir, *flags):
    base = f"sft --model_name_or_path {model} --dataset_name {data} --output_dir {output_dir} --report_to none"
    shared = "--per_device_train_batch_size 1 --max_length 512 --learning_rate 1e-3 --logging_steps 1"
    return main([*base.split(), *shared.split(), *flags])


def rows(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def run(tiny_folder, data, tmp_path_factory):
    """Ten steps with evaluation and checkpoints."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = "--max_steps 10 --save_steps 4 --eval_strategy steps --eval_steps 5 --eval_on_start true"
    assert sft(tiny_folder, data, out, *flags.split()) == 0
    return out


def test_the_folder_holds_what_the_readme_says(run):
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert names >= {"generation_config.json", "checkpoints", "metrics.jsonl", "config.yaml", "curves.png"}


def test_optimizer_state_in_the_hosts_memory_changes_nothing(run, tiny_folder, data, tmp_path):
    out, flags = tmp_path / "out", ["--max_steps", "10", "--save_steps", "4"]
    assert sft(tiny_folder, data, out, *flags, "--offload_optimizer") == 0
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(run) if "loss" in row]
    assert sft(tiny_folder, data, out, *flags, "--resume_from_checkpoint", "4") == 0  # to where it is elsewhere
    for name, weight in weights(run).items():
        np.testing.assert_array_equal(weight, weights(out)[name])


def test_metrics_have_trls_names(run):
    logged = rows(run)
    train = [row for row in logged if "loss" in row]
    held_out = [row for row in logged if "eval_loss" in row]
    assert [row["step"] for row in train] == list(range(1, 11))
    assert [row["step"] for row in held_out] == [0, 5, 10]
    assert train[0].keys() >= {"epoch", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens"}
    assert train[-1]["loss"] < train[0]["loss"]
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"]


def test_the_result_loads_and_differs_from_the_start(run, tiny_folder):
    model = jaxpost.from_pretrained(run)
    assert model(np.zeros((1, 3), np.int32)).shape == (1, 3, 320)
    start, end = weights(tiny_folder), weights(run)
    assert start.keys() == end.keys()
    assert any(not np.array_equal(start[name], end[name]) for name in start)


def test_resumed_equals_uninterrupted_bit_for_bit(run, tiny_folder, data, tmp_path):
    out = tmp_path / "out"
    # The schedule is that of ten steps in both runs; the first one ends where its last checkpoint is.
    flags = ["--save_steps", "4", "--eval_strategy", "steps", "--eval_steps", "5", "--eval_on_start", "true"]
    assert sft(tiny_folder, data, out, "--max_steps", "10", *flags) == 0
    for step in (8, 10):
        (out / "checkpoints" / str(step)).rename(tmp_path / f"later-{step}")
    assert sft(tiny_folder, data, out, "--max_steps", "10", "--resume_from_checkpoint", "true", *flags) == 0
    assert all(np.array_equal(value, weights(out)[name]) for name, value in weights(run).items())
    timeless = [
        {name: value for name, value in row.items() if not name.endswith(("_time", "_per_second", "_share"))}
        for row in rows(out)
    ]
    assert [row["step"] for row in timeless] == [row["step"] for row in rows(run)]
    for row, expected in zip(timeless, rows(run), strict=True):
        assert row == {name: expected[name] for name in row}


def test_one_compilation_for_the_whole_run(tiny_folder, data, tmp_path):
    compiled = []

    def listen(event, duration, **facts):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            compiled.append(facts.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    flags = "--max_steps 12 --save_strategy no --compilation_cache_dir"
    try:
        assert sft(tiny_folder, data, tmp_path / "out", *flags.split(), "") == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert sum(name == "jit(step)" or name == "step" for name in compiled) == 1, compiled


def test_a_second_run_does_not_overwrite_the_first(run, tiny_folder, data, capsys):
    before = weights(run)
    assert sft(tiny_folder, data, run, "--max_steps", "12") == 2
    assert "steps of the learning-rate schedule was 10, is 12" in capsys.readouterr().err
    assert all(np.array_equal(value, weights(run)[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "flags",
    [
        slow("--mesh fsdp=2,tensor=4 --gradient_accumulation_steps 4"),
        slow("--mesh fsdp=4,tensor=2 --gradient_accumulation_steps 2 --padding_free false"),
        "--mesh data=2,tensor=4 --per_device_train_batch_size 4 --length_buckets 3",
    ],
)
def test_layout_changes_no_loss(run, tiny_folder, data, tmp_path, flags):
    schedule = "--lr_scheduler_type constant --max_steps 3 --save_strategy no"
    assert sft(tiny_folder, data, tmp_path / "out", *schedule.split(), *flags.split()) == 0
    assert sft(tiny_folder, data, tmp_path / "plain", *schedule.split()) == 0
    for row, expected in zip(rows(tmp_path / "out"), rows(tmp_path / "plain"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert row["num_tokens"] == expected["num_tokens"]


def test_evaluation_by_epoch(tiny_folder, data, tmp_path):
    flags = "--num_train_epochs 2 --eval_strategy epoch --save_strategy epoch --save_total_limit 1"
    assert sft(tiny_folder, data, tmp_path / "out", *flags.split()) == 0
    epochs = [row["epoch"] for row in rows(tmp_path / "out") if "eval_loss" in row]
    assert epochs == [1.0, 2.0]
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["14"]


def test_generate_writes_one_object_a_row_in_order(run, data, tmp_path):
    out = tmp_path / "out.jsonl"
    command = f"generate --model_name_or_path {run} --dataset_name {data} --dataset_split test --output_file {out}"
    assert main([*command.split(), "--max_new_tokens", "8", "--temperature", "0.7", "--batch_size", "4"]) == 0
    prompts = [json.loads(line)["prompt"] for line in (data / "test.jsonl").read_text().splitlines()]
    completions = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in completions] == prompts
    assert all(len(row["completion_ids"]) == len(row["logprobs"]) <= 8 for row in completions)


def test_python_face(tiny_folder, tmp_path):
    from jaxpost import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=1, report_to=["none"])
    texts = [{"text": f"the number {n}"} for n in range(8)]
    trainer = SFTTrainer(model=str(tiny_folder), args=args, train_dataset=texts, eval_dataset=texts[:3])
    metrics = trainer.train()
    assert metrics["step"] == 2
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(tmp_path / "elsewhere")
    assert all(np.array_equal(a, weights(tmp_path / "out")[n]) for n, a in weights(tmp_path / "elsewhere").items())


def test_generate_gives_the_cells_of_a_row_to_its_template(run, tmp_path, capsys):
    model = shutil.copytree(run, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoints", "runs"))
    template = model / "chat_template.jinja"
    template.write_text("{{ mood }}" + template.read_text())
    prompts = tmp_path / "prompts.jsonl"

    def complete(*moods):
        rows = [{"prompt": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": mood} for mood in moods]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = f"generate --model_name_or_path {model} --dataset_name {prompts} --max_new_tokens 4 --temperature 0"
        return main(flags.split()), capsys.readouterr()

    code, shown = complete({"mood": "sad " * 9}, {"mood": "glad " * 9}, None)
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert code == 0 and len({tuple(line["logprobs"]) for line in lines}) == 3
    code, shown = complete([1])
    assert code == 3 and "row 1, column 'chat_template_kwargs' must be an object" in shown.err
