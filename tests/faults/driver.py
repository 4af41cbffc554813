"""`jaxpost` with faults in it.

What a fault does to the parts is done from outside, so that the package itself has no hooks. Says on standard output
what it is doing, one word a line, so that a supervisor knows when to strike.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import grain
import matplotlib.pyplot
import numpy as np
from transformers import AutoTokenizer
from transformers.hf_argparser import HfArgumentParser

import jaxpost.trainer
from jaxpost.cli import entry
from jaxpost.processes import part

# Imported here, so that processes that are forked have them.
assert grain and jaxpost.trainer and matplotlib.pyplot and AutoTokenizer and HfArgumentParser


def say(text):
    os.write(1, f"{text}\n".encode())


def before(owner, name, act):
    """Do something before each call of a function."""
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        act(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def digests(batch):
    """Of a batch as it lies on the devices, and of the tokens in it, however they lie."""
    digest, tokens = hashlib.sha256(), []
    for name in sorted(batch):
        for shard in batch[name].addressable_shards:
            digest.update(np.asarray(shard.data).tobytes())
    for shard, mask in zip(batch["tokens"].addressable_shards, batch["segments"].addressable_shards, strict=True):
        if shard.replica_id == 0:
            tokens.append(np.asarray(shard.data)[np.asarray(mask.data) > 0])
    return digest.hexdigest(), hashlib.sha256(np.sort(np.concatenate(tokens)).tobytes()).hexdigest()


def paced(seconds="0.05"):
    """Steps that take a while, and say which batch they take."""
    from jaxpost.train import loop

    real = loop._Fit._advance

    def advance(self):
        step, source = self.loop.step, self.loop.source

        def stepping(state, batch):
            with Path(os.environ["SEEN"]).open("a") as file:
                file.write(json.dumps([self.done + 1, *digests(batch)]) + "\n")
            say(f"step {self.done + 1}")
            time.sleep(float(seconds))
            return step(state, batch)

        object.__setattr__(self.loop, "step", stepping)
        try:
            real(self)
        finally:
            object.__setattr__(self.loop, "step", step)
        assert self.loop.source is source

    loop._Fit._advance = advance


def slow_save(seconds="1"):
    """Saves that take a while, in the background, when all but the manifest is written."""
    from jaxpost.train.manifest import Manifest

    before(Manifest, "write", lambda *_: (say("saving"), time.sleep(float(seconds))))


def slow_evaluation():
    from jaxpost import watch
    from jaxpost.train import evaluate

    def act(*_):
        if watch._watch.phase == "evaluate":
            say("evaluating")
            time.sleep(0.5)

    before(evaluate.Tally, "add", act)


def slow_generation():
    from jaxpost.rl import generate

    before(generate._Batch, "run", lambda *_, **__: (say("generating"), time.sleep(0.5)))


def slow_loading():
    from jaxpost import trainer

    before(trainer, "open_base", lambda *_: (say("loading"), time.sleep(60)))


def slow_compilation():
    from jaxpost.train.step import Programs

    before(Programs, "prepare", lambda *_: (say("compiling"), time.sleep(60)))


def stuck(step, process="0"):
    """A step that never ends, on one process."""
    import jax

    from jaxpost.train import loop

    def hang(self):
        if self.done + 1 == int(step) and jax.process_index() == int(process):
            say("stuck")
            time.sleep(1000)

    before(loop._Fit, "_advance", hang)


def dies(step, process="1"):
    """A process that is killed at a step."""
    import jax

    from jaxpost.train import loop

    def die(self):
        if self.done + 1 == int(step) and jax.process_index() == int(process):
            say("dying")
            os.kill(os.getpid(), 9)

    before(loop._Fit, "_advance", die)


def no_room(step, size="39000"):
    """From a step on, no file can have more than so many bytes."""
    import resource

    from jaxpost.train import loop

    def limit(self):
        if self.done + 1 == int(step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))

    before(loop._Fit, "_advance", limit)


SLOW = (slow_save, slow_evaluation, slow_generation, slow_loading, slow_compilation)
FAULTS = {fault.__name__: fault for fault in (paced, *SLOW, stuck, dies, no_room)}


def run(faults, words, output, environment):
    """A process, from its beginning to its end: forked from one that has imported all this, but done nothing yet."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    for fault in filter(None, faults.split(",")):
        name, *arguments = fault.split(":")
        FAULTS[name](*arguments)
    sys.argv[1:] = words
    code = entry()
    part()  # as JAX does at the end of a process that is not forked
    sys.exit(code)
