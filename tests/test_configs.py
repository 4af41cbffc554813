"""Every YAML in configs/ runs a few steps on the tiny model, compiles once, and says what it gave when run in full.

Recipes, which are to be copied, run one step, and say where to go on.
"""

import json
import re
from pathlib import Path

import jax
import pytest
import yaml

from jaxpost import save_pretrained
from jaxpost.cli import main
from jaxpost.data import sums, word_problem_pairs, word_problems
from jaxpost.train.logging import RunLog
from tests.conftest import make_model, make_tokenizer

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*RECIPES})
RUNG = re.compile(r"([a-z]+_[a-z]+)_(\d)_\w+")  # method_ladder_number_what
STEPS, WARM = 4, 2
COMPILED = "/jax/core/compile/backend_compile_duration"

WRITERS = {"sft": word_problems.write, "grpo": sums.write, "ppo": sums.write}
SMALL = {
    "grpo": "--num_generations 4 --max_completion_length 12 --reward_funcs {}/rewards.py:varied",
    "ppo": "--num_mini_batches 1",
}  # others by the length of their rows
# Completions that are all rewarded alike are not read, and other sizes are other programs.
VARIED = "def varied(completions, **_):\n    return [float(i % 4) for i in range(len(completions))]\n"


def method_of(path):
    return path.stem.split("_")[0]


def header(path):
    return [line for line in path.read_text().splitlines() if line.startswith("#")]


@pytest.fixture
def compiled(monkeypatch):
    """step -> the programs that had been compiled when it was logged."""
    names, by_step = [], {}
    real = RunLog.log

    def log(self, step, metrics):
        by_step[step] = [*names]
        real(self, step, metrics)

    def listen(event, *_, fun_name="", **__):
        if event == COMPILED:
            names.append(fun_name)

    monkeypatch.setattr(RunLog, "log", log)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield by_step
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_and_compiles_nothing_after_its_first_steps(path, tiny_folder, tmp_path, compiled):
    write = WRITERS.get(method_of(path), word_problem_pairs.write_pairs)
    write(tmp_path / "data", num_rows=40, seed=0)
    given = f"--model_name_or_path {tiny_folder} --dataset_name {tmp_path / 'data'} --output_dir {tmp_path / 'out'}"
    small = f"--max_steps {STEPS} --logging_steps 1 --eval_strategy no --save_strategy no "
    (tmp_path / "rewards.py").write_text(VARIED)
    small += SMALL.get(method_of(path), "--max_length 512").format(tmp_path)
    small += " --per_device_train_batch_size 1"
    if "--reward_model_path" in path.read_text():
        save_pretrained(make_model(head="reward"), make_tokenizer(), tmp_path / "judge")
        small += f" --reward_model_path {tmp_path / 'judge'}"
    assert main([method_of(path), "--config", str(path), *given.split(), *small.split(), "--report_to", "none"]) == 0
    assert compiled[WARM] and compiled[STEPS][len(compiled[WARM]) :] == []
    weights = "adapter_model.safetensors" if "use_peft: true" in path.read_text() else "model.safetensors"
    assert (tmp_path / "out" / weights).exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_a_step(path, tiny_folder, tmp_path):
    row = {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}
    if method_of(path) == "sft":
        row = {"prompt": row["prompt"], "completion": row["chosen"]}
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{json.dumps(row)}\n" * 40)
    given = f"--model_name_or_path {tiny_folder} --dataset_name {data} --output_dir {tmp_path / 'out'}"
    small = (
        "--max_steps 1 --logging_steps 1 --eval_strategy no --save_strategy no --report_to none --eval_on_start false "
    )
    small += "--max_length 64 --per_device_train_batch_size 1 --gradient_accumulation_steps 2"
    assert main([method_of(path), "--config", str(path), *given.split(), *small.split()]) == 0
    assert '"loss"' in (tmp_path / "out" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_where_to_go_on(path):
    named = {word for line in header(path) for word in re.findall(r"[a-z0-9_]+\.yaml", line)} - {path.name}
    assert named <= {other.name for other in RECIPES}
    rung = RUNG.fullmatch(path.stem)
    above = [other.name for other in RECIPES if rung and other.stem.startswith(f"{rung[1]}_{int(rung[2]) + 1}_")]
    assert named >= {*above}
    assert path.name in (ROOT / "docs" / "recipes.md").read_text()


@pytest.mark.parametrize("ladder", sorted({rung[1] for path in RECIPES if (rung := RUNG.fullmatch(path.stem))}))
def test_a_step_sees_as_many_rows_on_every_rung(ladder):
    rungs = [yaml.safe_load(path.read_text()) for path in RECIPES if path.stem.startswith(f"{ladder}_")]
    batches = {each["per_device_train_batch_size"] * each["gradient_accumulation_steps"] for each in rungs}
    assert len(rungs) == 5 and batches == {8}


@pytest.mark.parametrize("path", [*CONFIGS, *RECIPES], ids=lambda path: path.stem)
def test_header_says_how_it_was_run(path):
    last = header(path)[-3:]
    assert [line.split(":")[0] for line in last] == ["# command", "# hardware", "# expected"]
    assert f" {method_of(path)} " in last[0] or "tools/" in last[0]
