"""Plans: what they are for, what they say, and that the memory is what a step really takes."""

import json
import os
import subprocess
import sys
from importlib import metadata, util

import jax
import numpy as np
import pytest

from jaxpost.chips import CHIPS, parse_topology
from jaxpost.cli import main, parse
from jaxpost.errors import ConfigError
from jaxpost.methods import METHODS
from jaxpost.models.families import read_config
from jaxpost.options import part_of
from jaxpost.planning.command import plan_config
from jaxpost.planning.fit import candidates, smaller
from jaxpost.planning.prediction import predict
from jaxpost.planning.programs import planned
from jaxpost.planning.topology import Refused, compiled
from jaxpost.sharding import make_mesh
from tests.conftest import TINY_LLAMA

LLAMA_8B = {
    **TINY_LLAMA,
    **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
    "max_position_embeddings": 8192,
}
needs_libtpu = pytest.mark.skipif(util.find_spec("libtpu") is None, reason="libtpu is not installed")


def test_a_torus_lends_the_links_of_the_directions_that_a_group_needs():
    pod = parse_topology("v5e:16x16")
    assert pod.network(2) == pod.network(16) == CHIPS["v5e"].network
    assert pod.network(17) == pod.network(256) == 2 * CHIPS["v5e"].network
    assert parse_topology("h100:8").network(8) == CHIPS["h100"].network


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --topology, e.g. v4:4x4x4"),
        (["--topology", "v5x:4x4"], "unknown chip 'v5x' (did you mean 'v5p'?); there are v4:4x4x4"),
        (["--topology", "v5e:4xx"], "says not how many chips"),
        (["--topology", "h100:2x4"], "says not how many chips"),
        (["--topology", "v5e:4x4", "--prompt_length", "0"], "prompt_length is 0"),
        (["--topology", "v5e:4x4", "--plan_file", "plan.txt"], "ends in .yaml (flags) or .json"),
        (["--topology", "v5e:4x4", "--topolgy", "v5e"], "unknown flag --topolgy (did you mean '--topology'?)"),
        (["--topology", "v5e:4x4", "--model_name_or_path", "/no/where/at/all"], "is no folder"),
    ],
)
def test_mistakes_are_one_line(flags, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    assert main(["plan", "sft", "--model_name_or_path", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("topology", "module", "command"),
    [
        ("v5e:4x4", "libtpu", "pip install 'libtpu=="),
        ("h100:8", "jax_plugins", "pip install --no-deps jax-cuda12-plugin=="),
    ],
)
def test_what_is_missing_is_named_with_its_command(topology, module, command, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name.startswith(module) else found(name, *rest))
    assert main(["plan", "sft", "--model_name_or_path", str(tmp_path), "--topology", topology]) == 2
    assert command in capsys.readouterr().err
    assert metadata.version("jax")


def test_candidates_keep_the_batch_and_take_the_lightest_recomputation_first():
    method, config = METHODS["sft"], read_config(TINY_LLAMA, "tiny")
    args = method.config(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    lists = list(candidates(args, config, 8))
    rows = {
        (each.mesh, each.per_device_train_batch_size * each.gradient_accumulation_steps)
        for tries in lists
        for each in tries
    }
    assert rows == {("fsdp=8,tensor=1", 6), ("fsdp=4,tensor=2", 12)}  # 48 rows in all
    assert {tries[0].mesh for tries in lists} == {"fsdp=8,tensor=1", "fsdp=4,tensor=2"}
    assert [each.remat_policy for each in lists[0]] == ["dots", "attention", "full", "offload"]
    assert [flags for flags, _ in smaller(args)][:2] == [
        "--remat_policy full",
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 6",
    ]


@pytest.mark.parametrize(
    ("message", "refused"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 20.50G of 15.75G hbm.",
            Refused(20.5 * 2**30, True),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (512.00M) "
            "exceeds available HBM (15.75G).",
            Refused(2**29, False),
        ),
    ],
)
def test_a_compiler_that_finds_it_too_large_is_heard(message, refused):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    assert compiled(Lowered()) == refused


def test_predicted_memory_is_what_the_step_takes_on_this_machine(tmp_path):
    """Parameters, optimizer and batch are the arguments of the compiled step; within 10 % of all that it takes."""
    method, config, mesh = METHODS["sft"], read_config(TINY_LLAMA, "tiny"), make_mesh()
    args = method.config(max_length=64, packing=True, per_device_train_batch_size=2)
    with jax.set_mesh(mesh):
        plan = planned(method, args, config, mesh, 1)
        prediction = predict(plan, parse_topology("v5e:2x4"))
        (step,) = prediction.programs
    held = sum(prediction.memory[name] for name in ("parameters", "optimizer", "batch"))
    assert held == pytest.approx(step.compiled.arguments, rel=0.1)
    assert prediction.needed == pytest.approx(step.compiled.arguments + step.compiled.temporaries, rel=0.1)
    assert prediction.num_tokens == 8 * 2 * 64
    flops = 8 * step.cost.flops / prediction.model_flops
    assert 1 < flops < 2.5  # recomputation, and the upper half of the scores
    assert np.isfinite(prediction.mfu)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_reference_that_was_asked_before_takes_no_room(method):
    config, mesh = read_config(TINY_LLAMA, "tiny"), make_mesh()
    args = METHODS[method].config(max_length=64, precompute_ref_log_probs=True)
    with jax.set_mesh(mesh):
        plan = planned(METHODS[method], args, config, mesh, 1)
    assert plan.reference is None and [program.name for program in plan.programs] == ["train step"]
    assert "ref_logps" in plan.batch


@needs_libtpu
@pytest.mark.parity
def test_a_plan_for_tpus(tmp_path):
    """In a process of its own, as a user calls it: splash attention, and no parameters gathered out of their layer."""
    (tmp_path / "config.json").write_text(
        json.dumps({**TINY_LLAMA, "hidden_size": 256, "head_dim": 128, "max_position_embeddings": 2048})
    )
    file = tmp_path / "plan.json"
    flags = ["--packing", "--max_length", "1024", "--per_device_train_batch_size", "1", "--bf16"]
    command = [sys.executable, "-m", "jaxpost", "plan", "sft", "--model_name_or_path", str(tmp_path), *flags]
    command += ["--topology", "v5e:2x4", "--plan_file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "MFU" in done.stdout
    numbers = json.loads(file.read_text())
    assert numbers["fits"] and numbers["tokens_per_step"] == 8 * 1024
    assert numbers["programs"]["train step"]["flops"] > 0


def test_flags_of_a_plan_are_those_of_the_method():
    method = METHODS["grpo"]
    config = parse(plan_config(method), "plan grpo", ["--topology", "v5e:4x4", "--num_generations", "4"])
    assert (config.topology, config.num_generations) == ("v5e:4x4", 4)
    wrong = parse(plan_config(method), "plan grpo", ["--num_generations", "1"])
    with pytest.raises(ConfigError, match="num_generations"):
        part_of(wrong, method.config)
