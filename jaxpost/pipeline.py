"""Rows to batches: what a run trains and evaluates on."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxpost.data.loader import Loader
from jaxpost.data.mixture import load_datasets
from jaxpost.data.rows import Rows, as_rows, formatted
from jaxpost.encode import Encoded
from jaxpost.errors import ConfigError
from jaxpost.methods import Method
from jaxpost.platform import platform

MORE_LENGTHS = 8  # what a run with much padding is advised to compile


class Pipeline(NamedTuple):
    """How the rows of a run become batches.

    Attributes:
        method, args: of the run.
        tokenizer: prepared.
        vocab_size: embedding rows; an id beyond is refused.
        groups: groups of devices that see different rows.
        notes: what a user should know of the data; filled as it is read.
        formatting: makes the text of a row, if the user gives such a function.
    """

    method: Method
    args: Any
    tokenizer: Any
    vocab_size: int
    groups: int
    notes: list[str]
    formatting: Callable[[Mapping[str, Any]], str] | None = None

    def rows(self, train: Any = None, held_out: Any = None) -> tuple[Rows, Rows | None]:
        """The rows to train on, and those to evaluate on if the run does.

        Args:
            train: by default those of `--dataset_name`.
            held_out: likewise, for evaluation.

        Raises:
            ConfigError, DataError: there are no such rows.
        """
        return rows_of(self.method, self.args, train, held_out)

    def loaders(self, train: Any = None, held_out: Any = None) -> tuple[Loader, Loader | None]:
        """Batches to train on, and to evaluate on if the run does; arguments as of `rows`.

        Raises:
            ConfigError, DataError: there are no such rows, or they cannot be used.
        """
        train_rows, eval_rows = self.rows(train, held_out)
        loader = self.train_loader(train_rows)
        return loader, None if eval_rows is None else self.eval_loader(eval_rows)

    def train_size(self) -> int:
        """Packs of an optimizer step."""
        args = self.args
        return args.per_device_train_batch_size * self.groups * args.gradient_accumulation_steps

    def train_loader(self, rows: Rows) -> Loader:
        """Batches of an optimizer step each."""
        args, size, needed = self.args, self.train_size(), None
        if args.dataset_streaming:  # it may have no end
            if args.max_steps < 1:
                raise ConfigError("dataset_streaming needs --max_steps: a stream has no length")
            needed = args.max_steps * size
        encoded = self.encode(rows, training=True, num_packs=needed)
        if encoded.mismatch is not None and len(encoded.packs) < 2:
            raise ConfigError(f"{rows.name}: one row alone has no other completion to compare it with; give more rows")
        loader = self._loader(
            encoded,
            size,
            shared_rows=self.groups * args.gradient_accumulation_steps,
            num_steps=args.total_steps(math.ceil(len(encoded.packs) / size)),
            seed=args.seed if args.data_seed is None else args.data_seed,
            sampling=args.train_sampling_strategy,
        )
        self.notes.append(padding_note(loader, args.length_buckets))
        return loader

    def eval_loader(self, rows: Rows) -> Loader:
        """Batches that cover the rows once, in order."""
        return self.once(self.encode(rows, training=False), self.args.per_device_eval_batch_size)

    def once(self, encoded: Encoded, rows_per_group: int) -> Loader:
        """Batches that cover packs once, in order."""
        size = rows_per_group * self.groups
        steps = math.ceil(len(encoded.packs) / size)
        return self._loader(encoded, size, shared_rows=self.groups, num_steps=steps, seed=0, sampling="sequential")

    def encode(self, rows: Rows, *, training: bool, num_packs: int | None = None) -> Encoded:
        """Rows as packs of tokenised examples; `num_packs` are enough."""
        if self.formatting is not None:
            rows = formatted(rows, self.formatting, self.args.dataset_text_field)
        options = {"vocab_size": self.vocab_size, "training": training, "num_packs": num_packs}
        assert self.method.encode is not None
        encoded = self.method.encode(rows, self.tokenizer, self.args, **options)
        self.notes.extend(encoded.notes)
        return encoded

    def _loader(self, encoded: Encoded, size: int, *, shared_rows: int, **options: Any) -> Loader:
        # Packed rows are full already; the others are put one after the other where the run says so.
        shares = self.args.padding_free and not encoded.full
        return Loader(
            encoded.packs,
            global_batch_size=size,
            num_rows=shared_rows if shares else size,
            num_lengths=self.args.length_buckets,
            mismatch=encoded.mismatch,
            # A tile of the attention kernel, unless the rows are shorter than that.
            multiple=self.args.pad_to_multiple_of or (64 if platform() == "cpu" else 128),
            pad_id=0,  # any id will do: masks come from lengths
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **options,
        )


def rows_of(method: Method, args: Any, train: Any = None, held_out: Any = None) -> tuple[Rows, Rows | None]:
    """As `Pipeline.rows`, for a method and its config."""
    name = args.dataset_name
    if train is None:
        train, configured = load_datasets(
            args, seed=args.seed, evaluates=args.evaluates and held_out is None, **method.rows(args)
        )
        held_out = configured if held_out is None else held_out
    if held_out is None and args.evaluates:
        raise ConfigError("evaluation was asked for, but there is no eval_dataset")
    train = as_rows(train, f"{name or 'train_dataset'} ({args.dataset_train_split})")
    return train, None if held_out is None else as_rows(held_out, f"{name or 'eval_dataset'} (evaluation)")


def padding_note(loader: Loader, num_lengths: int) -> str:
    """The row lengths and their padding, and what would lessen it where that is worth a few compilations."""
    share, better = loader.padding(num_lengths), loader.padding(MORE_LENGTHS)
    note = f"rows of {', '.join(map(str, loader.lengths))} tokens, {share:.0%} of them padding"
    return note if share - better < 0.1 else f"{note} ({better:.0%} with --length_buckets {MORE_LENGTHS})"
