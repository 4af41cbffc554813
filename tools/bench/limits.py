"""What XLA and torch reach on this machine by themselves: products with kernels, and a copy."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from measure import CALLS, rate

COPIED = 2**27  # numbers of 4 bytes
Kernel = tuple[int, int]  # in, out


class Library(Protocol):
    """One that multiplies and copies."""

    def product(self, rows: int, kernels: Sequence[Kernel], dtype: str = "float32") -> Callable[[], Any]:
        """Multiplies rows with each kernel, CALLS times."""
        ...

    def copied(self) -> float:
        """Bytes a second that a copy reads and writes."""
        ...


class Xla:
    def product(self, rows: int, kernels: Sequence[Kernel], dtype: str = "float32") -> Callable[[], Any]:
        import jax
        import jax.numpy as jnp

        # On CPU XLA multiplies bfloat16 natively only where the result is float32 (jaxpost/models/product.py).
        given = jnp.float32 if jax.default_backend() == "cpu" else None
        multiply = jax.jit(lambda x, kernel: jnp.matmul(x, kernel, preferred_element_type=given))
        pairs = [(jnp.ones((rows, m), dtype), jnp.ones((m, n), dtype)) for m, n in kernels]
        return lambda: jax.block_until_ready([multiply(*pair) for _ in range(CALLS) for pair in pairs])

    def copied(self) -> float:
        import jax
        import jax.numpy as jnp

        # In place: the pages of a new array cost more than filling them.
        negate, numbers = jax.jit(jnp.negative, donate_argnums=0), jnp.ones(COPIED)

        def copy() -> None:
            nonlocal numbers
            for _ in range(CALLS):
                numbers = negate(numbers)
            numbers.block_until_ready()

        return rate(2 * numbers.nbytes, copy)


class Torch:
    def __init__(self, threads: int):
        import torch

        torch.set_num_threads(threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._wait = torch.cuda.synchronize if self._device == "cuda" else lambda: None

    def product(self, rows: int, kernels: Sequence[Kernel], dtype: str = "float32") -> Callable[[], Any]:
        import torch

        made = {"dtype": getattr(torch, dtype), "device": self._device}
        pairs = [(torch.ones(rows, m, **made), torch.ones(n, m, **made)) for m, n in kernels]
        linear = torch.nn.functional.linear
        return lambda: ([linear(*pair) for _ in range(CALLS) for pair in pairs], self._wait())

    def copied(self) -> float:
        import torch

        numbers = torch.ones(COPIED, device=self._device)
        other = torch.empty_like(numbers)
        return rate(2 * numbers.nbytes, lambda: ([other.copy_(numbers) for _ in range(CALLS)], self._wait()))
