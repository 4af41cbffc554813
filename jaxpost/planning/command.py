"""`jaxpost plan`: whether a run fits chips that are not here, how fast it may be, and what binds."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import yaml
from jax.sharding import Mesh
from rich.console import Console

from jaxpost.chips import KNOWN, Topology, parse_topology
from jaxpost.errors import ConfigError, one_line
from jaxpost.methods import Method, changed_fields
from jaxpost.models.checkpoint import open_checkpoint, read_json
from jaxpost.models.config import ModelConfig
from jaxpost.models.families import read_config
from jaxpost.options import Group, option, part_of
from jaxpost.planning.fit import candidates, smaller
from jaxpost.planning.prediction import Prediction, predict
from jaxpost.planning.programs import planned
from jaxpost.planning.report import as_dict, show
from jaxpost.planning.topology import devices_of
from jaxpost.sharding import make_mesh


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a plan is for, beside the flags of the run."""

    help_group = Group.PLAN

    topology: str | None = option(None, f"Chips to plan for, e.g. {KNOWN}.")
    prompt_length: int = option(512, "Tokens of a prompt, of methods that sample.")
    fit: bool = option(False, "Search batch, mesh and remat for the fastest plan that fits.")
    plan_file: str | None = option(None, "Write the plan's flags (.yaml), or its numbers (.json), to this file.")

    def __post_init__(self) -> None:
        if self.prompt_length < 1:
            raise ConfigError(f"prompt_length is {self.prompt_length}; it must be at least 1")
        if self.plan_file is not None and Path(self.plan_file).suffix not in (".yaml", ".json"):
            raise ConfigError(f"plan_file {self.plan_file}: give a name that ends in .yaml (flags) or .json (numbers)")


def plan_config(method: Method) -> type[Any]:
    """The flags of a plan and of the method together."""
    return dataclasses.make_dataclass("Plan", [], bases=(PlanConfig, method.config), frozen=True, kw_only=True)


def run_plan(method: Method, config: Any, console: Console | None = None) -> Prediction:
    """Compile a run's programs for chips that may not be here, and print what it would take.

    Args:
        method: an entry of METHODS.
        config: of `plan_config`.
        console: where to print; standard output by default.

    Raises:
        ConfigError: no such topology, mesh or model; the compiler is not installed; or the run does not fit.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    asked, args = part_of(config, PlanConfig), part_of(config, method.config)
    if asked.topology is None:
        raise ConfigError(f"a plan is for chips: give --topology, e.g. {KNOWN}")
    if args.model_name_or_path is None:
        raise ConfigError("no model: give --model_name_or_path (a hub id or a folder; its config.json is enough)")
    topology, model = parse_topology(asked.topology), architecture_of(args.model_name_or_path, args.model_revision)
    devices = devices_of(topology)

    def attempt(args: Any) -> Prediction:
        return _predicted(method, args, model, make_mesh(args.mesh, devices), topology, asked.prompt_length)

    if asked.fit:
        args, prediction = _fastest(args, model, len(devices), attempt, console)
    else:
        prediction = attempt(args)
    title = f"{method.name} of {args.model_name_or_path} on {topology.name}, --mesh {args.mesh or 'fsdp=-1'}"
    show(prediction, title, console)
    if not prediction.fits:
        raise ConfigError(_too_large(prediction, args, attempt))
    if asked.plan_file is not None:
        _write(Path(asked.plan_file), method, args, prediction)
    return prediction


def architecture_of(name: str, revision: str | None) -> ModelConfig:
    """Of a model whose weights need not be there.

    Raises:
        ConfigError: no config.json, or one of a family that is not known.
    """
    folder = Path(os.path.expanduser(name))
    if folder.suffix == ".gguf":
        return read_config(open_checkpoint(folder).config, name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder}: no config.json")
        return read_config(read_json(folder / "config.json"), name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(name, "config.json", revision=revision)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {name!r} is no folder, and its config.json is not on the hub: {one_line(error)}"
        ) from error
    return read_config(read_json(Path(path)), name)


def _predicted(
    method: Method, args: Any, model: ModelConfig, mesh: Mesh, topology: Topology, prompt_length: int
) -> Prediction:
    with jax.set_mesh(mesh):
        return predict(planned(method, args, model, mesh, prompt_length), topology)


def _fastest(args: Any, model: ModelConfig, num_devices: int, attempt: Any, console: Console) -> tuple[Any, Prediction]:
    """The best of the candidates.

    Raises:
        ConfigError: none fits.
    """
    best: tuple[Any, Prediction] | None = None
    for policies in candidates(args, model, num_devices):
        for tried in policies:
            prediction = attempt(tried)
            line = f"{tried.mesh}, {tried.per_device_train_batch_size} rows, remat {tried.remat_policy}"
            if not prediction.fits:
                console.print(f"{line}: {prediction.needed / 1e9:.1f} GB, too much", style="dim")
                continue
            console.print(f"{line}: {prediction.step_seconds:.3g} s, MFU {prediction.mfu:.0%}", style="dim")
            if best is None or prediction.step_seconds < best[1].step_seconds:
                best = tried, prediction
            break
    if best is None:
        raise ConfigError(
            "no batch, mesh and remat policy fits; take more chips, --use_peft, or --load_in_4bit with it"
        )
    return best


def _too_large(prediction: Prediction, args: Any, attempt: Any) -> str:
    """By how much, and the smallest change that helps."""
    over = prediction.needed - prediction.capacity
    text = (
        f"a device needs {prediction.needed / 1e9:.1f} GB of {prediction.capacity / 1e9:.1f}, {over / 1e9:.1f} too much"
    )
    changes: list[str] = []
    for flags, changed in smaller(args):
        changes.append(flags)
        if attempt(changed).fits:
            return f"{text}; it fits with {' '.join(changes)}"
    return f"{text}, whatever is recomputed or quantised; take more chips"


def _write(path: Path, method: Method, args: Any, prediction: Prediction) -> None:
    if path.suffix == ".json":
        text = json.dumps(as_dict(prediction), indent=2) + "\n"
    else:
        lines = [
            f"# jaxpost {method.name} --config {path.name}",
            f"# {prediction.num_devices} devices of {prediction.capacity / 1e9:.0f} GB",
            f"# roofline: {prediction.step_seconds:.3g} s a step, MFU {prediction.mfu:.0%}",
        ]
        text = "\n".join(lines) + "\n" + yaml.safe_dump(changed_fields(args), sort_keys=True, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
