"""The contract between a method and everything else.

> source -> annotate -> step. A source yields a batch; the objective annotates it with everything that needs no
> gradient; one pure step takes the gradient of the loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float, Int

from jaxpost.errors import ConfigError
from jaxpost.metrics import Mean, Metric
from jaxpost.options import option

Batch = dict[str, Array]  # the leading axis of every column is the example


@runtime_checkable
class Model(Protocol):
    """What an objective sees of a model, through `logps` and `sequences` only."""

    def hidden(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]: ...

    def unembed(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]: ...

    def unembedding(self) -> Partial:
        """`unembed` as a function that is a tree, whose leaves are the arrays that it needs."""
        ...

    def score(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows"]: ...


@runtime_checkable
class Objective(Protocol):
    """A method: a frozen dataclass whose fields are its hyperparameters.

    Attributes:
        remembers: columns [B] that `annotate` is given as it left them at the step before, 0 at first; all rows alike.
            An online objective's `appraise` is given them too.
    """

    remembers: ClassVar[tuple[str, ...]]

    @property
    def needs_reference(self) -> bool:
        """Whether `annotate` is to be given a reference model."""
        ...

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """Columns [B, S] that `annotate` asks the reference for, and needs none where a batch has them."""
        ...

    def annotate(self, policy: Model, reference: Model | None, batch: Batch) -> Batch:
        """Add the columns that need no gradient; sees the whole batch of an optimizer step."""
        ...

    def loss(self, model: Model, batch: Batch) -> tuple[Mean, Mapping[str, Metric]]:
        """The loss and the metrics of a micro-batch; sums, so that micro-batches and devices add up exactly."""
        ...

    def rewards(self, model: Model, batch: Batch) -> Float[Array, "B S"]:
        """How good the model finds each example of an annotated batch; no gradient is kept."""
        ...

    def taken(self, updates: Any, batch: Batch, step: Int[Array, ""]) -> Any:
        """What of the optimizer's updates [as the parameters] the parameters take, in the step after `step` others."""
        ...


@dataclass(frozen=True, kw_only=True)
class ObjectiveBase:
    """What objectives share: the auxiliary loss that keeps the experts of a mixture evenly used."""

    remembers: ClassVar[tuple[str, ...]] = ()

    router_aux_loss_coef: float | None = option(
        None, "Coefficient of the load-balancing loss of mixtures of experts; by default the model's own, 0 for none."
    )

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """See Objective; what most ask for."""
        return ("ref_logps",)

    def with_balance(self, loss: Mean, balance: Float[Array, ""]) -> tuple[Mean, dict[str, Mean]]:
        """The loss plus coefficient x `balance`, and the metric `aux_loss`.

        `balance` is a product of two means over a micro-batch, as in transformers: of all that is added up in a step it
        alone depends, a little, on how the batch is split.
        """
        if not self.router_aux_loss_coef:
            return loss, {}
        added = self.router_aux_loss_coef * balance * loss.count
        return Mean(loss.total + added, loss.count), {"aux_loss": Mean(balance * loss.count, loss.count)}

    def rewards(self, model: Model, batch: Batch) -> Float[Array, "B S"]:
        """See Objective; most methods say how good an example is, those that do not refuse.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{type(self).__name__} gives examples no rewards, so there is nothing to compute metrics of")

    def taken(self, updates: Any, batch: Batch, step: Int[Array, ""]) -> Any:
        """See Objective; all of them."""
        return updates
