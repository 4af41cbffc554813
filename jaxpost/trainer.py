"""The wiring page: mesh, tokenizer, data, model, state, step -> fit."""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxpost.base_model import open_base
from jaxpost.data.fingerprint import digest
from jaxpost.errors import ConfigError
from jaxpost.locks import run_lock
from jaxpost.methods import CompletionsConfig, Method, OnlineConfig, changed_fields, config_yaml, suited_to
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
from jaxpost.processes import is_main, join
from jaxpost.ref_model import load_reference
from jaxpost.rl.rollout_func import RolloutFunction
from jaxpost.sharding import batch_groups, make_mesh, shardings
from jaxpost.speed import work_of
from jaxpost.train.checkpoint import Checkpoints, Restored
from jaxpost.train.checksum import checksums
from jaxpost.train.evaluate import ComputeMetrics
from jaxpost.train.logging import RunLog
from jaxpost.train.loop import LENGTHS, Loop
from jaxpost.train.manifest import DIGEST
from jaxpost.train.meter import Schedule
from jaxpost.train.optim import check_loraplus, make_optimizer, make_schedule
from jaxpost.train.reference import follow
from jaxpost.train.report import write_curves, write_model_card
from jaxpost.train.spikes import no_norms
from jaxpost.train.state import TrainState, create_state, decay_mask, merge, snapshot
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
    ):
        self.method = method
        self.args = method.config() if args is None else args
        self.output_dir = Path(self.args.output_dir or "trainer_output")
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ConfigError(f"--output_dir {self.output_dir} is a file; give a folder")
        if cache := self.args.compilation_cache_dir:
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
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

    def train(self, resume_from_checkpoint: bool | int | str | None = None) -> dict[str, float]:
        """Run to the end and write the model, its metrics, curves and card to `output_dir`.

        Args:
            resume_from_checkpoint: as the flag; by default what `args` say.

        Returns:
            The last logged metrics of training and evaluation; with load_best_model_at_end those of the best model.

        Raises:
            ConfigError: the folder holds another run, or one that is at work.
            PreemptedError: the process was told to stop; the run is saved.
            NonFiniteError, CheckpointError, RewardError: it cannot go on.
        """
        if resume_from_checkpoint is not None:
            self.args = dataclasses.replace(self.args, resume_from_checkpoint=str(resume_from_checkpoint))
        try:
            lock = run_lock(self.output_dir) if is_main() else nullcontext()
            with lock, watching(self.args, listens=jax.process_count() == 1):
                return self._trained()
        finally:
            self.feed.close()

    def _trained(self) -> dict[str, float]:
        args, total = self.args, self.feed.num_steps
        folder = args.checkpoint_dir or self.output_dir / "checkpoints"
        schedule = make_schedule(args, total)
        optimizer = make_optimizer(args, schedule, decay_mask)
        with jax.set_mesh(self.mesh):
            graphdef, fresh = self._fresh(optimizer)
            with Checkpoints(folder, args, self._identity(total, fresh), self.notes.append) as checkpoints:
                with phase("compile"):
                    state, facts, kept = checkpoints.restore(fresh) or Restored(fresh, {}, [])
                    annotate, step = self._programs(graphdef, state, optimizer, schedule)
                with self._log(total, int(state.step)) as log:
                    checkpoints.tell = log.message
                    given = (self.objective, graphdef, self.reference, annotate, int(state.step), kept)
                    run = Run(*given, show=log.sample)
                    with phase("compile"):
                        loop = Loop(
                            source=self.feed.source(run, state, step),
                            annotate=annotate,
                            step=step,
                            evaluate=self.feed.evaluation(run, state) if args.evaluates else None,
                            checkpoints=checkpoints,
                            schedule=self._schedule(total),
                            log=log,
                            work=work_of(self.base.config, self.mesh, is_frozen=active_config(self.policy) is not None),
                        )
                    state, best = loop.fit(state, facts), {}
                    with phase("save"):
                        checkpoints.finish()
                    if args.load_best_model_at_end:
                        state, best = checkpoints.best(state)
                        log.message(f"the best model is that of step {int(state.step)}: {best[args.best_metric]:.6g}")
        with phase("save"):
            self._take(graphdef, state)
            self.save_model(self.output_dir)
            return self._report(best)

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

    def save_model(self, path: str | os.PathLike[str]) -> None:
        """Write the model as it is now to a Hugging Face folder, or its adapter in PEFT's format.

        A value model that is trained beside it is written to `value_model/` in there.
        """
        name, revision = self.base.base
        if active_config(self.policy) is None:
            save_pretrained(self.policy, self.processing_class, path, generation_config=self.base.generation_config)
        else:
            save_adapter(self.policy, path, name, revision=revision, tokenizer=self.processing_class)
        if isinstance(self.model, ActorCritic):
            save_critic(self.model, Path(path) / "value_model", self.base.base, self.processing_class)

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

    def _schedule(self, total: int) -> Schedule:
        args, per_epoch = self.args, self.feed.steps_per_epoch
        return Schedule(
            total_steps=total,
            steps_per_epoch=per_epoch,
            log_every=args.logging_steps,
            log_first=args.logging_first_step,
            evaluate_first=args.eval_on_start,
            evaluate_every={"no": None, "steps": args.eval_steps or args.logging_steps, "epoch": per_epoch}[
                args.eval_strategy
            ],
            save_every={"no": None, "steps": args.save_steps, "epoch": per_epoch}[args.save_strategy],
        )

    def _log(self, total: int, start: int) -> RunLog:
        log = RunLog(self.output_dir, self.args, total_steps=total, start_step=start, is_main=is_main())
        if is_main():
            (self.output_dir / "config.yaml").write_text(config_yaml(self.args), encoding="utf-8")
        for note in self.notes:
            log.message(note)
        if start:
            log.message(f"going on from step {start} of {total}" if start < total else f"all {total} steps are done")
        return log

    def _report(self, best: dict[str, float]) -> dict[str, float]:
        """Curves and model card; returns the last metrics, in whose place those of the best model may stand."""
        if not is_main():
            return {}
        metrics: dict[str, float] = {}
        for line in (self.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            metrics |= json.loads(line)
        metrics |= best
        write_curves(self.output_dir)
        write_model_card(
            self.output_dir,
            base_model=self.base.name,
            dataset=self.args.dataset_name or "rows given in Python",
            method=self.method.name,
            config=changed_fields(self.args),
            versions={name: version(name) for name in ("jaxpost", "jax", "flax", "optax", "transformers")},
            metrics=metrics,
            command=shlex.join(["jaxpost", *sys.argv[1:]]),
        )
        return metrics
