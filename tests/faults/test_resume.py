"""Where a run can be continued from, in this process: each point gives the bits of the uninterrupted run."""

import json
import shutil

import numpy as np
import pytest

from jaxpost.cli import main
from tests.faults.rig import assert_equal, outcome, result

pytestmark = pytest.mark.faults

SFT = "--per_device_train_batch_size 1 --max_length 64"
# name: method, flags, and the steps that are saved and continued from
POINTS = {
    "sft, mid-epoch and epoch end": ("sft", f"{SFT} --max_steps 10 --save_steps 1", (2, 5, 7)),
    "sft, packed": ("sft", f"{SFT} --packing true --packing_strategy wrapped --max_steps 8 --save_steps 1", (1, 2, 5)),
    "sft, accumulation": ("sft", f"{SFT} --gradient_accumulation_steps 2 --max_steps 6 --save_steps 1", (1, 3, 4)),
    "sft, LoRA with dropout": ("sft", f"{SFT} --use_peft --lora_dropout 0.3 --max_steps 6 --save_steps 1", (1, 3)),
    "sft, after evaluation": (
        "sft",
        f"{SFT} --max_steps 6 --save_steps 3 --eval_strategy steps --eval_steps 3 --dataset_test_split train",
        (3,),
    ),
    "sft, in the middle of a log line": ("sft", f"{SFT} --max_steps 6 --save_steps 2 --logging_steps 5", (2, 4)),
    "dpo, partial batch": ("dpo", "--per_device_train_batch_size 1 --max_steps 7 --save_steps 1", (2, 3, 5)),
    "dpo, a reference that follows": (
        "dpo",
        "--per_device_train_batch_size 1 --sync_ref_model --ref_model_sync_steps 2 --max_steps 6 --save_steps 1",
        (2, 3),
    ),
    "kto, unpaired": ("kto", "--per_device_train_batch_size 1 --max_steps 5 --save_steps 1", (2, 3)),
    "grpo, num_iterations = 2": (
        "grpo",
        "--per_device_train_batch_size 4 --num_generations 4 --max_completion_length 6 --num_iterations 2 "
        "--steps_per_generation 2 --max_steps 8 --save_steps 1",
        (1, 2, 4, 7),
    ),
    "ppo, epochs and minibatches": (
        "ppo",
        "--per_device_train_batch_size 4 --max_completion_length 6 --num_mini_batches 2 --num_ppo_epochs 2 "
        "--adap_kl_ctrl --horizon 100 --max_steps 8 --save_steps 1",
        (1, 3, 4, 6),
    ),
}
SHORT = ("sft, in the middle of a log line", "grpo, num_iterations = 2")


@pytest.mark.parametrize("point", POINTS)
def test_resume_points(rig, point, counts, tmp_path):
    method, flags, steps = POINTS[point]
    if point not in counts(SHORT, POINTS):
        pytest.skip("of the long tier")
    data = rig.home / f"{method}.jsonl"
    if method == "kto":
        rows = [{"prompt": f"q{n}", "completion": "yes" * (1 + n % 4), "label": n % 3 > 0} for n in range(21)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = f"--reward_funcs {rig.home}/rewards.py:early" if method in ("grpo", "ppo") else ""
    base = f"{method} --model_name_or_path {rig.model} --dataset_name {data} --report_to none --logging_steps 1"
    base = f"{base} --learning_rate 1e-2 {rewards} {flags}"
    assert main(f"{base} --output_dir {tmp_path}/whole".split()) == 0
    expected = result(tmp_path / "whole")
    for step in steps if counts(False, True) else steps[:2]:
        out = tmp_path / f"from_{step}"
        shutil.copytree(tmp_path / "whole", out)
        for path in (out / "checkpoints").iterdir():
            if int(path.name) > step:
                shutil.rmtree(path)
        assert main(f"{base} --output_dir {out}".split()) == 0
        assert_equal(result(out), expected)


# devices, and how they are arranged
MESHES = [(4, "data=4"), (8, "fsdp=8"), (4, "fsdp=4"), (1, "fsdp=1"), (8, "data=2,fsdp=2,tensor=2")]


def test_any_mesh_goes_on_with_the_run_of_another(rig, tmp_path, counts):
    """The same rows, and the next ten losses within 1e-5; that the arrays are the same is checked as they are read."""
    flags = "--packing false --max_length 64 --learning_rate 1e-3 --max_steps 14 --lr_scheduler_type constant"
    size = "--mesh {} --per_device_train_batch_size {}"
    first = tmp_path / "first"
    assert rig.run("sft", first, f"{flags} {size.format('fsdp=2,tensor=4', 4)}", devices=8) == 0
    expected = outcome(first)
    for devices, mesh in counts(MESHES[:1], MESHES):
        out = tmp_path / f"{devices}_{mesh}"
        shutil.copytree(first, out)
        for step in (8, 12, 14):
            shutil.rmtree(out / "checkpoints" / str(step))
        groups = devices // int(dict(part.split("=") for part in mesh.split(",")).get("tensor", 1))
        run = rig.start("sft", out, f"{flags} {size.format(mesh, 8 // groups)}", devices=devices)
        assert run.wait() == 0, run.output
        found = outcome(out)
        assert found["tokens"] == {step: tokens for step, tokens in expected["tokens"].items() if step > 4}
        losses = [[row["loss"] for row in what["metrics"]] for what in (found, expected)]
        assert len(losses[0]) == 14
        np.testing.assert_allclose(*losses, atol=1e-5)


CHANGES = {
    "--seed 43": "seed was 42, is 43",
    "--per_device_train_batch_size 2": "rows of a step was 8, is 16",
    "--learning_rate 0.02": "learning_rate was 0.01, is 0.02",
    "--lr_scheduler_type constant": "lr_scheduler_type was linear, is constant",
    "--max_length 32": "max_length was 64, is 32",
    "--dataset_name {home}/grpo.jsonl --dataset_text_field prompt": "rows differ",
    "--model_name_or_path {home}/other --use_peft false": "chat template differ",
}


def test_a_run_that_has_drifted_says_how(rig, tmp_path, capsys):
    base = (
        f"sft --model_name_or_path {rig.model} --dataset_name {rig.home}/sft.jsonl --report_to none "
        f"--learning_rate 1e-2 {SFT} --max_steps 4 --save_steps 2 --output_dir {tmp_path}/out"
    )
    other = shutil.copytree(rig.model, rig.home / "other", dirs_exist_ok=True)
    (other / "chat_template.jinja").write_text("{# another #}" + (other / "chat_template.jinja").read_text())
    assert main(base.split()) == 0
    for flags, difference in CHANGES.items():
        capsys.readouterr()
        assert main([*base.split(), *flags.format(home=rig.home).split()]) == 2, flags
        assert difference in (said := capsys.readouterr().err), said
    for free in ("--save_steps 1", "--logging_steps 3", "--gradient_checkpointing false", "--run_name other"):
        assert main([*base.split(), *free.split()]) == 0, free
    changed = [*base.split(), "--seed", "43", "--max_steps", "6", "--resume_with_changes", "true"]
    assert main(changed) == 0
    assert (
        "with changes: seed was 42, is 43; steps of the learning-rate schedule was 4, is 6" in capsys.readouterr().out
    )
