"""Checkpoints of a run: Orbax, asynchronous, one unit of state at step boundaries.

Orbax restores flipped bits in silence and lists folders that it has not finished. So a step counts here when its
manifest is there, which is written when all else is on disk; and what is read must be, bit for bit, what was saved.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from jaxpost.errors import CheckpointError, ConfigError, NonFiniteError, one_line
from jaxpost.objectives.base import Batch
from jaxpost.processes import all_agree, is_main
from jaxpost.train.checkpoint_config import CheckpointConfig
from jaxpost.train.checkpoint_folder import CheckpointFolder
from jaxpost.train.checksum import checksums
from jaxpost.train.manifest import (
    DamagedError,
    Manifest,
    arrays_of,
    differences,
    kept_shapes,
    num_bytes,
    versions,
)
from jaxpost.train.state import TrainState

MAX_FAILURES = 3  # saves in a row that go wrong
READ_TRIES = 3
FIRST_WAIT = 1.0  # seconds before the second try, and twice that before the third


class Restored(NamedTuple):
    """A run to go on with.

    Attributes:
        state: of the step that was saved.
        facts: that were saved with it.
        kept: batches that the steps after it need, on every device.
    """

    state: TrainState
    facts: dict[str, Any]
    kept: Sequence[Batch]


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Args:
        folder: made when something is saved; may be gs://BUCKET/PATH.
        config: when to save, and whether to continue.
        identity: what this run and one that it continues must have in common; JSON values.
        tell: says something to the user.

    Attributes:
        is_due: a save has gone wrong, and the next step should be saved in its place.
    """

    def __init__(
        self,
        folder: Path | str,
        config: CheckpointConfig,
        identity: Mapping[str, Any] | None = None,
        tell: Callable[[str], None] = print,
    ):
        self.folder = CheckpointFolder(folder)
        self.config, self.identity, self.tell = config, json.loads(json.dumps(dict(identity or {}))), tell
        self.is_due = False
        self._failures = 0
        self._saved: int | None = None  # the newest step that is complete
        self._pending: tuple[int, Callable[[], Manifest]] | None = None
        self._orbax = ocp.AsyncCheckpointer(
            ocp.StandardCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
        )

    def save(
        self,
        state: TrainState,
        step: int,
        facts: dict[str, Any],
        metrics: dict[str, float],
        kept: Sequence[Batch] = (),
    ) -> None:
        """Start saving; training goes on while the files are written.

        Args:
            state: trainable parameters, optimizer and step are saved; frozen arrays come from the base model.
            step: the state's step.
            facts: small JSON values that must survive with it.
            metrics: of its evaluation.
            kept: batches that steps after this one need and that cannot be made again.

        Raises:
            NonFiniteError: the state is not a number; it is not saved.
            CheckpointError: the disk is full, or several saves in a row went wrong.
        """
        self._attempt(self._orbax.wait_until_finished)
        self._settle()
        if self._saved == step:  # evaluated since
            if is_main():
                folder = self.folder.place(step)
                dataclasses.replace(Manifest.read(folder), facts=facts, metrics=metrics).write(folder)
            return
        tree = _saved(state) | ({"kept": list(kept)} if kept else {})
        self.folder.check_room(num_bytes(tree))
        arrays, (sums, finite) = arrays_of(tree), checksums(tree)
        for path, is_finite in zip(arrays, jax.device_get(finite), strict=True):
            if not is_finite and not path.startswith("kept."):  # what is kept may lack a reward, which is NaN
                raise NonFiniteError(f"the state of step {step} holds NaN or infinity ({path}); it is not saved")

        def manifest() -> Manifest:
            values = dict(zip(arrays, map(int, jax.device_get(sums)), strict=True))
            return Manifest(step, arrays, values, {}, facts, self.identity, metrics, versions())

        self._pending, self.is_due = (step, manifest), False
        self._attempt(lambda: self._orbax.save(self.folder.place(step), args=ocp.args.StandardSave(tree), force=True))

    def check(self) -> None:
        """Look how the save that is under way is getting on.

        Raises:
            CheckpointError: it has gone wrong, as have those before it.
        """
        self._attempt(self._orbax.check_for_errors)
        self._settle()

    def restore(self, state: TrainState) -> Restored | None:
        """The state to continue from, or None for a fresh run.

        A checkpoint that is not what was saved is set aside, and the one before it is taken.

        Args:
            state: a fresh state: gives shapes, dtypes and layout, and the frozen arrays.

        Raises:
            ConfigError: the folder holds another run, or one that is not to be continued; or there is no such step.
            CheckpointError: no checkpoint can be read, or the one that was asked for cannot; or it is of another
                model or optimizer.
        """
        steps, asked = self.folder.steps(), str(self.config.resume_from_checkpoint or "").lower()
        self._check_room(num_bytes(_saved(state)))
        self.folder.clean(self.tell)
        if asked == "false" and steps:
            raise ConfigError(
                f"{self.folder.path.parent} holds a run at step {steps[-1]}: leave --resume_from_checkpoint out to "
                "continue it, or give another --output_dir"
            )
        named = self._named(asked, steps)
        for step in reversed(steps) if named is None else [named]:
            try:
                restored = self._restored(state, step)
            except DamagedError as error:
                if named is not None:
                    raise
                self.folder.set_aside(step, "corrupt")
                self.tell(f"{error}; it is set aside as {step}.corrupt")
                continue
            for later in steps[steps.index(step) + 1 :] if named is not None else ():
                self.folder.set_aside(later, "superseded")
            return restored
        damaged = self.folder.damaged()
        if steps or damaged:
            raise CheckpointError(
                f"{self.folder}: no checkpoint is whole ({', '.join(damaged)}); give another --output_dir to start anew"
            )
        return None

    def best(self, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """The state that was best in evaluation, and its metrics; `state` gives shapes and layout."""
        self.finish()
        best = self._best()
        return self._restored(state, best.step).state, best.metrics

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """A save that is under way is waited for; what becomes of it is told by `finish`."""
        with suppress(Exception):
            self._orbax.wait_until_finished()
        self._orbax.close()

    def finish(self) -> None:
        """Block until the last save is on disk.

        Raises:
            CheckpointError: it has gone wrong.
        """
        self._attempt(self._orbax.wait_until_finished)
        self._settle()
        if self.is_due:
            raise CheckpointError(f"{self.folder}: the last checkpoint could not be saved")

    def _attempt(self, action: Callable[[], Any]) -> None:
        """What Orbax does, which is tried again at the next step if it fails, but not for ever."""
        try:
            action()
        except Exception as error:  # of Orbax, TensorStore or the storage
            self._failures, self.is_due, self._pending = self._failures + 1, True, None
            if self._failures >= MAX_FAILURES:
                raise CheckpointError(
                    f"{self.folder}: {self._failures} checkpoints in a row could not be saved: {one_line(error)}"
                ) from error
            self.tell(f"a checkpoint could not be saved ({one_line(error)}); it is tried again after the next step")

    def _write_manifest(self) -> None:
        """Called in the background, on the main process, when all else is written, before the folder gets its name."""
        assert self._pending is not None
        step, manifest = self._pending
        manifest().write(self._orbax.get_temporary_path(self.folder.place(step)).get())

    def _settle(self) -> None:
        """When a save has finished: delete what is not needed any more."""
        if self._pending is None or not self.folder.is_complete(self._pending[0]):
            return
        (self._saved, _), self._pending, self._failures = self._pending, None, 0
        try:
            for step in self._superfluous():
                self.folder.delete(step)
        except OSError as error:
            self.tell(f"old checkpoints in {self.folder} cannot be deleted: {one_line(error)}")

    def _superfluous(self) -> list[int]:
        """Steps beyond the limit, without the best one."""
        steps, limit = self.folder.steps(), self.config.save_total_limit
        old = [] if limit is None else steps[:-limit]
        if not old or not self.config.load_best_model_at_end:
            return old
        best = self._best()
        return [step for step in old if step != best.step]

    def _best(self) -> Manifest:
        """Of the checkpoint that was best in evaluation; the newest of several."""
        manifests = (Manifest.read(self.folder.place(step)) for step in self.folder.steps())
        return max(manifests, key=lambda manifest: (self.config.goodness(manifest.metrics), manifest.step))

    def _restored(self, state: TrainState, step: int) -> Restored:
        manifest: Manifest = self._agreed(step, lambda: Manifest.read(self.folder.place(step)))
        self._check_identity(manifest)
        self._check_arrays(manifest, arrays_of(_saved(state)))
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _saved(state))
        if kept := kept_shapes(manifest.arrays, state.step.sharding):
            wanted["kept"] = kept
        tree = self._agreed(step, lambda: self._read(step, wanted))
        sums = dict(zip(arrays_of(tree), map(int, jax.device_get(checksums(tree)[0])), strict=True))
        if wrong := [path for path in sums if sums[path] != manifest.checksums.get(path)]:
            raise DamagedError(f"{self.folder.place(step)} is damaged: {', '.join(wrong[:3])} is not what was saved")
        self._saved = step
        kept = tree.pop("kept", [])
        return Restored(dataclasses.replace(state, **tree), manifest.facts, kept)

    def _read(self, step: int, wanted: Any) -> Any:
        wait = FIRST_WAIT
        for attempt in range(READ_TRIES):
            try:
                return self._orbax.restore(self.folder.place(step), args=ocp.args.StandardRestore(wanted))
            except OSError as error:
                if isinstance(error, FileNotFoundError) or attempt == READ_TRIES - 1:
                    raise
                self.tell(f"{self.folder.place(step)} cannot be read ({one_line(error)}); trying again")
                time.sleep(wait)
                wait *= 2
        raise AssertionError

    def _agreed(self, step: int, read: Callable[[], Any]) -> Any:
        """What is read, if every process can read it."""
        found, fault = None, ""
        try:
            found = read()
        except DamagedError as error:
            fault = str(error)
        except Exception as error:  # whatever Orbax and TensorStore make of bytes that are not theirs
            fault = f"{self.folder.place(step)} is damaged: {one_line(error)}"
        if not all_agree(not fault):
            raise DamagedError(fault or f"{self.folder.place(step)} is damaged: another process cannot read it")
        return found

    def _check_identity(self, manifest: Manifest) -> None:
        changes = differences(manifest.identity, self.identity)
        if not changes:
            return
        if self.config.resume_with_changes:
            self.tell(f"the run goes on from step {manifest.step} with changes: {'; '.join(changes)}")
            return
        raise ConfigError(
            f"{self.folder.path.parent} holds another run (at step {manifest.step}): {'; '.join(changes)}. Give what "
            "config.yaml says, --resume_with_changes true, or another --output_dir"
        )

    def _check_arrays(self, manifest: Manifest, wanted: dict[str, str]) -> None:
        """Compare before reading: Orbax casts dtypes silently, and leaves reads behind when a shape is wrong."""
        saved = {path: array for path, array in manifest.arrays.items() if not path.startswith("kept.")}
        differing = [
            f"{path} is {saved.get(path, 'missing')}, expected {wanted.get(path, 'nothing')}"
            for path in sorted(saved.keys() | wanted.keys())
            if saved.get(path) != wanted.get(path)
        ]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise CheckpointError(
                f"{self.folder.place(manifest.step)} is of another model or optimizer: {'; '.join(differing[:3])}{more}"
            )

    def _check_room(self, needed: int) -> None:
        """Whether the disk has room for checkpoints of so many bytes, before the first of them."""
        if self.config.save_strategy != "no":
            room, copies = self.folder.check_room(needed), 1 + (self.config.save_total_limit or 1)
            if room < copies:
                self.tell(f"{self.folder}: the disk has room for {room:.1f} checkpoints of {needed / 1e9:.3g} GB")

    def _named(self, asked: str, steps: list[int]) -> int | None:
        """The step that was asked for by its number."""
        if asked in ("", "false"):
            return None
        if not steps:
            raise ConfigError(
                f"--resume_from_checkpoint {asked}: {self.folder} holds no checkpoint; leave it out to begin anew"
            )
        if asked in ("true", "latest"):
            return None
        if not asked.isdigit() or int(asked) not in steps:
            raise ConfigError(f"--resume_from_checkpoint {asked}: it takes true, latest or one of the steps {steps}")
        return int(asked)


def _saved(state: TrainState) -> dict[str, Any]:
    others = {"reference": state.reference, "memory": state.memory, "norms": state.norms}
    kept = {name: value for name, value in others.items() if value}
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state, **kept}
