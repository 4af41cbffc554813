"""`jaxpost evaluate METHOD`: the held-out metrics of a model, as a run of the method would log them."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpost.base_model import open_base
from jaxpost.compilation import keep_programs
from jaxpost.data.rows import Rows
from jaxpost.data.sources import load_rows
from jaxpost.errors import ConfigError
from jaxpost.methods import Method, suited_to
from jaxpost.metrics import wilson_interval
from jaxpost.models.adapters import active_config
from jaxpost.models.pretrained import open_source
from jaxpost.models.transformer import Decoder
from jaxpost.objectives.base import Objective
from jaxpost.options import part_of
from jaxpost.pipeline import Pipeline
from jaxpost.prompt_weights import unweighted
from jaxpost.ref_model import load_reference
from jaxpost.sharding import batch_groups, make_mesh
from jaxpost.train.evaluate import Evaluation
from jaxpost.train.reference import Reference
from jaxpost.train.state import snapshot
from jaxpost.writing import write_lines

RESULTS = "eval_results.json"
ACCURACIES = ("eval_rewards/accuracies", "eval_accuracy")  # shares of the pairs


def run_evaluate(method: Method, args: Any) -> dict[str, float]:
    """Print the metrics of a model over held-out rows, and write them to `output_dir` if there is one.

    The rows are those of `--dataset_test_split`, or all of a local file. An adapter is compared with its base.

    Args:
        method: an entry of METHODS.
        args: its config, as for training.

    Raises:
        ConfigError, DataError: a flag, the model or a row cannot be used.
    """
    if method.is_online:
        how = "measured in a run (--eval_strategy), or in Python with the trainer's evaluate()"
        raise ConfigError(f"evaluate: {method.name} is {how}")
    if args.use_peft:
        raise ConfigError("use_peft makes a new adapter; give the folder of a trained one as --model_name_or_path")
    keep_programs(args)
    mesh = make_mesh(args.mesh)
    base = open_base(None, args, None, mesh, head=method.head)
    if not open_source(args.model_name_or_path, args.model_revision).has_trained_head(method.head):
        raise ConfigError(f"{args.model_name_or_path} has no trained reward head; train one with jaxpost {method.name}")
    args = suited_to(args, base.config)
    objective: Objective = part_of(args, method.objective)
    pipeline = Pipeline(method, args, base.tokenizer, base.vocab_size, batch_groups(mesh), base.notes)
    loader = pipeline.eval_loader(held_out_rows(args))
    base.notes.extend(unweighted(args))
    model = base.load()
    reference = compared_with(model, objective, args, mesh)
    graphdef, state = snapshot(model, nnx.Param, {name: jnp.zeros(()) for name in objective.remembers})
    with jax.set_mesh(mesh):
        metrics = Evaluation(objective, graphdef, reference, loader, mesh)(state)
    for note in base.notes:
        print(note)
    for line in report(metrics, len(loader.packs)):
        print(line)
    if args.output_dir is not None:
        write_lines(str(Path(args.output_dir) / RESULTS), [json.dumps(metrics, indent=1)])
    return metrics


def held_out_rows(args: Any) -> Rows:
    """What `run_evaluate` reads."""
    if args.dataset_name is None:
        raise ConfigError("no data: give --dataset_name (a file, a folder or a hub id)")
    is_file = Path(args.dataset_name).expanduser().is_file()
    split = "train" if is_file else args.dataset_test_split
    return load_rows(args.dataset_name, split, args.dataset_config, streaming=args.dataset_streaming)


def compared_with(model: Decoder, objective: Objective, args: Any, mesh: jax.sharding.Mesh) -> Reference | None:
    """The reference of a trained model.

    Raises:
        ConfigError: it is not an adapter, and nothing says what it was trained from.
    """
    if not objective.needs_reference:
        return None
    named = args.ref_model_name_or_path
    if named is None and active_config(model) is None:
        raise ConfigError("evaluation compares the model with what it was trained from: give --ref_model_name_or_path")
    return load_reference(model, named, args, mesh)


def report(metrics: dict[str, float], count: int) -> list[str]:
    """A line a metric; shares of pairs with their 95 % confidence interval."""
    lines = []
    for name, value in metrics.items():
        interval = ""
        if name in ACCURACIES and math.isfinite(value):
            low, high = wilson_interval(round(value * count), count)
            interval = f" (95 % interval {low:.3f} to {high:.3f}, {count} pairs)"
        lines.append(f"{name} {value:.6g}{interval}")
    return lines
