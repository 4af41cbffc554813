"""A dry run shows what a run would be, and neither trains nor writes."""

import jax
import numpy as np
import pytest

from jaxpost.cli import main
from jaxpost.data.word_problems import write
from jaxpost.dry_run import estimate
from jaxpost.methods import METHODS
from jaxpost.preview import preview_of
from jaxpost.sharding import make_mesh
from jaxpost.train.optim import make_optimizer, make_schedule
from jaxpost.train.state import create_state, decay_mask
from jaxpost.trainer import Trainer


@pytest.fixture
def flags(tiny_folder, tmp_path):
    write(tmp_path / "data", num_rows=20, seed=0)
    return ["--model_name_or_path", str(tiny_folder), "--dataset_name", str(tmp_path / "data")]


def forbid(monkeypatch):
    def never(*_):
        raise AssertionError("a weight is read")

    monkeypatch.setattr("jaxpost.models.pretrained.Source.load", never)


def test_everything_is_shown_and_nothing_written(flags, tmp_path, capsys, monkeypatch):
    forbid(monkeypatch)
    out = tmp_path / "out"
    options = [
        "--output_dir",
        str(out),
        "--max_length",
        "256",
        "--max_steps",
        "3",
        "--per_device_train_batch_size",
        "8",
    ]
    assert main(["sft", *flags, *options, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "max_steps: 3  # default: -1" in shown and "mesh: fsdp=8" in shown
    assert all(f"\n{name} " in shown for name in ("parameters", "optimizer", "gradients", "batch"))
    assert "activations and temporaries" in shown and " left\n" in shown and "(train step)" in shown
    assert "3 steps; a batch is" in shown and shown.count("trained ─") == 3
    assert not out.exists()


def test_prompts_and_all_programs_of_a_method_that_samples(flags, capsys, monkeypatch):
    forbid(monkeypatch)
    options = ["--max_completion_length", "8", "--use_peft", "--reward_funcs", "numeric_answer", "--max_steps", "2"]
    assert main(["grpo", *flags, *options, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "train step, appraisal, weights at hand, prefill, decode, a token" in shown
    assert "frozen parameters" in shown and "2 steps; a generation is" in shown and "prompt 3: " in shown


def test_the_estimate_is_what_the_state_of_the_run_takes(flags, tmp_path):
    method, mesh = METHODS["sft"], make_mesh()
    args = method.config(
        model_name_or_path=flags[1], dataset_name=flags[3], output_dir=str(tmp_path / "out"), use_peft=True, max_steps=1
    )
    memory, _ = estimate(method, preview_of(method, args, mesh), mesh)
    trainer = Trainer(method, args=args)
    optimizer = make_optimizer(args, make_schedule(args, 1), decay_mask)
    _, state = create_state(trainer.model, optimizer, trainer.trainable, mesh, trainer.objective.remembers)
    held = {"parameters": state.params, "frozen parameters": state.frozen, "optimizer": state.opt_state}
    for name, tree in held.items():
        leaves = [leaf for leaf in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
        taken = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        assert memory[name] == pytest.approx(taken), name
    batch = trainer.feed.loader.batch(0)
    assert memory["batch"] >= sum(column.nbytes for column in batch.values()) / mesh.size
    assert np.isfinite(sum(memory.values()))


def test_what_does_not_fit_is_exit_2_with_a_remedy(flags, capsys, monkeypatch):
    monkeypatch.setattr("jaxpost.dry_run.capacity_of", lambda *_: 1e3)
    assert main(["sft", *flags, "--max_length", "256", "--dry_run"]) == 2
    shown = capsys.readouterr()
    assert "too much" in shown.out
    assert shown.err.startswith("jaxpost: a device needs 0.0 GB of 0.0; try --remat_policy full, or ")


@pytest.mark.parametrize(
    ("method", "options", "code", "message"),
    [
        ("sft", ["--dataset_name", "nowhere.jsonl"], 3, "nowhere.jsonl: no such file"),
        ("sft", ["--mesh", "fsdp=3"], 2, "needs 3 devices"),
        ("grpo", ["--max_completion_length", "8"], 2, "give --reward_funcs"),
        ("grpo", ["--max_completion_length", "8", "--reward_funcs", "numeric_answe"], 2, "numeric_answe"),
    ],
)
def test_mistakes_are_those_of_training(method, options, code, message, flags, capsys):
    assert main([method, *flags, *options, "--dry_run"]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
