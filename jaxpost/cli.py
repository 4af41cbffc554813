"""The command line: one subcommand a method, its flags built from the method's config dataclass.

A `--config` file is flags in YAML: its entries go through the same parser, before those of the command line.
"""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jaxpost.errors import ConfigError, JaxpostError, PreemptedError
from jaxpost.options import nearest, one_of
from jaxpost.watch import WatchConfig, watching

MOST_YAML = 1_000_000  # bytes
MOST_NESTED = 16
USAGE = """usage: jaxpost <command> [--config FILE.yaml] [--flag value ...]

  sft        supervised fine-tuning
  dpo        direct preference optimisation
  orpo       odds-ratio preference optimisation
  cpo        contrastive preference optimisation
  simpo      simple preference optimisation
  kto        Kahneman-Tversky optimisation, of completions that are judged one by one
  bco        binary classifier optimisation, likewise
  reward     a reward model
  grpo       group relative policy optimisation, from completions of the policy that functions reward
  rloo       REINFORCE leave-one-out, likewise
  ppo        proximal policy optimisation, likewise, with a value model
  generate   complete prompts with a model
  chat       talk with a model
  export     write a run's model, or an adapter merged into its base, as a Hugging Face folder
  evaluate   the held-out metrics of a model: jaxpost evaluate dpo with its flags; without a method, the scores that a
             reward model gives to texts, rewards of completions (--reward_funcs), the win rate against another model
             (--judge), or tasks of lm-evaluation-harness (--tasks)
  preview    show what a method would train on: jaxpost preview dpo with its flags
  plan       whether a run fits chips that are not here, and how fast it may be: jaxpost plan sft with its flags and
             --topology v5e:16x16

jaxpost <command> --help lists its flags."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 2 configuration, 3 data, 75 told to stop and saved, 77 not finite, 78 checkpoint. A run
        that is stuck ends the process with 76.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    try:
        with watching(WatchConfig()):
            return _run(argv[0], argv[1:])
    except JaxpostError as error:
        print(f"jaxpost: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("jaxpost: interrupted", file=sys.stderr)
        return 130


def entry() -> int:
    """`main` as a process: told to stop, it does not wait for the threads of reward functions."""
    code = main()
    if code == PreemptedError.exit_code:
        from jaxpost.processes import part

        part()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(command: str, flags: list[str]) -> int:
    # Quiet by default: these libraries warn about PyTorch and about tokenizers in forked workers, and what goes wrong
    # with a checkpoint fills pages where one line will do.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from jaxpost.evaluate import run_evaluate
    from jaxpost.evaluation import EvaluateConfig, run_evaluation
    from jaxpost.export import ExportConfig, run_export
    from jaxpost.generate import GenerateConfig, run_generate
    from jaxpost.methods import METHODS
    from jaxpost.preview import run_preview
    from jaxpost.trainer import Trainer

    if command == "generate":
        run_generate(parse(GenerateConfig, command, flags))
        return 0
    if command == "chat":
        from jaxpost.chat import ChatConfig, run_chat

        run_chat(parse(ChatConfig, command, flags))
        return 0
    if command == "export":
        run_export(parse(ExportConfig, command, flags))
        return 0
    if command == "evaluate" and flags and flags[0] in METHODS:
        run_evaluate(METHODS[flags[0]], parse(METHODS[flags[0]].config, flags[0], flags[1:]))
        return 0
    if command == "evaluate":
        run_evaluation(parse(EvaluateConfig, command, flags))
        return 0
    if command == "preview":
        name = flags.pop(0) if flags and flags[0] in METHODS else "sft"
        run_preview(METHODS[name], parse(METHODS[name].config, name, flags))
        return 0
    if command == "plan":
        from jaxpost.planning.command import plan_config, run_plan

        method = METHODS[one_of("plan", flags[0] if flags else "", tuple(METHODS))]
        run_plan(method, parse(plan_config(method), f"plan {method.name}", flags[1:]))
        return 0
    if command not in METHODS:
        known = (*METHODS, "generate", "chat", "export", "evaluate", "preview", "plan")
        raise ConfigError(f"unknown command {command!r}{nearest(command, known)}; known: {', '.join(known)}")
    trainer = Trainer(METHODS[command], args=parse(METHODS[command].config, command, flags))
    trainer.train()
    return 0


def parse(config_class: Any, command: str, flags: list[str]) -> Any:
    """Flags (and the file given with --config) -> an instance of the config dataclass.

    Raises:
        ConfigError: unknown flag or key (the nearest one is named), or a value of the wrong type.
    """
    from transformers.hf_argparser import HfArgumentParser, string_to_bool

    parser = HfArgumentParser(config_class, prog=f"jaxpost {command}", allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with the same flags; the command line wins.")
    for action in parser._actions:
        if action.type is string_to_bool:  # bare `--bf16` is `--bf16 true`, also where the default is None
            action.nargs, action.const = "?", True
        if action.nargs == "+":  # a list may be empty
            action.nargs = "*"
        if action.type is dict:
            action.type = _mapping
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}

    def refuse(message: str) -> Any:
        raise ConfigError(f"{command}: {message}")

    parser.error = refuse
    file, flags = _take_config(flags, command)
    words = [*(_file_flags(Path(file), known) if file else []), *flags]
    words, nulls = _take_nulls(words, config_class)
    config, *_, unknown = parser.parse_args_into_dataclasses(args=words, return_remaining_strings=True)
    if unknown:
        name = next((word for word in unknown if word.startswith("-")), unknown[0])
        raise ConfigError(f"{command}: unknown flag {name}{_nearest_flag(name, known)}; see jaxpost {command} --help")
    return dataclasses.replace(config, **dict.fromkeys(nulls)) if nulls else config


def _take_nulls(words: list[str], config_class: Any) -> tuple[list[str], set[str]]:
    """Split `--max_length null` (or none, or with `=`) from the other words, for fields that may be None."""
    optional = {name for name, kind in get_type_hints(config_class).items() if type(None) in get_args(kind)}
    rest: list[str] = []
    nulls: set[str] = set()
    position = 0
    while position < len(words):
        name, equals, value = words[position].partition("=")
        taken = 1
        if not equals and position + 1 < len(words):
            value, taken = words[position + 1], 2
        name = name.removeprefix("--").replace("-", "_")
        if name in optional and words[position].startswith("--") and value.lower() in ("null", "none"):
            nulls.add(name)
            position += taken
            continue
        nulls.discard(name)  # the last one wins
        rest.append(words[position])
        position += 1
    return rest, nulls


def _mapping(text: str) -> dict[str, Any]:
    """A JSON object, which is also how the mappings of a YAML file arrive here."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return value


def _nearest_flag(name: str, known: set[str]) -> str:
    return nearest(name, [f"--{flag}" for flag in known])


def _take_config(flags: list[str], command: str) -> tuple[str | None, list[str]]:
    """Split `--config FILE` (or `--config=FILE`) from the other flags."""
    rest, file = [], None
    words = iter(flags)
    for word in words:
        if word == "--config":
            file = next(words, None)
            if file is None:
                raise ConfigError(f"{command}: --config needs a file")
        elif word.startswith("--config="):
            file = word.removeprefix("--config=")
        else:
            rest.append(word)
    return file, rest


def _file_flags(path: Path, known: set[str]) -> list[str]:
    """The entries of a YAML file as command-line words, so that both are converted by one parser.

    The scalars are taken as written: `1e-5` is not yet a string and `no` not yet a boolean.
    """
    import yaml

    try:
        if path.is_file() and path.stat().st_size > MOST_YAML:
            raise ConfigError(f"--config {path}: {path.stat().st_size / 1e6:.0f} MB; that is no file of flags")
        text = path.read_text(encoding="utf-8")
        _check_nesting(path, text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"--config {path}: expected a mapping of flags to values")
    flags: list[str] = []
    seen: set[str] = set()
    for key_node, value_node in root.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen:
            raise ConfigError(f"--config {path}, line {line}: {key!r} is given twice")
        seen.add(key)
        if key not in known:
            raise ConfigError(f"--config {path}, line {line}: unknown key {key!r}{nearest(key, known)}")
        values = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
        if not all(isinstance(value, yaml.ScalarNode | yaml.MappingNode) for value in values):
            raise ConfigError(f"--config {path}, line {line}: {key!r} must be a value or a list of values")
        # `--key=value` keeps a leading minus sign from looking like a flag; argparse takes lists only apart.
        words = [_word(value) for value in values]
        flags += [f"--{key}={words[0]}"] if isinstance(value_node, yaml.ScalarNode) else [f"--{key}", *words]
    return flags


def _check_nesting(path: Path, text: str) -> None:
    """Refuse what would take a parser long, or grow when it is written out: deep nesting, and aliases."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_NESTED or isinstance(event, yaml.AliasEvent):
            what = "an alias" if isinstance(event, yaml.AliasEvent) else "nested too deeply"
            raise ConfigError(f"--config {path}, line {event.start_mark.line + 1}: {what}; write the values out")


def _word(node: Any) -> str:
    """A value of a YAML file as it would stand on the command line."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        return json.dumps(yaml.SafeLoader("").construct_document(node), default=str)
    return "null" if node.tag == "tag:yaml.org,2002:null" else node.value
