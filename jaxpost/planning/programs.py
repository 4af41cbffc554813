"""The programs of a run, lowered for devices that may not be here: those that training would compile."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxpost.errors import ConfigError
from jaxpost.methods import Method, suited_to
from jaxpost.models.actor_critic import trainable_of
from jaxpost.models.config import ModelConfig
from jaxpost.models.lora_config import LoraConfig
from jaxpost.offline import Run
from jaxpost.online import Appraisal
from jaxpost.options import part_of
from jaxpost.planning.abstract import (
    abstract_model,
    abstract_reference,
    at_hand_on_mesh,
    bytes_per_device,
    rows_on_mesh,
    slots_on_mesh,
)
from jaxpost.planning.batches import generation, offline_batch
from jaxpost.rl import plan as rollouts
from jaxpost.rl import slots
from jaxpost.rl.generate import MOST_PROMPTS, bucket, cache_lengths, power
from jaxpost.rl.sampling import SamplingConfig
from jaxpost.sharding import batch_groups, token_groups
from jaxpost.train.optim import make_optimizer, make_schedule
from jaxpost.train.reference import Reference
from jaxpost.train.state import TrainState, abstract_state, decay_mask
from jaxpost.train.step import make_annotate, make_step

STEP = "train step"
STEPS = 1000  # of the schedule, whose program does not depend on it


class Program(NamedTuple):
    """One of the programs of a run.

    Attributes:
        name: train step, reference, ...
        lower: for the compiler.
        times: how often it runs in an optimizer step.
        open_trips: how often a loop runs whose end only the run decides; None for its bound.
        held: bytes of a device that it is given beside the state.
    """

    name: str
    lower: Callable[[], Any]
    times: float = 1.0
    open_trips: float | None = None
    held: int = 0


class Planned(NamedTuple):
    """A run that is only planned.

    Attributes:
        args: its config, resolved for the model.
        mesh: of devices that may not be here.
        config: of the model.
        state: abstract.
        reference: arrays that are compared with, where they are not the policy's.
        batch: of an optimizer step.
        num_tokens: of such a batch.
        text_length: tokens of each text in it.
        programs: what would be compiled.
    """

    args: Any
    mesh: Mesh
    config: ModelConfig
    state: TrainState
    reference: Any
    batch: Any
    num_tokens: int
    text_length: int
    programs: list[Program]


def planned(
    method: Method,
    args: Any,
    config: ModelConfig,
    mesh: Mesh,
    prompt_length: int,
    *,
    adapter: LoraConfig | None = None,
    rows: dict[str, np.ndarray] | None = None,
) -> Planned:
    """The programs of a run on the mesh, which is set (jax.set_mesh).

    Args:
        method, args: of the run.
        config: of its model.
        mesh: of devices that may not be here.
        prompt_length: tokens of each prompt, of methods that sample.
        adapter: that is trained, where the flags do not say so.
        rows: a batch of rows from disk; by default a full one.
    """
    args = suited_to(args, config)
    quantization, lora = args.quantization(), args.lora_config() if args.use_peft and adapter is None else adapter
    if quantization is not None and lora is None:
        raise ConfigError("kernels in few bits cannot be trained themselves; add --use_peft")
    critic = args.value_model if method.has_critic else None
    common = {"dtype": args.dtype, "compute": args.compute()}
    model = abstract_model(
        config, mesh, head=method.head, quantization=quantization, lora=lora, critic=critic, **common
    )
    objective = part_of(args, method.objective)
    schedule = make_schedule(args, STEPS)
    optimizer = make_optimizer(args, schedule, decay_mask)
    graphdef, state = abstract_state(
        model, optimizer, trainable_of(model), mesh, objective.remembers, offload_optimizer=args.offload_optimizer
    )
    reference = None
    if objective.needs_reference and not args.precompute_ref_log_probs:
        reference = abstract_reference(config, mesh, has_adapter=lora is not None, **common)
    run = Run(objective, graphdef, reference, lambda state, batch: batch, 0)
    if method.is_online:
        batch, num_micro, programs = _online(args, run, state, mesh, prompt_length)
    else:
        rows = offline_batch(method, args, batch_groups(mesh)) if rows is None else rows
        if objective.needs_reference and reference is None:
            rows = rows | dict.fromkeys(objective.reference_columns, rows["examples"])  # it has been asked before
        batch, num_micro, programs = _offline(args, run, state, mesh, rows)
    options = {"max_grad_norm": args.max_grad_norm, "num_micro_batches": num_micro}
    step = make_step(objective, graphdef, state, optimizer, schedule, **options)
    programs = [Program(STEP, lambda: step.lower(state, batch)), *programs]
    if method.is_online:
        policy = abstract_model(config, mesh, **common)
        programs += _sampling(policy, args, mesh, prompt_length)
    arrays = None if reference is None else reference.arrays
    num_tokens = int(np.prod(batch["tokens"].shape))
    whole = int(batch["tokens"].shape[-1])
    length = prompt_length + args.max_completion_length if method.is_online else args.max_length or whole
    return Planned(args, mesh, config, state, arrays, batch, num_tokens, length, programs)


def _offline(
    args: Any, run: Run, state: TrainState, mesh: Mesh, rows: dict[str, np.ndarray]
) -> tuple[Any, int, list[Program]]:
    """The batch of a step, its micro-batches, and what is asked before it."""
    num_micro = args.gradient_accumulation_steps
    batch, arrays = rows_on_mesh(rows, mesh), _arrays(run.reference)

    def annotate(state: TrainState, arrays: Any, batch: Any) -> Any:
        reference = None if run.reference is None else run.reference._replace(arrays=arrays)
        return make_annotate(run.objective, run.graphdef, reference, num_parts=num_micro)(state, batch)

    annotated = rows_on_mesh(jax.eval_shape(annotate, state, arrays, batch), mesh)
    ask = Program("reference", lambda: jax.jit(annotate).lower(state, arrays, batch))
    return annotated, num_micro, [] if run.reference is None else [ask]


def _arrays(reference: Reference | None) -> Any:
    return None if reference is None else reference.arrays


def _online(args: Any, run: Run, state: TrainState, mesh: Mesh, prompt_length: int) -> tuple[Any, int, list[Program]]:
    """Likewise, of the rows of a generation."""
    numbers = _rollout_plan(args, mesh)
    num_rewards = max(1, len(args.reward_funcs or ()) + len(args.reward_models))
    rows = rows_on_mesh(generation(numbers, prompt_length, args.max_completion_length, num_rewards), mesh)
    appraise = Appraisal(run, numbers, mesh, stale=args.is_ahead).program
    given = state.params, state.frozen, _arrays(run.reference), state.memory, rows
    batches, _ = jax.eval_shape(appraise, *given)
    program = Program("appraisal", lambda: appraise.lower(*given), 1 / numbers.num_steps)
    annotated = jax.eval_shape(make_annotate(run.objective, run.graphdef), state, rows_on_mesh(batches[0], mesh))
    return rows_on_mesh(annotated, mesh), numbers.num_micro_batches, [program]


def _rollout_plan(args: Any, mesh: Mesh) -> rollouts.Plan:
    return rollouts.plan(args, args.per_device_train_batch_size, batch_groups(mesh), args.gradient_accumulation_steps)


def _sampling(policy: Any, args: Any, mesh: Mesh, prompt_length: int) -> list[Program]:
    """Prompts are read, and tokens drawn, as in `rl.generate` with all slots in use."""
    numbers, new = _rollout_plan(args, mesh), args.max_completion_length
    rows = min(power(args.rollout_batch_size * token_groups(mesh)), power(numbers.num_completions))
    graphdef, state = nnx.split(policy)
    weights = nnx.to_pure_dict(state)
    length = bucket(prompt_length)
    programs = slots.Programs(graphdef, new, cache_lengths(length, new)[-1], args.gather_for_generation)
    empty = jax.eval_shape(lambda weights: programs.empty(weights, rows), weights)
    filled, near, gathering = slots_on_mesh(empty, mesh), (weights, None), []
    held = bytes_per_device(filled)
    if args.gather_for_generation:
        others, layers = at_hand_on_mesh(jax.eval_shape(programs.at_hand, weights), mesh)
        near = {**others, "layers": weights["layers"]}, layers
        held += bytes_per_device((others, layers))
        gathering = [Program("weights at hand", lambda: programs.at_hand.lower(weights), 1 / numbers.num_steps)]
    prompts = min(MOST_PROMPTS, power(numbers.num_prompts))
    replicated = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    admitted = min(rows, prompts * numbers.num_generations)
    each = replicated((admitted,))
    admit = [replicated((prompts, length)), replicated((prompts,)), each, each, each, each]
    sampling = part_of(args, SamplingConfig).knobs()
    decode = [replicated((1,)), sampling, 0, rows, new]
    batches = numbers.num_completions / rows / numbers.num_steps
    reads = numbers.num_prompts / prompts / numbers.num_steps
    return [
        *gathering,
        Program("prefill", lambda: programs.admit.lower(weights, filled, *admit), reads, held=held),
        Program("decode, a token", lambda: programs.decode.lower(*near, filled, *decode), batches * new, 1.0, held),
    ]
