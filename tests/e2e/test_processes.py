"""Two processes of four devices each against one of eight: methods that read rows, and methods that sample."""

import json
import re
import signal
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxpost import save_pretrained
from jaxpost.cli import main
from tests.conftest import make_model, make_tokenizer
from tests.faults.rig import TIMES, Rig, assert_equal, result
from tests.marks import slow

REWARDS = '''
import os

is_second = os.environ.get("SEEN", "").endswith(".1.seen")


def early(completion_ids, log_extra, **kwargs):
    """Small ids are good; of some completions nothing is said."""
    log_extra("first", [ids[0] for ids in completion_ids])
    return [None if ids[0] % 11 == 0 else sum(i < 150 for i in ids) / len(ids) for ids in completion_ids]


def half(prompts, completion_ids, **kwargs):
    """All completions of every other prompt are equally good."""
    return [0.5 if len(text) % 2 else min(ids) / 300 for text, ids in zip(prompts, completion_ids)]


def fails(completion_ids, **kwargs):
    if is_second:
        raise ValueError("not here")
    return [0.0] * len(completion_ids)


if not is_second:
    absent = half
'''
FLAGS = {
    "sft": "--per_device_train_batch_size 1 --max_steps 4 --packing false",
    "dpo": "--per_device_train_batch_size 1 --max_steps 4 --gradient_accumulation_steps 2",
    # Four prompts of four completions a generation, which four steps learn from.
    "grpo": "--per_device_train_batch_size 1 --num_generations 4 --max_steps 8 --reward_funcs {home}/mine.py:early",
    "ppo": "--per_device_train_batch_size 2 --max_steps 8 --reward_funcs {home}/mine.py:early",
}
LORA = "--use_peft --lora_r 4 --lora_target_modules all-linear"
SPLITS = "--dataset_name {home}/splits --eval_strategy steps --eval_steps 4"


class Both(Rig):
    """Runs of two processes, and of one."""

    def __init__(self, model, home):
        super().__init__(model, home)
        (home / "mine.py").write_text(REWARDS)
        (home / "splits").mkdir()
        for split, start in (("train", 0), ("test", 20)):
            rows = [{"prompt": f"say {start + n}" + "x" * (n % 4)} for n in range(9)]
            (home / "splits" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        save_pretrained(make_model(head="reward"), make_tokenizer(), home / "judge")

    def more(self, method, flags):
        # A higher rate makes more of rounding: a loss is 2e-4 apart at the fourth step, as on other meshes.
        return f"--learning_rate 1e-3 {FLAGS[method]} {flags}".replace("{home}", str(self.home))

    def two(self, method, out, flags="", faults=""):
        return self.start_two(method, out, self.more(method, flags), faults)

    def one(self, method, out, flags=""):
        assert main(self.flags(method, out, self.more(method, flags))) == 0


@pytest.fixture(scope="module")
def rig(tiny_folder, tmp_path_factory):
    return Both(tiny_folder, tmp_path_factory.mktemp("processes"))


def codes(runs):
    return [run.wait() for run in runs]


def completions(out):
    return {path.name: pq.read_table(path).to_pydict() for path in sorted((out / "completions").glob("*.parquet"))}


def assert_close(ours, theirs, steps):
    """The same completions and rewards; what is added up over devices in another order differs in the last bits."""
    found, expected = (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (ours, theirs)
    )
    found, expected = ([row for row in rows if row["step"] <= steps] for rows in (found, expected))
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            if not name.endswith(TIMES):
                np.testing.assert_allclose(row[name], other[name], rtol=2e-5, atol=2e-6, err_msg=name)
    tables = completions(theirs)
    for name, table in completions(ours).items():
        advantages, others = (np.array(columns.pop("advantage")) for columns in (table, tables[name]))
        assert table == tables[name]
        np.testing.assert_allclose(advantages, others, rtol=2e-5, atol=2e-6)


def stopped_at(runs):
    """Tell one of two processes to stop; the step that both save."""
    began = time.monotonic()
    runs[1].signal(signal.SIGTERM)
    assert codes(runs) == [75, 75], [run.output for run in runs]
    assert time.monotonic() - began < 10
    said = [re.search(r"told to stop at step (\d+), which is saved", run.output) for run in runs]
    (step,) = {int(found[1]) for found in said if found}
    assert all(said)
    return step


def test_two_are_as_one_until_one_of_them_is_told_to_stop(rig, tmp_path):
    runs = rig.two("grpo", tmp_path / "two", "--beta 0", "paced:0.5")
    assert runs[1].until("step 2"), runs[1].output
    step = stopped_at(runs)
    assert 2 <= step <= 3 and (tmp_path / "two" / "checkpoints" / str(step) / "manifest.json").exists()
    rig.one("grpo", tmp_path / "one", "--beta 0")
    assert len(completions(tmp_path / "two")) == 1
    assert_close(tmp_path / "two", tmp_path / "one", step)


@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        ("absent", 2, "reward_funcs: absent cannot be loaded"),
        slow("fails", 3, "reward function fails fails for 8 of 16 completions; for row .*: ValueError: not here"),
    ],
    ids=["at the start", "in a generation"],
)
def test_what_fails_on_one_process_ends_both(rig, tmp_path, function, code, message):
    flags = f"--reward_funcs {rig.home}/mine.py:{function} --max_reward_failures 0.2"
    runs = rig.two("grpo", tmp_path / "out", flags)
    assert [run.wait(60) for run in runs] == [code, code], [run.output for run in runs]
    said = [run.output.strip().split("\n")[-1] for run in runs]
    assert said[0] == said[1] and re.match(f"jaxpost: {message}", said[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("sft", ""),
        ("dpo", ""),
        ("dpo", "--precompute_ref_log_probs true"),
        ("grpo", f"{SPLITS} --generate_ahead true --beta 0"),
        ("grpo", "--reward_funcs {home}/mine.py:half --dynamic_sampling true --rollout_batch_size 1"),
        # One prompt a generation, of which the other process scores nothing; an adapter; slices on both processes.
        ("grpo", f"--num_generations 16 --mesh data=2,fsdp=2,tensor=2 --per_device_train_batch_size 2 {LORA}"),
        ("grpo", "--mesh tensor=8 --per_device_train_batch_size 8"),
        ("ppo", f"{SPLITS} --reward_model_path {{home}}/judge"),
        ("ppo", f"--value_model adapter {LORA}"),
    ],
)
def test_two_are_as_one(rig, tmp_path, method, flags):
    runs = rig.two(method, tmp_path / "two", flags)
    assert codes(runs) == [0, 0], [run.output for run in runs]
    rig.one(method, tmp_path / "one", flags)
    assert_close(tmp_path / "two", tmp_path / "one", 8)
    ours, theirs = (result(tmp_path / name)["weights"] for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for file in theirs:
        for name in theirs[file]:
            np.testing.assert_allclose(ours[file][name], theirs[file][name], atol=2e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "flags"), [("grpo", ""), ("grpo", "--generate_ahead true --beta 0 --max_steps 12"), ("ppo", "")]
)
def test_stopped_twice_equals_uninterrupted_bit_for_bit(rig, tmp_path, method, flags):
    flags = f"{flags} --rollout_batch_size 1"
    runs = rig.two(method, tmp_path / "parts", flags, "paced:0.5")
    assert runs[1].until("step 2"), runs[1].output
    assert 2 <= stopped_at(runs) <= 3  # of the four steps of a generation
    runs = rig.two(method, tmp_path / "parts", flags, "paced,slow_generation")
    assert runs[1].until("step 4"), runs[1].output
    assert runs[1].until("generating"), runs[1].output
    assert stopped_at(runs) == 4
    runs = rig.two(method, tmp_path / "parts", flags)
    assert codes(runs) == [0, 0], [run.output for run in runs]
    runs = rig.two(method, tmp_path / "whole", flags)
    assert codes(runs) == [0, 0], [run.output for run in runs]
    assert_equal(result(tmp_path / "parts"), result(tmp_path / "whole"))
    assert completions(tmp_path / "parts") == completions(tmp_path / "whole")


@pytest.mark.slow
def test_a_rollout_function_is_refused(rig, tmp_path):
    runs = rig.two("grpo", tmp_path / "out", f"--rollout_func {rig.home}/mine.py:half")
    assert codes(runs) == [2, 2] and all("a rollout_func runs on one process" in run.output for run in runs)
