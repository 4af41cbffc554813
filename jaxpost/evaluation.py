"""`jaxpost evaluate` without a method: by scores, reward functions, a judge, or the tasks of lm-evaluation-harness."""

from dataclasses import dataclass, fields
from typing import Any

from jaxpost.completer import CompletionsConfig, LoadConfig
from jaxpost.errors import ConfigError
from jaxpost.lm_eval import TasksConfig, run_tasks
from jaxpost.options import check_parts, option
from jaxpost.rewarded import run_rewarded
from jaxpost.rl.rewards import RewardFunctionsConfig
from jaxpost.scoring import ScoreConfig, run_score
from jaxpost.win_rate import WinRateConfig, run_win_rate
from jaxpost.writing import check_output_file


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ScoreConfig, CompletionsConfig, RewardFunctionsConfig, WinRateConfig, TasksConfig):
    """Flags of `jaxpost evaluate` without a method."""

    temperature: float = option(0.0, "Softmax temperature; 0 is greedy.")
    output_file: str | None = option(
        None, "JSON Lines file for a row a text, completion or prompt (JSON for --tasks); by default the terminal."
    )
    batch_size: int = option(8, "Texts that a device reads together, and completions that are decoded together.")

    def __post_init__(self) -> None:
        check_parts(self)
        check_output_file(self.output_file)


def _names(config: Any) -> set[str]:
    return {field.name for field in fields(config)}


SHARED = _names(LoadConfig) | {"output_file", "batch_size"}
DATASET = {"dataset_name", "dataset_split"}
# What is read with each of these flags, and without any of them.
READ = {
    "tasks": _names(TasksConfig) | {"seed"},
    "judge": _names(WinRateConfig) | (_names(CompletionsConfig) - {"num_return_sequences"}) | DATASET,
    "reward_funcs": _names(RewardFunctionsConfig) | _names(CompletionsConfig) | DATASET,
    "": _names(ScoreConfig),
}
RUN = {"tasks": run_tasks, "judge": run_win_rate, "reward_funcs": run_rewarded, "": run_score}


def run_evaluation(config: EvaluateConfig) -> None:
    """Evaluate a model by what the flags say.

    Raises:
        ConfigError, DataError: a flag, a model or a row cannot be used; nothing is written.
    """
    given = [name for name in READ if name and getattr(config, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"evaluate: --{given[0]} and --{given[1]} are different evaluations; give one of them")
    kind = given[0] if given else ""
    standard = EvaluateConfig()
    for name in sorted(_names(config) - SHARED - READ[kind]):
        if getattr(config, name) != getattr(standard, name):
            readers = " or ".join(f"--{other}" for other, names in READ.items() if other and name in names)
            where = f"; it goes with {readers}" if readers else "; it is for scores of texts"
            raise ConfigError(f"evaluate: --{name} has no effect {f'with --{kind}' if kind else 'alone'}{where}")
    needed = ["model_name_or_path", *(["dataset_name"] if "dataset_name" in READ[kind] else [])]
    for name in needed:
        if getattr(config, name) is None:
            raise ConfigError(f"evaluate needs --{name}")
    RUN[kind](config)
