"""The batch of a run that is only planned: as many rows as its flags say, each full."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpost.data.examples import Example
from jaxpost.data.loader import collate
from jaxpost.errors import ConfigError
from jaxpost.methods import Method
from jaxpost.rl.generate import bucket
from jaxpost.rl.plan import Plan

FACTS = {"kto": (1, "label"), "bco": (1, "label"), "sft": (1, None)}  # of others: pairs, with a margin


def offline_batch(method: Method, args: Any, groups: int) -> dict[str, np.ndarray]:
    """A batch of rows from disk, whose examples are all `max_length` long.

    Raises:
        ConfigError: there is no such length.
    """
    if args.max_length is None:
        raise ConfigError("a plan is for rows of max_length tokens; give --max_length")
    size, fact = FACTS.get(method.name, (2, "margin"))
    shared = args.padding_free and not (method.name == "sft" and args.packs(True))
    each = size * (args.per_device_train_batch_size if shared else 1)  # examples of a row
    num_rows = groups * args.gradient_accumulation_steps * (1 if shared else args.per_device_train_batch_size)
    batch = collate(_examples(num_rows, each, args.max_length), each * args.max_length, 0)
    if fact is None:
        return batch
    ones = np.ones((num_rows, each), np.float32)
    if fact == "label" and args.needs_mismatches:
        others = collate(_examples(num_rows, each, args.max_length), each * args.max_length, 0)
        batch |= {f"mismatched_{name}": column for name, column in others.items()}
    return batch | {"examples": ones, fact: ones}


def generation(plan: Plan, prompt_length: int, completion_length: int, num_rewards: int) -> dict[str, np.ndarray]:
    """The rows of a generation whose prompts and completions are all so long."""
    num_rows = plan.num_completions // plan.row_size
    length = plan.row_size * (prompt_length + completion_length)
    batch = collate(_examples(num_rows, plan.row_size, length // plan.row_size), bucket(length), 0)
    column = np.ones((num_rows, plan.row_size), np.float32)
    return batch | {
        "examples": column,
        "groups": np.zeros(column.shape, np.int32),
        "rewards": np.ones((*column.shape, num_rewards), np.float32),
        "ended": column,
        "num_trained": column,
        "sampled_logps": np.zeros(batch["tokens"].shape, np.float32),
    }


def _examples(num_rows: int, each: int, length: int) -> Sequence[Sequence[Example]]:
    example = Example(np.zeros(length, np.int32), np.ones(length, bool))
    return [[example] * each] * num_rows
