"""The feed of methods that learn from rows on disk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxpost.data.loader import Loader
from jaxpost.data.rows import as_rows
from jaxpost.encode import Encoded
from jaxpost.errors import ConfigError
from jaxpost.metrics import Metric
from jaxpost.objectives.base import Batch, Objective
from jaxpost.options import one_of
from jaxpost.pipeline import Pipeline
from jaxpost.prompt_weights import Embedder, PromptWeights, identity
from jaxpost.sharding import put
from jaxpost.train.evaluate import ComputeMetrics, Evaluation
from jaxpost.train.manifest import DIGEST
from jaxpost.train.precompute import precomputed
from jaxpost.train.reference import Reference
from jaxpost.train.state import TrainState
from jaxpost.train.step import Programs


class Run(NamedTuple):
    """What a feed is told of the run that it feeds.

    Attributes:
        objective: the method.
        graphdef: of the model.
        reference: None where the method needs none.
        annotate: the compiled annotation of a step's batch.
        start: steps that are done already.
        kept: what the source has kept of the batches that the next step goes on with.
        show: (prompt, completion, reward by function) -> None: lets the user see a completion.
    """

    objective: Any
    graphdef: Any
    reference: Reference | None
    annotate: Callable[[TrainState, Batch], Batch]
    start: int
    kept: Sequence[Batch] = ()
    show: Callable[[Any, Any, Mapping[str, float]], None] = lambda prompt, completion, rewards: None


class Read(NamedTuple):
    """A batch of rows; see `train.loop.Fed`."""

    batch: Batch
    metrics: Mapping[str, Metric] = {}
    times: Mapping[str, float] = {}


class RowSource:
    """Batches in order; see `train.loop.Source`."""

    ahead = True

    def __init__(self, batches: Iterator[Batch]):
        self._batches = batches

    def __call__(self, state: TrainState) -> Read:
        return Read(next(self._batches))

    def kept(self) -> list[Batch]:
        """Nothing: rows are read anew."""
        return []


class Offline:
    """Batches of rows from disk, which do not depend on the state.

    Args:
        pipeline: makes batches of rows.
        train, held_out: as of `Pipeline.loaders`.
        mesh: where batches go.
        compute_metrics: makes further metrics of evaluation.

    Raises:
        ConfigError, DataError: as `Pipeline.loaders`; or `compute_metrics` has nothing to compute of.
    """

    def __init__(
        self, pipeline: Pipeline, train: Any, held_out: Any, mesh: Mesh, compute_metrics: ComputeMetrics | None
    ):
        self.pipeline, self.mesh, self.compute_metrics = pipeline, mesh, compute_metrics
        self.loader, self.eval_loader = pipeline.loaders(train, held_out)
        if compute_metrics is not None and self.loader.packs.facts is None:
            name = pipeline.method.name
            raise ConfigError(f"compute_metrics is given the reward of every example, but {name} has no rewards")
        self._identity: dict[str, Any] = {}
        self._weigh: Callable[[Loader], None] = lambda loader: None

    @property
    def has_held_out(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.eval_loader is not None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.loader.num_steps

    @property
    def num_micro_batches(self) -> int:
        """Parts of an optimizer step that gradients are added up over."""
        return self.pipeline.args.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every row is seen once."""
        return self.loader.steps_per_epoch

    def identity(self) -> dict[str, Any]:
        """What a run that goes on with these batches must have in common with it, beside its flags."""
        rows = {"rows": DIGEST + self.loader.packs.digest(), "rows of a step": self.pipeline.train_size()}
        return rows | self._identity

    def source(self, run: Run, state: TrainState, step: Programs) -> RowSource:
        """Batches from the next step on, on the devices before they are needed; compiles the step for their shapes."""
        for length in self.loader.lengths:
            step.prepare(state, run.annotate(state, put(self.loader.empty(length), self.mesh)))
        return RowSource(self.loader(run.start, partial(put, mesh=self.mesh)))

    def evaluation(self, run: Run, state: TrainState) -> Callable[[TrainState], dict[str, float]]:
        """Evaluation in the run; a metric that tells which checkpoint is best must be among those that it makes."""
        args, evaluation = self.pipeline.args, self._evaluation(run.objective, run.graphdef, run.reference)
        if args.load_best_model_at_end and self.compute_metrics is None:
            one_of("metric_for_best_model", args.best_metric, sorted(evaluation.names(state)))
        return evaluation

    def evaluate(self, run: Run, state: TrainState, rows: Any) -> dict[str, float]:
        """Metrics of a state over the held-out rows, or others."""
        if rows is not None:
            if run.objective.needs_reference and run.reference is None:
                raise ConfigError(
                    "precompute_ref_log_probs has asked the reference already: give eval_dataset from the start"
                )
            self.eval_loader = self.pipeline.eval_loader(as_rows(rows, "eval_dataset"))
            self._weigh(self.eval_loader)
        if self.eval_loader is None:
            raise ConfigError("nothing to evaluate on: give eval_dataset, or --dataset_name with a test split")
        return self._evaluation(run.objective, run.graphdef, run.reference)(state)

    def close(self) -> None:
        """Nothing to end."""

    def ask(self, objective: Objective, policy: Any, reference: Reference) -> None:
        """Let batches tell what the reference says of their examples, so that it is needed no more."""
        args = self.pipeline.args
        model = reference.build(policy, reference.arrays)
        rows = args.precompute_ref_batch_size or args.per_device_train_batch_size
        for loader in filter(None, (self.loader, self.eval_loader)):
            once = self.pipeline.once(Encoded(loader.packs, full=False, notes=[], mismatch=loader.mismatch), rows)
            for column in objective.reference_columns:
                with jax.set_mesh(self.mesh):
                    values = precomputed(objective, column, model, once, self.mesh, args.tokenized_cache_dir)
                loader.tell(column, values)

    def weigh(self, open_embedder: Callable[[], Embedder]) -> None:
        """Let batches tell what the loss of each example is multiplied with, by its prompt.

        Raises:
            ConfigError: the embeddings of the prompts cannot be used.
        """
        embedder, train = open_embedder(), self.loader
        weights = PromptWeights(self.pipeline.args, self.pipeline.tokenizer, embedder, train.packs.examples)
        for loader in filter(None, (train, self.eval_loader)):
            weights.tell(loader, embedder)
        self.pipeline.notes.append(weights.note(train))
        self._identity = identity(train, embedder)
        self._weigh = lambda loader: weights.tell(loader, open_embedder())

    def _evaluation(self, objective: Objective, graphdef: Any, reference: Reference | None) -> Evaluation:
        assert isinstance(self.eval_loader, Loader)
        return Evaluation(objective, graphdef, reference, self.eval_loader, self.mesh, self.compute_metrics)
