"""Adapters by the command line and in Python: trained, resumed, continued, merged, on dense and quantised bases."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxpost import SFTConfig, SFTTrainer, from_pretrained
from jaxpost.cli import main
from jaxpost.data.word_problems import write
from jaxpost.models.adapters import without_adapters
from tests.marks import slow

ADAPTER = "--use_peft --lora_r 4 --lora_dropout 0.1 --lora_target_modules all-linear"
TOKENS = np.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder, num_rows=40, seed=0)
    return folder


def sft(model, data, output_dir, flags):
    base = f"sft --model_name_or_path {model} --dataset_name {data} --output_dir {output_dir} --report_to none"
    shared = "--per_device_train_batch_size 1 --max_length 512 --learning_rate 1e-2 --logging_steps 1 --max_steps 4"
    return main([*base.split(), *shared.split(), "--save_steps", "2", *flags.split()])


def rows(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture(scope="module")
def run(tiny_folder, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert sft(tiny_folder, data, out, ADAPTER) == 0
    return out


def test_the_folder_holds_an_adapter_and_no_model(run, tiny_folder):
    names = {path.name for path in run.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"}
    assert not names & {"model.safetensors", "config.json"}
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_dropout"] == 0.1 and config["base_model_name_or_path"] == str(tiny_folder)
    logged = rows(run)
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert any(np.any(tensor) for name, tensor in adapter(run).items() if "lora_B" in name)


def test_it_is_read_back_merged_and_switched_off(run, tiny_folder, tmp_path):
    base, tuned = from_pretrained(tiny_folder), from_pretrained(run)
    assert np.array_equal(without_adapters(tuned)(TOKENS), base(TOKENS))
    assert not np.allclose(tuned(TOKENS), base(TOKENS), atol=1e-2)
    assert main(["export", "--model_name_or_path", str(run), "--output_dir", str(tmp_path / "merged")]) == 0
    np.testing.assert_allclose(from_pretrained(tmp_path / "merged")(TOKENS), tuned(TOKENS), atol=1e-5)
    flags = ["--output_dir", str(tmp_path / "again"), "--merge_adapter", "false"]
    assert main(["export", "--model_name_or_path", str(run), *flags]) == 0
    assert_same(adapter(tmp_path / "again"), adapter(run))


def test_generate_uses_the_adapter(run, tiny_folder, data, tmp_path):
    def completions(model):
        out = tmp_path / "out.jsonl"
        flags = f"--dataset_name {data} --dataset_split test --output_file {out} --max_new_tokens 4 --temperature 0"
        assert main(["generate", "--model_name_or_path", str(model), *flags.split()]) == 0
        return [json.loads(line)["logprobs"] for line in out.read_text().splitlines()]

    assert completions(run) != completions(tiny_folder)


def test_resumed_equals_uninterrupted_bit_for_bit_with_dropout(run, tiny_folder, data, tmp_path):
    out = shutil.copytree(run, tmp_path / "out")
    shutil.rmtree(out / "checkpoints" / "4")
    assert sft(tiny_folder, data, out, f"{ADAPTER} --resume_from_checkpoint true") == 0
    assert_same(adapter(out), adapter(run))


def test_dropout_follows_the_seed(run, tiny_folder, data, tmp_path):
    # The order of the rows and the first adapter are the same, so that only the dropout differs.
    assert sft(tiny_folder, data, tmp_path / "none", ADAPTER.replace("0.1", "0.0")) == 0
    assert rows(tmp_path / "none")[0]["loss"] == rows(run)[0]["loss"]  # B is 0
    assert rows(tmp_path / "none")[2]["loss"] != rows(run)[2]["loss"]


def test_the_first_step_is_the_base_and_the_base_does_not_change(tiny_folder, data, tmp_path):
    options = {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "report_to": ["none"], "max_length": 512}
    shared = {"dataset_name": str(data), "train_sampling_strategy": "sequential", "per_device_train_batch_size": 1}

    def trainer(name, **changes):
        args = SFTConfig(output_dir=str(tmp_path / name), **options, **shared, **changes)
        return SFTTrainer(str(tiny_folder), args)

    tuned = trainer("lora", use_peft=True, lora_dropout=0.0)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(without_adapters(tuned.model), nnx.Param)))
    tuned.train()
    trainer("full").train()
    first = [rows(tmp_path / name)[0] for name in ("lora", "full")]
    assert first[0]["loss"] == first[1]["loss"] and first[0]["entropy"] == first[1]["entropy"]
    after = nnx.to_pure_dict(nnx.state(without_adapters(tuned.model), nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("mesh", [slow("fsdp=4,tensor=2"), slow("data=2,tensor=4")])
def test_layout_changes_no_loss(tiny_folder, data, tmp_path, mesh):
    flags = "--use_peft --use_dora --lora_r 4 --lora_dropout 0 --per_device_train_batch_size 4 --padding_free false"
    for name, layout in (("one", "fsdp=2,tensor=4"), ("other", mesh)):
        size = 2 if mesh.startswith("fsdp=4") and name == "other" else 4
        changed = flags.replace("train_batch_size 4", f"train_batch_size {size}")
        assert sft(tiny_folder, data, tmp_path / name, f"{changed} --mesh {layout}") == 0
    for row, expected in zip(rows(tmp_path / "other"), rows(tmp_path / "one"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("bits", ["--load_in_4bit", slow("--load_in_8bit")])
def test_an_adapter_on_few_bits(tiny_folder, data, tmp_path, bits):
    out = tmp_path / "out"
    assert sft(tiny_folder, data, out, f"{ADAPTER} {bits} --eval_strategy epoch --eval_on_start true") == 0
    losses = [row["eval_loss"] for row in rows(out) if "eval_loss" in row]
    assert losses[-1] < losses[0]
    assert main(["export", "--model_name_or_path", str(out), "--output_dir", str(tmp_path / "merged")]) == 0


def test_a_run_goes_on_from_an_adapter(run, data, tmp_path):
    out = tmp_path / "out"
    assert sft(run, data, out, "--lr_scheduler_type constant") == 0
    assert rows(out)[0]["loss"] < rows(run)[0]["loss"]
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    assert any(not np.array_equal(tensor, adapter(run)[name]) for name, tensor in adapter(out).items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--use_peft --lora_target_modules q_prj", "q_proj"),
        ("--use_peft --lora_r 4096 --lora_target_modules q_proj", "r is 4096, beyond the smaller dimension of q_proj"),
        ("--use_peft --lora_dropout 1.5", "lora_dropout"),
        ("--load_in_4bit", "add --use_peft"),
        ("--use_peft --load_in_4bit --load_in_8bit", "exclude each other"),
        ("--use_peft --lora_init pissa --load_in_4bit", "pissa"),
        ("--loraplus_lr_ratio 4", "loraplus_lr_ratio"),
        ("--use_peft --lora_layers_to_transform 7", "7"),
    ],
)
def test_mistakes_are_named(tiny_folder, data, tmp_path, capsys, flags, message):
    assert sft(tiny_folder, data, tmp_path / "out", flags) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_put_on_an_adapter(run, data, tmp_path, capsys):
    assert sft(run, data, tmp_path / "out", "--use_peft") == 2
    assert "has an adapter already" in capsys.readouterr().err


def test_flags_of_an_adapter_and_peft_config_are_the_same(tiny_folder, data, tmp_path):
    peft = pytest.importorskip("peft")
    args = SFTConfig(dataset_name=str(data), output_dir=str(tmp_path), max_steps=1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = SFTTrainer(str(tiny_folder), args, peft_config=config)
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(trainer.model, trainer.trainable))}
    assert paths == {f"layers.attention.query.adapter.lora_{part}" for part in "ab"}
