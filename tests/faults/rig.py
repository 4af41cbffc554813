"""Runs of a tiny model in processes of their own, and what is left of them."""

import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest
from etils import epath
from safetensors.numpy import load_file

from jaxpost.train.manifest import Manifest
from tests.faults.driver import run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.faults.driver"])
STEPS = 12
TIMES = ("_time", "_per_second", "_share", "mfu")  # what the names of metrics end in that are not the same twice
REWARDS = '''
import os
import time


def early(completion_ids, **kwargs):
    """Small ids are good."""
    return [sum(i < 150 for i in ids) / len(ids) for ids in completion_ids]


def slow(completion_ids, calls=[], **kwargs):
    """From the second generation on."""
    calls.append(None)
    if len(calls) > 1:
        os.write(2, b"scoring\\n")
        time.sleep(40)
    return early(completion_ids)
'''
SHARED = (
    f"--report_to none --max_steps {STEPS} --save_steps 4 --logging_steps 1 --learning_rate 1e-2 "
    "--lr_scheduler_type cosine"
)
# Three rows of four: an epoch of the offline methods ends in the middle of two saves, with a batch that is not full.
FLAGS = {
    "sft": "--per_device_train_batch_size 4 --max_length 64 --packing true",
    "dpo": "--per_device_train_batch_size 4 --gradient_accumulation_steps 2",
    "grpo": "--per_device_train_batch_size 8 --num_generations 4 --max_completion_length 6 --num_iterations 2 "
    "--steps_per_generation 2 --beta 0.1",
    "ppo": "--per_device_train_batch_size 8 --max_completion_length 6 --num_mini_batches 2 --num_ppo_epochs 2",
}


def rows_of(method):
    if method == "sft":
        return [{"text": f"{n} " + "abc " * (n % 9)} for n in range(37)]
    if method == "dpo":
        return [
            {"prompt": "q" * (3 + n % 3), "chosen": "yes" * (1 + n % 4), "rejected": "no, " * (1 + n % 5)}
            for n in range(21)
        ]
    return [{"prompt": "what is " + "x" * (1 + n % 5) + str(n)} for n in range(11)]


class Rig:
    """A tiny model, data for every method, and runs of them.

    Args:
        model: a Hugging Face folder.
        home: where all is written.
    """

    def __init__(self, model, home):
        self.model, self.home = model, home
        (home / "rewards.py").write_text(REWARDS)
        for method in FLAGS:
            (home / f"{method}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(method)))

    def flags(self, method, out, more=""):
        base = f"{method} --model_name_or_path {self.model} --dataset_name {self.home}/{method}.jsonl"
        rewards = f"--reward_funcs {self.home}/rewards.py:early" if method in ("grpo", "ppo") else ""
        return f"{base} --output_dir {out} {SHARED} {FLAGS[method]} {rewards} {more}".split()

    def start(self, method, out, more="", faults="paced", devices=1, seen=None):
        return Process([faults, *self.flags(method, out, more)], seen or out, devices)

    def start_two(self, method, out, more="", faults="paced"):
        """Two processes of one run, of four devices each."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        more = f"{more} --coordinator_address localhost:{port} --num_processes 2 --process_id"
        return [
            self.start(method, out, f"{more} {number}", faults, devices=4, seen=f"{out}.{number}")
            for number in range(2)
        ]

    def run(self, method, out, more="", faults="paced", devices=1):
        """To the end; the exit code."""
        return self.start(method, out, more, faults, devices).wait()


class Process:
    """A run in a process of its own, and what it says, line by line.

    It is forked from a process that has imported jaxpost, which saves most of the time that a start takes.
    """

    def __init__(self, arguments, out, devices):
        self.seen, self.file = f"{out}.seen", Path(f"{out}.{time.monotonic_ns()}.txt")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        flags = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        environment = {"SEEN": self.seen, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}
        faults, *words = arguments
        self.process = FORKS.Process(target=run, args=(faults, words, str(self.file), environment))
        self.process.start()
        self.told = 0  # lines that were looked at

    def until(self, *words, seconds=120):
        """Wait for a line that begins with one of these words; None if the process ends before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            is_over = not self.process.is_alive()
            lines = self.output.split("\n")[:-1]
            while self.told < len(lines):
                self.told += 1
                if lines[self.told - 1].startswith(words):
                    return lines[self.told - 1]
            if is_over:
                return None
            time.sleep(0.01)
        self.process.kill()
        pytest.fail(f"no {words} within {seconds} s:\n{self.output}")

    def signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self, seconds=300):
        """The exit code."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.output
        return self.process.exitcode

    @property
    def output(self):
        return self.file.read_text(errors="replace")


def checksums(out, step):
    """Of the arrays in the checkpoint of a step, by their paths."""
    return Manifest.read(epath.Path(out) / "checkpoints" / str(step)).checksums


def result(out):
    """What a run has come to: weights, the last step that is saved and its checksums, and logged values."""
    files = [path for path in sorted(out.rglob("*.safetensors")) if "checkpoints" not in path.parts]
    newest = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": {str(path.relative_to(out)): load_file(path) for path in files},
        "step": newest,
        "checksums": checksums(out, newest),
        "metrics": [{name: value for name, value in row.items() if not name.endswith(TIMES)} for row in rows],
    }


def outcome(out, seen=None):
    """Likewise, and the batch of every step, of a run that the driver has paced."""
    lines = [json.loads(line) for line in Path(f"{seen or out}.seen").read_text().splitlines()]
    batches = {name: {line[0]: line[i] for line in lines} for i, name in ((1, "batches"), (2, "tokens"))}
    return result(out) | batches


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs.keys() - {"weights"}:
        assert ours[name] == theirs[name], name
    for file, weights in theirs["weights"].items():
        assert all(weights[name].tobytes() == ours["weights"][file][name].tobytes() for name in weights)
