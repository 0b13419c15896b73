"""Checkpoints: the train state, the position in the data and the resolved config, saved in the background by Orbax.

All of Orbax is behind this module. A checkpoint holds tensors and JSON; nothing in it is ever executed.

Where a run starts, in this order: the newest checkpoint of its own workdir; else fresh parameters.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from ssljax.rules import leaf_name
from ssljax.state import TrainState

# Orbax's threads log, with a traceback, the exceptions that `save` and `wait` raise: said once is enough.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))


@dataclass(frozen=True)
class Checkpoints:
    """When to save and what to keep."""

    every: int = 0  # steps between checkpoints; 0: only after the last step
    keep_last: int = 3
    keep_every: int | None = None  # also keep every checkpoint whose step is a multiple of this


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and what to do."""


class CheckpointStore:
    """The checkpoints of one run, under `<workdir>/checkpoints/<step>`."""

    def __init__(self, workdir: epath.PathLike, policy: Checkpoints = Checkpoints()):
        # Orbax takes absolute paths only; joined to one, an absolute path or a URL stays as it is.
        self.folder = epath.Path(Path.cwd()) / workdir / "checkpoints"
        preserve: Any = ocp.training.preservation_policies  # Orbax's policies do not fit its own protocols' types
        decide: Any = ocp.training.save_decision_policies
        keep = [preserve.LatestN(policy.keep_last)]
        if policy.keep_every:
            keep.append(preserve.EveryNSteps(policy.keep_every))
        try:
            self._orbax = ocp.training.Checkpointer(
                self.folder,
                # The loop decides when to save.
                save_decision_policy=decide.FixedIntervalPolicy(1),
                preservation_policy=preserve.AnyPreservationPolicy(keep),
            )
        except OSError as error:
            raise CheckpointError(f"cannot open {self.folder} for checkpoints: {error}") from error

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return [c.step for c in self._orbax.checkpoints]

    def save(self, state: TrainState, step: int, position: int, metadata: dict) -> None:
        """Starts saving; returns when the arrays are copied from the devices.

        `position`: samples of the training stream used so far; `metadata`: JSON, the resolved config among it.
        """
        try:
            self._orbax.save_checkpointables_async(
                step, {"state": state}, custom_metadata={"position": position, **metadata}
            )
        except Exception as error:
            raise self._save_failed(f"step {step}", error) from error

    def wait(self) -> None:
        """Waits for a save under way and raises if it failed."""
        try:
            self._orbax.wait()
        except Exception as error:
            raise self._save_failed("the latest step", error) from error

    def metadata(self, step: int | None = None) -> tuple[int, dict]:
        """(step, JSON saved with it) of a checkpoint, the newest by default."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.folder}; was this run trained, and is the path its workdir?")
        if step is not None and step not in steps:
            raise CheckpointError(
                f"no checkpoint of step {step} in {self.folder}; there are {', '.join(map(str, steps))}"
            )
        step = steps[-1] if step is None else step
        saved: Any = self._metadata(step).custom_metadata
        if not saved:
            raise self._damaged(step, "its metadata are missing")
        return step, dict(saved)

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, int]:
        """(state, position) of a checkpoint, placed like `like`: a state of `jax.ShapeDtypeStruct`s with shardings.

        The mesh and the number of processes may differ from those that saved it.
        """
        step, metadata = self.metadata(step)
        self.check_fits(like, step)
        try:
            state = self._orbax.load_checkpointables(step, {"state": like})["state"]
        except Exception as error:
            raise self._damaged(step, error) from error
        return state, metadata["position"]

    def close(self) -> None:
        """Waits for saves under way and releases Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

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

    def check_fits(self, like: TrainState, step: int) -> None:
        """Raises if the arrays of a checkpoint are not those of `like`, naming them."""
        saved = self._metadata(step).metadata["state"]
        there, here = (
            {leaf_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (saved, like)
        )
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

    def _metadata(self, step: int) -> Any:
        try:
            return self._orbax.checkpointables_metadata(step)
        except Exception as error:
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, why: object) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self.folder / str(step)} cannot be read: {why}\n"
            "It is damaged; delete this folder to continue from the one before."
        )

    def _save_failed(self, step: str, error: Exception) -> CheckpointError:
        kept = ", ".join(map(str, self.steps())) or "none"
        return CheckpointError(
            f"saving {step} to {self.folder} failed: {error}\nComplete checkpoints: {kept}. Is the disk full or "
            "read-only? The same command resumes from the newest complete one."
        )


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree` with `shardings`, as `CheckpointStore.restore` wants them."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
