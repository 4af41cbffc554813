"""The feed of methods that learn from completions of the policy: prompts, sampler and rewards.

The policy that trains is the policy that samples: the same arrays, without a copy.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpost.base_model import BaseModel
from jaxpost.compilation import as_written
from jaxpost.completer import as_asked
from jaxpost.data.bad_rows import BadRows
from jaxpost.data.chat import encode_prompt
from jaxpost.data.prompts import Prompts, read_prompts
from jaxpost.data.rows import Rows, as_rows
from jaxpost.data.tokenizer import eos_ids
from jaxpost.errors import ConfigError, DataError
from jaxpost.methods import Method
from jaxpost.models.actor_critic import policy_of
from jaxpost.models.adapters import folded
from jaxpost.objectives.base import Batch
from jaxpost.offline import Run
from jaxpost.options import part_of
from jaxpost.pipeline import rows_of
from jaxpost.processes import agreed, fetch, gathered, is_main
from jaxpost.reward_model import RewardFunction, reward_function, reward_model
from jaxpost.rl.drawn import Sampled
from jaxpost.rl.generate import Completion, generate
from jaxpost.rl.plan import Plan, plan
from jaxpost.rl.report import Recorder
from jaxpost.rl.reward_worker import name_of
from jaxpost.rl.rewards import RewardFunctionsConfig, Rewards
from jaxpost.rl.rollout import Rollouts
from jaxpost.rl.rollout_func import Limits, Policy, RolloutFunction, called, rollout_function
from jaxpost.rl.rows import Answers
from jaxpost.rl.sampling import SamplingConfig
from jaxpost.rl.stopping import stopper
from jaxpost.sharding import batch_groups, put_whole, rows_sharding, token_groups
from jaxpost.train.manifest import DIGEST
from jaxpost.train.state import TrainState, merge
from jaxpost.train.step import InParts, Programs, remembered, split_batch


class Online:
    """Batches of completions of the policy.

    Args:
        method: an entry of METHODS.
        args: the run's config.
        base: the model as it was opened.
        train, held_out: rows with prompts; by default those of `--dataset_name`.
        reward_funcs: names or functions, models too; by default `--reward_funcs`.
        mesh: where batches go.
        folder: of the run.
        rollout_func: what makes the completions, instead of one answer of the policy; by default `--rollout_func`.

    Raises:
        ConfigError, DataError: a flag, a row or a function cannot be used.
    """

    def __init__(
        self,
        method: Method,
        args: Any,
        base: BaseModel,
        train: Any,
        held_out: Any,
        reward_funcs: Sequence[RewardFunction] | RewardFunction | None,
        mesh: Mesh,
        folder: Path,
        rollout_func: RolloutFunction | str | None = None,
    ):
        self.args, self.base, self.mesh, self.folder = args, base, mesh, folder
        self.plan: Plan = plan(
            args, args.per_device_train_batch_size, batch_groups(mesh), args.gradient_accumulation_steps
        )
        train_rows, eval_rows = rows_of(method, args, train, held_out)
        self.prompts = prompts_of(train_rows, args, base)
        self.eval_prompts = None if eval_rows is None else prompts_of(eval_rows, args, base)
        self.rollout_func = rollout_function(args.rollout if rollout_func is None else rollout_func)
        if self.rollout_func is not None and args.is_ahead:
            raise ConfigError("generate_ahead cannot keep what a rollout_func returns over a restart; leave one out")
        if self.rollout_func is not None and jax.process_count() > 1:
            raise ConfigError(
                "a rollout_func runs on one process, with all of its devices: of several, all would have to ask the "
                "model for the same at the same time, which the function's own code cannot be held to"
            )
        self.rewards = agreed(lambda: self._rewards(args.reward_funcs if reward_funcs is None else reward_funcs))
        self.steps_per_epoch = steps_per_epoch(self.plan, self.prompts)
        self.num_steps = args.total_steps(self.steps_per_epoch)

    @property
    def has_held_out(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.eval_prompts is not None

    @property
    def num_micro_batches(self) -> int:
        """Parts of an optimizer step that gradients are added up over."""
        return self.plan.num_micro_batches

    def identity(self) -> dict[str, Any]:
        """What a run that goes on with these completions must have in common with it, beside its flags."""
        numbers = (self.plan.num_prompts, self.plan.num_generations, self.plan.num_parts, self.plan.num_iterations)
        names = ("prompts of a generation", "completions of a prompt", "parts of a generation", "passes over it")
        return {
            "prompts": DIGEST + self.prompts.digest(),
            "rewards": self.rewards.names,
            "rollout function": None if self.rollout_func is None else name_of(self.rollout_func),
            **dict(zip(names, numbers, strict=True)),
        }

    def source(self, run: Run, state: TrainState, step: Programs) -> Rollouts:
        """Completions from the next step on.

        Raises:
            DataError: the processes have not read the same prompts.
        """
        if len(set(gathered(self.prompts.digest()))) > 1:
            raise DataError("the processes have read different prompts; give all of them the same dataset")
        return self._rollouts(run)

    def evaluation(self, run: Run, state: TrainState) -> Callable[[TrainState], dict[str, float]]:
        """Rewards of completions of the held-out prompts."""
        rollouts = self._rollouts(run._replace(start=0, kept=()))
        return lambda state: self._measured(rollouts, state)

    def evaluate(self, run: Run, state: TrainState, rows: Any) -> dict[str, float]:
        """Likewise, once, for the held-out prompts or others."""
        if rows is not None:
            self.eval_prompts = prompts_of(as_rows(rows, "eval_dataset"), self.args, self.base)
        return self._measured(self._rollouts(run), state)

    def close(self) -> None:
        """End the processes of reward functions."""
        self.rewards.close()

    def _measured(self, rollouts: Rollouts, state: TrainState) -> dict[str, float]:
        if self.eval_prompts is None:
            raise ConfigError("nothing to evaluate on: give eval_dataset, or --dataset_name with a test split")
        per_prompt = self.args.num_generations_eval or self.args.num_generations
        values = rollouts.evaluate(state, self.eval_prompts, per_prompt)
        return {f"eval_{name}": value for name, value in values.items()}

    def _rewards(self, given: Sequence[RewardFunction] | RewardFunction | None) -> Rewards:
        args, tokenizer = self.args, self.base.tokenizer
        named = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        named = [each for each in named if each is not None]
        options = {"dtype": args.dtype, "batch_size": args.per_device_eval_batch_size}
        functions = [reward_function(function, tokenizer, **options) for function in named]
        functions += [reward_model(path, "reward_model_path", **options) for path in args.reward_models]
        weights = args.reward_weights
        if weights is not None and len(weights) != len(functions):
            raise ConfigError(f"reward_weights has {len(weights)} numbers for {len(functions)} reward functions")
        return Rewards(functions, part_of(args, RewardFunctionsConfig))

    def _sampler(self, run: Run) -> Callable[[TrainState, Prompts, Sequence[int], int, int], Sampled]:
        """Makes the completions: an answer of the policy each, or what the rollout function returns."""
        args, base, function = self.args, self.base, self.rollout_func
        ends = eos_ids(base.tokenizer, base.generation_config, base.config.hf, base.vocab_size)
        limits = Limits(base.vocab_size, base.config.max_positions, ends)
        options = {
            "eos_ids": ends,
            "sampling": part_of(args, SamplingConfig).knobs(),
            "batch_size": args.rollout_batch_size * token_groups(self.mesh),
            "gather": args.gather_for_generation,
        }

        def complete(state: TrainState, prompts: Prompts, numbers: Sequence[int], each: int, first: int) -> Sampled:
            model = folded(policy_of(merge(run.graphdef, state.params, state.frozen)))
            if function is None:
                ids = [prompts.tokens[i] for i in numbers]
                asked = {"max_new_tokens": args.max_completion_length, "num_return_sequences": each}
                completions = generate(model, ids, **asked, seed=args.seed, first_request=first, **options)
                return Sampled([tokens for tokens in ids for _ in range(each)], completions, {})

            def sample(ids: list[np.ndarray], seed: int, *, stop_strings: list[str], **asked: int) -> list[Completion]:
                stop = stopper(base.tokenizer, stop_strings)
                return generate(model, ids, seed=seed, stop=stop, **asked, **options)

            def encode(prompt: Any) -> np.ndarray:
                return encode_prompt(prompt, base.tokenizer, vocab_size=base.vocab_size, name="rollout_func")

            policy = Policy(encode, sample, args, base.tokenizer, each, key=(args.seed, first))
            asked = [prompts.columns["prompt"][i] for i in numbers]
            return Sampled(*called(function, asked, policy, limits))

        return complete

    def _rollouts(self, run: Run) -> Rollouts:
        args, base = self.args, self.base
        recorder = Recorder(
            self.folder, self.rewards.names, (args.num_completions_to_print or 8) if args.log_completions else 0
        )

        def record(step: int, answers: Answers, advantages: np.ndarray) -> None:
            if not is_main():
                return
            rewards = answers.scored.rewards.T
            columns = {"prompt": [self.prompts.columns["prompt"][i] for i in answers.prompts]}
            columns |= {"completion": answers.texts}
            columns |= {name: _known(values) for name, values in zip(self.rewards.names, rewards, strict=True)}
            recorder(step, columns | answers.scored.columns | {"advantage": advantages.tolist()})
            shown = step % len(answers.texts)
            known = {name: columns[name][shown] for name in self.rewards.names if columns[name][shown] is not None}
            run.show(columns["prompt"][shown], answers.texts[shown], known)

        return Rollouts(
            self.prompts,
            self.plan,
            args,
            complete=self._sampler(run),
            read=self._text,
            rewards=self.rewards,
            weights=args.reward_weights,
            appraise=Appraisal(run, self.plan, self.mesh, stale=args.is_ahead),
            record=record,
            seed=args.seed,
            branches=base.config.reads_branches,
            needs_equal_rewards=run.objective.needs_equal_rewards,
            start=run.start,
            end=self.num_steps,
            kept=jax.device_put(self._fitting(run.kept), rows_sharding(self.mesh)),
        )

    def _fitting(self, kept: Sequence[Batch]) -> Sequence[Batch]:
        """Batches of a checkpoint, if this run can split them.

        Raises:
            ConfigError: they were made for another number of devices or rows.
        """
        parts = batch_groups(self.mesh) * self.plan.num_micro_batches
        rows = {len(batch["tokens"]) for batch in kept if "segments" in batch}
        if any(count % parts for count in rows):
            raise ConfigError(
                f"the checkpoint lies within a generation, whose steps have {max(rows)} rows, which {parts} parts "
                "cannot share; continue it with the --mesh and the batch of config.yaml, or from another checkpoint"
            )
        return kept

    def _text(self, completion: Completion, prompt: Any) -> Any:
        return as_asked(self.base.tokenizer.decode(completion.tokens, skip_special_tokens=True), prompt)


def prompts_of(rows: Rows, args: Any, base: BaseModel) -> Prompts:
    """The prompts of a run; what became of its rows is told in the notes of its model.

    Raises:
        ConfigError, DataError: there is no room for a prompt, or a row cannot be used.
    """
    bad_rows, room = BadRows(args.on_bad_row), base.config.max_positions - args.max_completion_length
    if room < 1:
        raise ConfigError(
            f"max_completion_length is {args.max_completion_length}, but the model reads "
            f"{base.config.max_positions} tokens, prompt and completion together; lower it"
        )
    options = {"vocab_size": base.vocab_size, "max_tokens": room, "bad_rows": bad_rows}
    prompts = read_prompts(rows, base.tokenizer, **options)
    skipped = f"; {bad_rows}" if bad_rows.counts else ""
    base.notes.append(f"{rows.name}: {len(prompts.tokens)} prompts{skipped}")
    return prompts


def steps_per_epoch(plan: Plan, prompts: Prompts) -> int:
    """Optimizer steps in which every prompt is seen once."""
    return max(1, len(prompts.tokens) // plan.num_prompts) * plan.num_steps


class Appraisal:
    """Makes the batches of optimizer steps of the rows of a generation; what it compiles, it compiles once.

    Attributes:
        program: (params, frozen, arrays of the reference, memory, rows) -> batches, and the advantages.
    """

    def __init__(self, run: Run, numbers: Plan, mesh: Mesh, *, stale: bool):
        self._mesh = mesh
        self._fixed = None if run.reference is None else run.reference.arrays
        parts, reused = numbers.num_parts, numbers.num_steps > 1
        pieces = parts * numbers.num_micro_batches

        def appraise(
            params: Any, frozen: Any, arrays: Any, memory: dict[str, jax.Array], batch: Batch
        ) -> tuple[list[Batch], jax.Array]:
            policy = merge(run.graphdef, params, frozen)
            reference = run.reference
            compared = None if reference is None else InParts(reference.build(policy, arrays), pieces)
            batch = remembered(batch, memory)
            given = InParts(policy, pieces), compared, batch
            appraised = run.objective.appraise(*given, reused=reused, stale=stale)
            split = split_batch(appraised, parts)
            return [jax.tree.map(lambda column, i=i: column[i], split) for i in range(parts)], appraised["advantages"]

        # Laid out as `put` does it, so that a step is the same program when they come from a checkpoint.
        self.program = jax.jit(appraise, out_shardings=(rows_sharding(mesh), None), compiler_options=as_written())

    def __call__(self, state: TrainState, batch: Mapping[str, np.ndarray]) -> tuple[list[Batch], np.ndarray]:
        """The batches, and the advantage of each completion [B, S]."""
        arrays = self._fixed if state.reference is None else state.reference
        rows = put_whole(batch, self._mesh)
        batches, advantages = self.program(state.params, state.frozen, arrays, state.memory, rows)
        return batches, fetch(advantages)


def _known(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
