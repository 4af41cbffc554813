"""How many completions there are, and which optimizer steps learn from them."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxpost.errors import ConfigError
from jaxpost.options import Group, option


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How completions are sampled; what a generation is learned from, a part that adds to this says."""

    help_group = Group.COMPLETIONS

    num_generations: int = option(1, "Completions of each prompt.")
    steps_per_generation: int | None = option(
        None, "Micro-batches that one generation fills; by default gradient_accumulation_steps."
    )
    generation_batch_size: int | None = option(None, "Completions of one generation, instead of steps_per_generation.")
    rollout_batch_size: int = option(
        64, "Completions per data-parallel group that are decoded together.", may_change=True
    )
    gather_for_generation: bool = option(
        True,
        "Have the weights at hand while tokens are drawn, split over `tensor` alone, in the dtype that they are "
        "multiplied in (TRL: ds3_gather_for_generation). false needs less memory, and is slow on many devices.",
        may_change=True,
    )
    shuffle_dataset: bool = option(True, "Take the prompts in random order.")
    dynamic_sampling: bool = option(
        False, "Sample other prompts in place of those whose completions are all rewarded alike (DAPO)."
    )
    max_resamplings: int = option(3, "How often dynamic_sampling tries.")
    num_generations_eval: int | None = option(
        None, "Completions of each held-out prompt; by default num_generations.", may_change=True
    )
    log_completions: bool = option(
        False, "Print some completions of each generation; all are kept in completions/.", may_change=True
    )
    num_completions_to_print: int | None = option(None, "How many; 8 by default.", may_change=True)

    def __post_init__(self) -> None:
        check_least(self, 1, "num_generations", "rollout_batch_size", "max_resamplings")
        optional = ("steps_per_generation", "generation_batch_size", "num_generations_eval", "num_completions_to_print")
        check_least(self, 1, *(name for name in optional if vars(self)[name] is not None))
        if self.steps_per_generation is not None and self.generation_batch_size is not None:
            raise ConfigError("steps_per_generation and generation_batch_size say the same; give one of them")
        if self.dynamic_sampling and self.num_generations < 2:
            raise ConfigError("dynamic_sampling compares completions of a prompt; give num_generations of at least 2")

    @property
    def passes(self) -> int:
        """How often the completions of one generation are learned from."""
        return 1

    @property
    def parts(self) -> int | None:
        """Optimizer steps of a pass; None for as many as gradient_accumulation_steps leaves."""
        return None

    @property
    def rollout(self) -> str | None:
        """The function that makes the completions; None for answers of the policy."""
        return None

    @property
    def is_ahead(self) -> bool:
        """Whether completions are sampled before the updates with those of the generation before."""
        return False


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(GenerationConfig):
    """What is said of methods that compare completions of a prompt; names and defaults are TRL's."""

    help_group = Group.COMPLETIONS

    num_generations: int = option(8, "Completions of each prompt that are compared with each other.")
    num_iterations: int = option(1, "How often the completions of one generation are learned from.")
    rollout_func: str | None = option(
        None, "file.py:function that makes the completions, with tools say, instead of one answer of the policy."
    )
    generate_ahead: bool = option(
        False,
        "Sample completions before the updates with those of the generation before, and score them meanwhile; "
        "importance weights make up for it.",
    )

    def __post_init__(self) -> None:
        check_least(self, 2, "num_generations")
        check_least(self, 1, "num_iterations")
        super().__post_init__()

    @property
    def passes(self) -> int:
        return self.num_iterations

    @property
    def rollout(self) -> str | None:
        return self.rollout_func

    @property
    def is_ahead(self) -> bool:
        return self.generate_ahead


@dataclass(frozen=True, kw_only=True)
class EpochsConfig(GenerationConfig):
    """What is said of methods that pass over each generation several times; names and defaults are TRL's."""

    help_group = Group.COMPLETIONS

    num_ppo_epochs: int = option(4, "How often the completions of one generation are learned from.")
    num_mini_batches: int = option(
        1,
        "Optimizer steps that each such pass is split into; per_device_train_batch_size x gradient_accumulation_steps "
        "completions are those of a generation.",
    )

    def __post_init__(self) -> None:
        check_least(self, 1, "num_ppo_epochs", "num_mini_batches")
        super().__post_init__()

    @property
    def passes(self) -> int:
        return self.num_ppo_epochs

    @property
    def parts(self) -> int | None:
        return self.num_mini_batches


def check_least(config: GenerationConfig, least: int, *names: str) -> None:
    """Raise ConfigError if a number is too small."""
    for name in names:
        if vars(config)[name] < least:
            raise ConfigError(f"{name} is {vars(config)[name]}; it must be at least {least}")


class Plan(NamedTuple):
    """The numbers of a run.

    Attributes:
        num_prompts, num_generations: of one generation.
        row_size: completions of a row.
        num_rows: rows of an optimizer step.
        num_parts: optimizer steps that one generation has different rows for.
        num_iterations: how often each of them is taken.
        num_micro_batches: parts of an optimizer step that gradients are added up over.
    """

    num_prompts: int
    num_generations: int
    row_size: int
    num_rows: int
    num_parts: int
    num_iterations: int
    num_micro_batches: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps of a generation."""
        return self.num_parts * self.num_iterations

    @property
    def num_completions(self) -> int:
        """Of a generation."""
        return self.num_prompts * self.num_generations


def plan(config: GenerationConfig, row_size: int, groups: int, accumulation: int) -> Plan:
    """The numbers of a run with rows of `row_size` completions, for groups of devices that accumulate so many rows.

    Raises:
        ConfigError: they do not divide.
    """
    per_micro = row_size * groups
    steps = config.steps_per_generation or accumulation
    if config.generation_batch_size is not None:
        if config.generation_batch_size % per_micro:
            raise ConfigError(
                f"generation_batch_size is {config.generation_batch_size}; it must be a multiple of the {per_micro} "
                "completions of a micro-batch"
            )
        steps = config.generation_batch_size // per_micro
    if per_micro * steps % config.num_generations:
        raise ConfigError(
            f"a generation has {per_micro * steps} completions; that must be a multiple of num_generations, "
            f"{config.num_generations}: change per_device_train_batch_size or gradient_accumulation_steps"
        )
    prompts = per_micro * steps // config.num_generations
    if config.parts is None:
        if steps % accumulation:
            raise ConfigError(
                f"a generation fills {steps} micro-batches; that must be a multiple of gradient_accumulation_steps, "
                f"{accumulation}"
            )
        parts = steps // accumulation
    else:
        parts = config.parts
        row_size, accumulation = _mini_batch(row_size, steps, parts)
    rows = groups * accumulation
    return Plan(prompts, config.num_generations, row_size, rows, parts, config.passes, accumulation)


def _mini_batch(row_size: int, steps: int, parts: int) -> tuple[int, int]:
    """Completions of a row, and micro-batches, of an optimizer step that has a part of a generation."""
    size, rest = divmod(row_size * steps, parts)
    if rest or (size > row_size and size % row_size):
        raise ConfigError(
            f"num_mini_batches is {parts}; it must divide the {row_size * steps} completions that each data-parallel "
            f"group has of a generation, into whole micro-batches of {row_size} where it has more than that"
        )
    return min(row_size, size), max(1, size // row_size)
