"""The contract between a method and everything else.

> source -> annotate -> step. A source yields a batch; the objective annotates it with everything that needs no
> gradient; one pure step takes the gradient of the loss.
"""

from typing import Protocol, runtime_checkable

from jax import Array
from jaxtyping import Float, Int

from jaxpost.metrics import Mean

Batch = dict[str, Array]  # the leading axis of every column is the example


@runtime_checkable
class Model(Protocol):
    """What an objective sees of a model, through `logps` only."""

    def hidden(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]: ...

    def unembed(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]: ...


@runtime_checkable
class Objective(Protocol):
    """A method: a frozen dataclass whose fields are its hyperparameters."""

    def annotate(self, policy: Model, reference: Model | None, batch: Batch) -> Batch:
        """Add the columns that need no gradient; sees the whole batch of an optimizer step."""
        ...

    def loss(self, model: Model, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        """The loss and the metrics of a micro-batch; sums, so that micro-batches and devices add up exactly."""
        ...
