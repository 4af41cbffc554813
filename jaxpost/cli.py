"""The command line: one subcommand a method, its flags built from the method's config dataclass."""

import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jaxpost
from jaxpost.commands import HELP, Command, OfMethod, Runs, Trains
from jaxpost.completion import Completes
from jaxpost.errors import ConfigError, JaxpostError, PreemptedError
from jaxpost.options import nearest
from jaxpost.parsing import FileConfig, parse, parse_all
from jaxpost.watch import WatchConfig, watching

__all__ = ["COMMANDS", "entry", "main", "parse"]

EVALUATION = Runs(
    "scores of texts, rewards, win rates or tasks",
    "jaxpost.evaluation:EvaluateConfig",
    "jaxpost.evaluation:run_evaluation",
)

COMMANDS: dict[str, Command] = {
    "sft": Trains("supervised fine-tuning"),
    "dpo": Trains("direct preference optimisation"),
    "orpo": Trains("odds-ratio preference optimisation"),
    "cpo": Trains("contrastive preference optimisation"),
    "simpo": Trains("simple preference optimisation"),
    "kto": Trains("Kahneman-Tversky optimisation, of completions that are judged one by one"),
    "bco": Trains("binary classifier optimisation, likewise"),
    "reward": Trains("a reward model"),
    "grpo": Trains("group relative policy optimisation, from completions of the policy that functions reward"),
    "rloo": Trains("REINFORCE leave-one-out, likewise"),
    "ppo": Trains("proximal policy optimisation, likewise, with a value model"),
    "generate": Runs(
        "complete prompts with a model", "jaxpost.generating:GenerateConfig", "jaxpost.generating:run_generate"
    ),
    "chat": Runs("talk with a model", "jaxpost.chat:ChatConfig", "jaxpost.chat:run_chat"),
    "export": Runs(
        "write a run's model, or an adapter merged into its base, as a Hugging Face folder",
        "jaxpost.export:ExportConfig",
        "jaxpost.export:run_export",
    ),
    "evaluate": OfMethod(
        "the held-out metrics of a model: jaxpost evaluate dpo with its flags; without a method, the scores that a "
        "reward model gives to texts, rewards of completions (--reward_funcs), the win rate against another model "
        "(--judge), or tasks of lm-evaluation-harness (--tasks)",
        "jaxpost.evaluate:run_evaluate",
        otherwise=EVALUATION,
    ),
    "preview": OfMethod(
        "show what a method would train on: jaxpost preview dpo with its flags",
        "jaxpost.preview:run_preview",
        otherwise="sft",
    ),
    "plan": OfMethod(
        "whether a run fits chips that are not here, and how fast it may be: jaxpost plan sft with its flags and "
        "--topology v5e:16x16",
        "jaxpost.planning.command:run_plan",
        config="jaxpost.planning.command:plan_config",
    ),
    "report": Runs(
        "one page on one run or several, side by side: jaxpost report RUN [RUN ...] --output_file report.html",
        "jaxpost.reporting.command:ReportConfig",
        "jaxpost.reporting.command:run_report",
        takes="runs",
    ),
    "completion": Completes(lambda: COMMANDS),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 2 configuration, 3 data, 75 told to stop and saved, 77 not finite, 78 checkpoint. A run
        that is stuck ends the process with 76.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in (*HELP, "help"):
        print(_usage(shutil.get_terminal_size().columns))
        return 0
    if argv[0] == "--version":
        print(f"jaxpost {jaxpost.__version__}")
        return 0
    try:
        with watching(WatchConfig()):
            _run(argv[0], argv[1:])
            return 0
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


def _run(name: str, words: list[str]) -> None:
    # Quiet by default: these libraries warn about PyTorch and about tokenizers in forked workers, and what goes wrong
    # with a checkpoint fills pages where one line will do.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}{nearest(name, COMMANDS)}; known: {', '.join(COMMANDS)}")
    action = COMMANDS[name].opened(name, words)
    parts = [*action.parts, FileConfig] if action.parts else []
    if any(word in HELP for word in action.words):
        from jaxpost.flags import flags_of
        from jaxpost.help_text import print_help

        with _readers_may_leave():
            about, subcommands = COMMANDS[name].about, COMMANDS[name].subcommands()
            print_help(action.title, about, flags_of(parts), subcommands, action.details)
    elif not parts:
        with _readers_may_leave():
            action.run()
    else:
        *configs, file = parse_all(parts, action.title, action.words)
        if file.print_config:
            from jaxpost.config_file import annotated

            with _readers_may_leave():
                print(annotated(configs[0], action.title))
        else:
            action.run(*configs)


@contextmanager
def _readers_may_leave() -> Iterator[None]:
    """What is only printed may be read in part, by `head` say."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(width: int) -> str:
    lines = ["usage: jaxpost <command> [--config FILE.yaml] [--flag value ...]", ""]
    for name, command in COMMANDS.items():
        lines += textwrap.wrap(
            command.about, min(width, 120), initial_indent=f"  {name:<12}", subsequent_indent=" " * 14
        )
    return "\n".join([*lines, "", "jaxpost <command> --help lists its flags, jaxpost --version says which this is."])
