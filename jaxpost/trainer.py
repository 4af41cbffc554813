"""The wiring page: mesh, tokenizer, data, model, state, step -> fit."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxpost.base_model import open_base
from jaxpost.compilation import keep_programs
from jaxpost.data.fingerprint import digest
from jaxpost.errors import ConfigError
from jaxpost.hub import Repository
from jaxpost.locks import run_lock
from jaxpost.methods import CompletionsConfig, Method, OnlineConfig, suited_to
from jaxpost.models.actor_critic import ActorCritic, save_critic, trainable_of
from jaxpost.models.adapters import active_config
from jaxpost.models.export import save_pretrained
from jaxpost.models.lora import with_dropout
from jaxpost.models.lora_config import LoraConfig, PeftConfig, as_lora_config
from jaxpost.models.peft import save_adapter
from jaxpost.models.transformer import Decoder
from jaxpost.objectives.base import Batch, Objective
from jaxpost.offline import Offline, Run
from jaxpost.online import Online
from jaxpost.options import lasting, part_of
from jaxpost.pipeline import Pipeline
from jaxpost.processes import agreed, is_main, join
from jaxpost.prompt_embeddings import EmbeddingFunction, embedder_of
from jaxpost.prompt_weights import PromptWeightsConfig
from jaxpost.record import TrainOutput, history, last_metrics, open_log, write_report
from jaxpost.ref_model import load_reference
from jaxpost.rl.rollout_func import RolloutFunction
from jaxpost.sharding import batch_groups, make_mesh, shardings
from jaxpost.speed import work_of
from jaxpost.train.callbacks import TrainerState, as_callbacks
from jaxpost.train.checkpoint import Checkpoints, Restored
from jaxpost.train.checksum import checksums
from jaxpost.train.evaluate import ComputeMetrics
from jaxpost.train.loop import LENGTHS, Loop
from jaxpost.train.manifest import DIGEST
from jaxpost.train.meter import Rhythm, Schedule
from jaxpost.train.optim import check_loraplus, make_optimizer, make_schedule
from jaxpost.train.reference import follow
from jaxpost.train.spikes import no_norms
from jaxpost.train.state import TrainState, create_state, decay_mask, merge, snapshot
from jaxpost.train.steering import Callbacks, joined
from jaxpost.train.step import Programs, make_annotate, make_step
from jaxpost.value_model import load_value_model
from jaxpost.watch import phase, watching

Feed = Offline | Online


class Trainer:
    """One run: everything is checked and loaded when it is made; `train()` runs it and writes the result.

    Args:
        method: an entry of METHODS.
        model: hub id, folder, .gguf file or a model of `jaxpost.from_pretrained`, which is trained in place; by
            default `args.model_name_or_path`.
        args: the method's config.
        train_dataset: rows (a `datasets.Dataset` or a list of dicts); by default `args.dataset_name`.
        eval_dataset: likewise, for evaluation.
        processing_class: a transformers tokenizer; by default the model's. Tokens added to it grow the model.
        formatting_func: makes the text to train on from a row.
        peft_config: the adapter to train, ours or a `peft.LoraConfig`; by default what `args` say.
        ref_model: what the policy is compared with, by methods that do; by default what `args` say.
        compute_metrics: further metrics of evaluation, of an `EvalPrediction` with the reward of every example.
        reward_funcs: what completions are rewarded by, of methods that sample them: names, functions or reward models.
        rollout_func: makes the completions, of methods that compare those of a prompt; see `jaxpost.rl.rollout_func`.
        value_model: what a value model of its own starts from, of methods that train one; by default what `args` say.
        embedding_func: texts -> [N, E], of methods that weigh prompts; by default `args.embedding_model` embeds them.
        callbacks: see `train.callbacks.TrainerCallback`; those of transformers' too.

    Attributes:
        args, model, processing_class: of the run, as they are used.
        state: where it is, and what it has logged.

    Raises:
        ConfigError, DataError: one line each, before anything is written.
    """

    def __init__(
        self,
        method: Method,
        model: str | os.PathLike[str] | Decoder | None = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        formatting_func: Callable[[Mapping[str, Any]], str] | None = None,
        peft_config: LoraConfig | PeftConfig | None = None,
        ref_model: str | os.PathLike[str] | Decoder | None = None,
        compute_metrics: ComputeMetrics | None = None,
        reward_funcs: Any = None,
        rollout_func: RolloutFunction | str | None = None,
        value_model: str | os.PathLike[str] | Decoder | None = None,
        embedding_func: EmbeddingFunction | None = None,
        callbacks: Sequence[Any] | None = None,
    ):
        self.method, self.callbacks = method, as_callbacks(callbacks)
        self.args = _checked(method, args, compute_metrics)
        self.output_dir = Path(self.args.output_dir or "trainer_output")
        keep_programs(self.args)
        join(self.args)
        self.mesh = make_mesh(self.args.mesh)
        lora = self.args.lora_config() if self.args.use_peft else None
        lora = lora if peft_config is None else as_lora_config(peft_config)
        self.base = open_base(model, self.args, processing_class, self.mesh, lora, method.head)
        self.processing_class, self.notes = self.base.tokenizer, self.base.notes
        self.args = suited_to(self.args, self.base.config)
        self.objective: Objective = part_of(self.args, method.objective)
        if method.is_online:
            given = (train_dataset, eval_dataset, reward_funcs, self.mesh, self.output_dir, rollout_func)
            self.feed: Feed = Online(method, self.args, self.base, *given)
        else:
            groups, rows = batch_groups(self.mesh), (train_dataset, eval_dataset)
            shared = (self.processing_class, self.base.vocab_size, groups, self.notes, formatting_func)
            self.feed = Offline(Pipeline(method, self.args, *shared), *rows, self.mesh, compute_metrics)
            weighs = isinstance(self.args, PromptWeightsConfig)
            if weighs and (embedder := embedder_of(self.args, embedding_func, self.mesh)) is not None:
                self.feed.weigh(embedder)
        self.policy: Decoder = self.base.load()
        self.model: Decoder | ActorCritic = self.policy
        if method.has_critic:
            options = {"lora": lora, "tokenizer": self.processing_class, "notes": self.notes}
            self.model = load_value_model(self.policy, value_model, self.args, self.mesh, **options)
        self.trainable = trainable_of(self.model)
        check_loraplus(self.args, nnx.to_pure_dict(nnx.state(self.model, self.trainable)))
        self.memory = {name: jnp.zeros(()) for name in self.objective.remembers}
        self.reference = None
        if self.objective.needs_reference:
            compared = ref_model or self.args.ref_model_name_or_path
            self.reference = load_reference(self.policy, compared, self.args, self.mesh, goes_on=lora is None)
            if self.args.precompute_ref_log_probs and isinstance(self.feed, Offline):
                self.feed.ask(self.objective, self.policy, self.reference)
                self.reference = None
        self.schedule = Schedule.of(self.args, self.feed.num_steps, self.feed.steps_per_epoch)
        self.state = TrainerState.of(self.args, self.schedule, [])

    def train(self, resume_from_checkpoint: bool | int | str | None = None) -> TrainOutput:
        """Run to the end and write the model, its metrics, curves and card to `output_dir`.

        Args:
            resume_from_checkpoint: as the flag; by default what `args` say.

        Returns:
            The last logged metrics of training and evaluation; with load_best_model_at_end those of the best model.
            Also what transformers returns: `.global_step`, `.training_loss`, `.metrics`.

        Raises:
            ConfigError: the folder holds another run, or one that is at work.
            PreemptedError: the process was told to stop; the run is saved.
            NonFiniteError, CheckpointError, RewardError: it cannot go on.
            HubError: the model cannot be pushed.
        """
        if resume_from_checkpoint is not None:
            self.args = dataclasses.replace(self.args, resume_from_checkpoint=str(resume_from_checkpoint))
        try:
            lock = run_lock(self.output_dir) if is_main() else nullcontext()
            with lock, watching(self.args, listens=jax.process_count() == 1):
                return self._trained()
        finally:
            self.feed.close()

    def _trained(self) -> TrainOutput:
        args, total, began = self.args, self.feed.num_steps, time.monotonic()
        folder = args.checkpoint_dir or self.output_dir / "checkpoints"
        schedule = make_schedule(args, total)
        optimizer = make_optimizer(args, schedule, decay_mask)
        repository = self._repository() if args.push_to_hub else None
        with jax.set_mesh(self.mesh):
            graphdef, fresh = self._fresh(optimizer)
            with Checkpoints(folder, args, self._identity(total, fresh), self.notes.append) as checkpoints:
                with phase("compile"):
                    state, facts, kept = checkpoints.restore(fresh) or Restored(fresh, {}, [])
                    annotate, step = self._programs(graphdef, state, optimizer, schedule)
                start = int(state.step)
                with open_log(self.output_dir, args, self.notes, total, start) as log:
                    checkpoints.tell = log.message
                    given = (self.objective, graphdef, self.reference, annotate, start, kept)
                    run = Run(*given, show=log.sample)
                    with phase("compile"):
                        evaluates = args.evaluates or (bool(self.callbacks) and self.feed.has_held_out)
                        loop = Loop(
                            source=self.feed.source(run, state, step),
                            annotate=annotate,
                            step=step,
                            evaluate=self.feed.evaluation(run, state) if evaluates else None,
                            checkpoints=checkpoints,
                            schedule=self.schedule,
                            log=log,
                            work=work_of(self.base.config, self.mesh, is_frozen=active_config(self.policy) is not None),
                        )
                    remembered, given = facts.pop("callbacks", None), {"processing_class": self.processing_class}
                    self.state = TrainerState.of(args, self.schedule, history(self.output_dir), start)
                    if self.callbacks:
                        loop = joined(loop, self.callbacks, args, self.state, remembered, log.message, given)
                    state, best = loop.fit(state, facts), {}
                    with phase("save"):
                        checkpoints.finish()
                    if args.load_best_model_at_end:
                        state, best = checkpoints.best(state)
                        log.message(f"the best model is that of step {int(state.step)}: {best[args.best_metric]:.6g}")
        with phase("save"):
            self._take(graphdef, state)
            self.save_model(self.output_dir)
            output = self._reported(best, start, began, loop.schedule)
        if args.push_to_hub:
            agreed(lambda: repository.push() if repository is not None else None)
        return output

    def _reported(self, best: dict[str, float], start: int, began: float, schedule: Rhythm) -> TrainOutput:
        """Write the report; what the run has come to."""
        rows = history(self.output_dir)
        last = last_metrics(rows, best)
        if is_main():
            write_report(self.output_dir, self.method.name, self.args, self.base.name, last)
        if isinstance(schedule, Callbacks):
            schedule.tell("on_train_end", model=self.model)
        else:
            self.state = TrainerState.of(self.args, self.schedule, rows)
        return TrainOutput(last, rows, time.monotonic() - began, start)

    def _fresh(self, optimizer: optax.GradientTransformation) -> tuple[Any, TrainState]:
        """(graphdef, state) before the first step."""
        args, remembers = self.args, self.objective.remembers
        offload = {"offload_optimizer": args.offload_optimizer}
        graphdef, state = create_state(self.model, optimizer, self.trainable, self.mesh, remembers, **offload)
        if args.skip_spikes is not None:
            norms = no_norms()
            state = dataclasses.replace(state, norms=jax.device_put(norms, shardings(norms, self.mesh)))
        if self._follows:
            assert self.reference is not None
            state = dataclasses.replace(state, reference=self.reference.arrays)
        return graphdef, state

    def _programs(
        self, graphdef: Any, state: TrainState, optimizer: optax.GradientTransformation, schedule: optax.Schedule
    ) -> tuple[Callable[[TrainState, Batch], Batch], Programs]:
        """Annotation and step."""
        args, num_parts = self.args, self.feed.num_micro_batches
        step = make_step(
            self.objective,
            graphdef,
            state,
            optimizer,
            schedule,
            max_grad_norm=args.max_grad_norm,
            num_micro_batches=num_parts,
            seed=args.seed,
            training=self._as_trained,
            follow=follow(args, self._followed) if self._follows else lambda state: None,
            skip_spikes=args.skip_spikes,
        )
        return make_annotate(self.objective, graphdef, self.reference, num_parts=num_parts), Programs(step)

    def _take(self, graphdef: Any, state: TrainState) -> None:
        """Make the model, and a reference that follows it, what a state says."""
        nnx.update(self.model, nnx.state(merge(graphdef, state.params, state.frozen)))
        if self._follows and self.reference is not None:
            self.reference = self.reference._replace(arrays=state.reference)
        self.memory = state.memory

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Held-out metrics of the model as it is now, by names that begin with `eval_`."""
        graphdef, state = snapshot(self.model, self.trainable, self.memory)
        run = Run(self.objective, graphdef, self.reference, lambda state, batch: batch, 0)
        with jax.set_mesh(self.mesh):
            return self.feed.evaluate(run, state, eval_dataset)

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Write the model as it is now to a Hugging Face folder, or its adapter in PEFT's format.

        A value model that is trained beside it is written to `value_model/` in there. By default to `args.output_dir`.
        """
        path = self.output_dir if output_dir is None else output_dir
        name, revision = self.base.base
        if active_config(self.policy) is None:
            save_pretrained(self.policy, self.processing_class, path, generation_config=self.base.generation_config)
        else:
            save_adapter(self.policy, path, name, revision=revision, tokenizer=self.processing_class)
        if isinstance(self.model, ActorCritic):
            save_critic(self.model, Path(path) / "value_model", self.base.base, self.processing_class)

    def add_callback(self, callback: Any) -> None:
        """One more of `callbacks`."""
        self.callbacks += as_callbacks([callback])

    def push_to_hub(
        self, commit_message: str = "End of training", *, token: str | None = None, revision: str | None = None
    ) -> Any:
        """Write the model as it is now to `output_dir` and push it to the Hub; see `args.hub_model_id`.

        Returns:
            huggingface_hub's CommitInfo, on the main process.

        Raises:
            HubError: the Hub refuses, or cannot be reached.
        """
        repository = self._repository(token)
        self.save_model()
        return agreed(lambda: repository.push(commit_message, revision) if repository is not None else None)

    def _repository(self, token: str | None = None) -> Repository | None:
        """Where the model is pushed, on the main process; made before anything else, so that a fault shows early."""
        return agreed(lambda: Repository(self.args, self.output_dir, token) if is_main() else None)

    def log_metrics(self, split: str, metrics: Mapping[str, float]) -> None:
        """Print metrics; `split` is their heading."""
        if is_main():
            width = max(map(len, metrics), default=0)
            print("\n".join([f"{split}:", *(f"  {name:{width}} = {value:.6g}" for name, value in metrics.items())]))

    def save_metrics(self, split: str, metrics: Mapping[str, float]) -> None:
        """Write metrics to `{split}_results.json` in `output_dir`."""
        if is_main():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            (self.output_dir / f"{split}_results.json").write_text(json.dumps(dict(metrics), indent=1) + "\n")

    @property
    def _follows(self) -> bool:
        """Whether the reference changes, and so is part of the state."""
        return self.reference is not None and self.args.sync_ref_model

    def _identity(self, total: int, state: TrainState) -> dict[str, Any]:
        """What this run, of so many steps and with this fresh state, and one that it continues have in common."""
        told = {name: value for name, value in lasting(self.args).items() if name not in LENGTHS}
        if self.args.depends_on_length:
            told["steps of the learning-rate schedule"] = total
        reference = None if self.reference is None or self._follows else self.reference.arrays
        weights = digest(*map(int, jax.device_get(checksums((state.params, state.frozen, reference))[0])))
        template = digest(self.processing_class.chat_template)
        return told | self.feed.identity() | {"weights": DIGEST + weights, "chat template": DIGEST + template}

    def _followed(self, params: Any) -> Any:
        """Of the parameters those that a reference that follows is a copy of."""
        return params["policy"] if isinstance(self.model, ActorCritic) else params

    def _as_trained(self, model: Any, key: jax.Array) -> Any:
        """The model with the dropout of its adapters, unless the method's config says otherwise."""
        is_steady = isinstance(self.args, CompletionsConfig | OnlineConfig) and self.args.disable_dropout
        return model if is_steady else with_dropout(model, key)


def _checked(method: Method, args: Any, compute_metrics: ComputeMetrics | None) -> Any:
    """The config of a run.

    Raises:
        ConfigError: it is one of another method, or cannot be.
    """
    args = method.config() if args is None else args
    if not isinstance(args, method.config):
        given, wanted = type(args), method.config.__name__
        raise ConfigError(f"args is a {given.__module__}.{given.__name__}; give a jaxpost.{wanted}")
    if compute_metrics is not None and method.is_online:
        raise ConfigError(f"compute_metrics is given the reward of every example, but {method.name} has no examples")
    if args.output_dir is not None and Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise ConfigError(f"--output_dir {args.output_dir} is a file; give a folder")
    return args
