"""Checkpoints: the train state, what else the loop needs and the resolved config, saved in the background by Orbax.

All of Orbax is behind this module. A checkpoint holds tensors and JSON; nothing in it is ever executed. It is a folder
`<workdir>/checkpoints/<step>`, and it carries its own proofs:

- digests of its arrays and of its JSON, taken in memory before anything is written, and committed with the rest;
- a manifest of digests of its files, written right after the commit. A run that is killed in between leaves a complete
  checkpoint without a manifest: its arrays and its JSON still prove themselves when they are read.

Whatever is read is verified. Training continues from the newest checkpoint that is what was saved, and says so if that
is not the newest one.
"""

import json
import logging
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from ssljax.checkpoint_record import Record, read_record
from ssljax.digest import MANIFEST, damaged_files, digest_tree, kinds, read_manifest, write_manifest
from ssljax.distributed import agreed, gather_texts
from ssljax.state import TrainState

COMMITTED = "commit_success.txt"  # the last file that Orbax writes into a checkpoint
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoints:
    """When to save and what to keep."""

    every: int = 0  # steps between checkpoints; 0: only after the last step
    keep_last: int = 3
    keep_every: int | None = None  # also keep every checkpoint whose step is a multiple of this


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and what to do."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not what was saved; the message says which file or array."""


class Restored(NamedTuple):
    """A verified checkpoint."""

    state: TrainState
    step: int
    progress: dict[str, Any]
    metadata: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run, under `<workdir>/checkpoints/<step>`. Every process must make the same calls.

    Only `resume` and `save` write anything: a store reads from a disk that is read-only, and beside a run that trains.
    """

    def __init__(self, workdir: epath.PathLike, policy: Checkpoints = Checkpoints()):
        # Orbax takes absolute paths only; joined to one, an absolute path or a URL stays as it is.
        self.folder = epath.Path(Path.cwd()) / workdir / "checkpoints"
        self.damaged_folder = self.folder.parent / "checkpoints-damaged"
        self._policy = policy
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, Future] | None = None
        logging.getLogger("absl").addFilter(_said_once)

    # ------------------------------------------------------------------------------------------------------- reading

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return sorted(int(path.name) for path in self._folders() if path.name.isdecimal() and _complete(path))

    def unfinished(self) -> list[epath.Path]:
        """Folders of saves that were broken off, or are under way."""
        return [path for path in self._folders() if not (path.name.isdecimal() and _complete(path))]

    def record(self, step: int) -> Record:
        """The JSON of a checkpoint, verified.

        Raises:
          DamagedCheckpoint: it is not what was saved.
          CheckpointError: there is no such checkpoint.
        """
        step = self._found(step)
        return _agreed(lambda: self._record(step))

    def verify(self, step: int) -> Record:
        """Verifies the files and the JSON of a checkpoint, without loading its arrays, and returns its JSON.

        Raises: as `record`.
        """
        step = self._found(step)
        return _agreed(lambda: self._verified(step))[0]

    def restore(self, like: TrainState, step: int | None = None) -> Restored:
        """A checkpoint, the newest by default, placed like `like`: a state of `jax.ShapeDtypeStruct`s with shardings.

        The mesh and the number of processes may differ from those that saved it.

        Raises:
          DamagedCheckpoint: a file, the JSON or an array is not what was saved.
          CheckpointError: there is no such checkpoint, or its arrays are not those of `like`.
        """
        step = self._found(step)
        record, sealed = _agreed(lambda: self._verified(step))
        self._check_fits(like, step, record)
        state = _agreed(lambda: self._load(like, step, record, sealed))
        return Restored(state, step, record.progress, record.metadata)

    def check_fits(self, like: TrainState) -> dict[str, Any]:
        """The progress of the newest checkpoint, from its JSON; `{}` if there is none, or if it is damaged.

        Raises:
          CheckpointError: it belongs to another config.
        """
        steps = self._agreed_steps()
        with suppress(DamagedCheckpoint):  # `resume` says what is wrong
            if steps:
                record = self.record(steps[-1])
                self._check_fits(like, steps[-1], record)
                return record.progress
        return {}

    def newest_good(self, read: Callable[[int], T], report: Callable[[str], None]) -> T:
        """What `read(step)` returns for the newest step for which it does not raise `DamagedCheckpoint`.

        Args:
          report: called with what is wrong with each newer one.

        Raises:
          CheckpointError: there is no checkpoint, or none is good.
        """
        problems = []
        for step in reversed(self._existing()):
            try:
                return read(step)
            except DamagedCheckpoint as error:
                problems.append(str(error))
                report(str(error))
        raise CheckpointError(
            "\n".join(problems) + f"\nNo checkpoint in {self.folder} is good. Nothing was changed: restore the folder "
            "from a copy, or move it away to start from scratch."
        )

    # ------------------------------------------------------------------------------------------------------ training

    def resume(self, like: TrainState, report: Callable[[str], None]) -> Restored | None:
        """Where training continues: the newest good checkpoint, placed like `like`; None if there is no checkpoint.

        Removes what broken-off saves left behind. Newer checkpoints that are damaged are moved to
        `<workdir>/checkpoints-damaged`, so that their steps can be saved again.

        Args:
          report: called with what is wrong with a checkpoint, and where it went.

        Raises:
          CheckpointError: every checkpoint is damaged, or the newest good one belongs to another config.
        """
        _agreed(self._open)
        steps = self._agreed_steps()
        if not steps:
            return None
        found = self.newest_good(partial(self.restore, like), report)
        for step in steps[steps.index(found.step) + 1 :]:
            _agreed(partial(self._set_aside, step, report))
        return found

    def save(self, state: TrainState, step: int, progress: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Starts saving; returns when the state may be overwritten. Waits for a save that is still under way.

        `progress` and `metadata`: JSON, see `Record`.
        """
        self.wait()
        _agreed(partial(self._try_to_write, step))
        digests = digest_tree(state)
        arrays = {name: [kind, digests[name][0]] for name, kind in kinds(state).items()}
        record = Record(progress, metadata, arrays)
        context = ocp.Context()
        if diverged := [name for name, replicas in digests.items() if len(replicas) > 1]:
            warnings.warn(
                f"step {step}: {_first(diverged)} should be the same on several devices, and is not. The first copy is "
                "saved. Either a device computes wrongly, or kernels run that are not deterministic.",
                stacklevel=2,
            )
            context.array.saving.use_replica_parallel = False  # else each device writes a part of its own copy
        try:
            with context:
                response = ocp.save_checkpointables_async(
                    self.folder / str(step),
                    {"state": state},
                    custom_metadata=record.sealed(step),
                )
        except Exception as error:
            raise self._save_failed(step, error) from error
        self._saving = step, self._background.submit(self._finish, step, response)

    def wait(self) -> None:
        """Waits for a save under way and raises if it failed."""
        if self._saving is not None:
            (step, saving), self._saving = self._saving, None
            try:
                saving.result()
            except Exception as error:
                raise self._save_failed(step, error) from error

    def close(self) -> None:
        """Waits for saves under way."""
        try:
            self.wait()
        finally:
            self._background.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            # The error under way says more than one about the save it broke off.
            with suppress(CheckpointError):
                self.close()

    # ------------------------------------------------------------------------------------------------------ the rest

    def _folders(self) -> list[epath.Path]:
        """Everything that is, or was to become, a checkpoint: `<step>`, or `<step>.` and what Orbax appends."""
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if path.name.split(".")[0].isdecimal()]

    def _agreed_steps(self) -> list[int]:
        """The steps that process 0 sees."""
        return json.loads(gather_texts(json.dumps(self.steps()))[0])

    def _existing(self) -> list[int]:
        steps = self._agreed_steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.folder}; was this run trained, and is the path its workdir?")
        return steps

    def _found(self, step: int | None) -> int:
        """`step`, or the newest one; raises if there is none."""
        steps = self._existing()
        if step not in (None, *steps):
            there = ", ".join(map(str, steps))
            raise CheckpointError(f"no checkpoint of step {step} in {self.folder}; there are {there}")
        return steps[-1] if step is None else step

    def _record(self, step: int) -> Record:
        try:
            return read_record(self.folder / str(step), step)
        except (ValueError, OSError) as error:
            raise self._damaged(step, str(error)) from error

    def _verified(self, step: int) -> tuple[Record, bool]:
        """The record of a checkpoint whose files are what was saved, and whether there was a manifest to tell that."""
        folder = self.folder / str(step)
        try:
            manifest = read_manifest(folder)
        except (ValueError, OSError) as error:
            raise self._damaged(step, str(error)) from error
        problems = damaged_files(folder, manifest or {}, jax.process_index(), jax.process_count())
        if problems:
            raise self._damaged(step, _first(problems))
        return self._record(step), manifest is not None

    def _load(self, like: TrainState, step: int, record: Record, sealed: bool) -> TrainState:
        try:
            state = ocp.load_checkpointables(self.folder / str(step), {"state": like})["state"]
        except Exception as error:
            if sealed:
                path = self.folder / str(step)
                raise CheckpointError(f"{path} cannot be loaded, although its files are undamaged: {error}") from error
            raise self._damaged(step, f"it cannot be loaded: {error}") from error
        found = digest_tree(state)
        changed = [name for name, (_, digest) in record.arrays.items() if found[name] != (digest,)]
        if changed:
            raise self._damaged(step, _first([f"the array {name} is not what was saved" for name in changed]))
        return state

    def _check_fits(self, like: TrainState, step: int, record: Record) -> None:
        """Raises if the arrays of a checkpoint are not those of `like`, naming them."""
        there, here = {name: kind for name, (kind, _) in record.arrays.items()}, kinds(like)
        different = [
            f"{name}: {there.get(name, 'missing')} in the checkpoint, {here.get(name, 'missing')} in the config"
            for name in sorted(there.keys() | here.keys(), key=lambda name: (not name.startswith("params/"), name))
            if there.get(name) != here.get(name)
        ]
        if different:
            more = f"\n  ... and {len(different) - 5} more" if len(different) > 5 else ""
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} belongs to another config; use another --workdir. "
                "It differs in\n  " + "\n  ".join(different[:5]) + more
            )

    def _open(self) -> None:
        if jax.process_index() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for path in self.unfinished():
                    path.rmtree()
            except OSError as error:
                raise CheckpointError(f"cannot open {self.folder} for checkpoints: {error}") from error

    def _set_aside(self, step: int, report: Callable[[str], None]) -> None:
        if jax.process_index() == 0:
            path, target, copies = self.folder / str(step), self.damaged_folder / str(step), 1
            while target.exists():
                target, copies = self.damaged_folder / f"{step}.{copies}", copies + 1
            try:
                self.damaged_folder.mkdir(exist_ok=True)
                path.rename(target)
            except OSError as error:
                raise CheckpointError(f"cannot move {path} to {target}: {error}") from error
            report(f"moved {path} to {target}")

    def _try_to_write(self, step: int) -> None:
        """Raises if nothing can be written: Orbax would find out as well, and then wait for itself for minutes."""
        if jax.process_index() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                probe = self.folder / f"{step}.probe"
                probe.write_text("")
                probe.unlink()
            except OSError as error:
                raise self._save_failed(step, error) from error

    def _finish(self, step: int, response: Any) -> None:
        """In the background: waits until Orbax has committed, writes the manifest, removes what need not be kept."""
        response.result()
        if jax.process_index() == 0:
            # One process reads all: it is not in a hurry, and this way the files are seen as others will see them.
            write_manifest(self.folder / str(step))
            steps, every = self.steps(), self._policy.keep_every
            for old in steps[: -max(1, self._policy.keep_last)]:
                if not every or old % every:
                    _remove(self.folder / str(old))

    def _damaged(self, step: int, why: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"checkpoint {self.folder / str(step)} is damaged: {why}")

    def _save_failed(self, step: int, error: Exception) -> CheckpointError:
        kept = ", ".join(map(str, self.steps())) or "none"
        return CheckpointError(
            f"saving step {step} to {self.folder} failed: {error}\nComplete checkpoints: {kept}. Is the disk full or "
            "read-only? The same command resumes from the newest complete one."
        )


def _complete(folder: epath.Path) -> bool:
    return (folder / COMMITTED).exists() or (folder / MANIFEST).exists()


def _remove(folder: epath.Path) -> None:
    """Deletes a checkpoint; broken off at any point, it leaves a complete one or one that counts as unfinished."""
    for name in (MANIFEST, COMMITTED):
        (folder / name).unlink(missing_ok=True)
    folder.rmtree()


_agreed = partial(agreed, kinds=(DamagedCheckpoint, CheckpointError))


def _first(problems: list[str], most: int = 3) -> str:
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def _said_once(record: logging.LogRecord) -> bool:
    """Keeps out what Orbax's threads log and we raise: a filter of absl's log."""
    return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)
