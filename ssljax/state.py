"""The state of a run: one registered dataclass of plain nested dicts, and where the run stands besides."""

from dataclasses import dataclass
from typing import Any

import jax

from ssljax.data.order import History


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes. The random key is not here: it follows from the seed and the step."""

    step: jax.Array  # int32 scalar: steps taken
    params: dict[str, Any]
    opt: Any  # optax's state
    method: dict[str, Any]  # the method's own state: batch statistics, EMA teacher, queue, ...
    ema: dict[str, Any] | None  # moving average of the parameters, if `optim.ema` is set
    guard: dict[str, jax.Array]  # statistics of the steps taken, for the limits of `ssljax.guard.Guard`

    @property
    def eval_params(self) -> dict[str, Any]:
        """What evaluation and export use: the averaged parameters if there are any."""
        return self.params if self.ema is None else self.ema


@dataclass
class Progress:
    """Where a run stands besides its state: saved with every checkpoint, the same in every process."""

    position: int = 0  # samples of the training stream used
    records: int = 0  # lines of metrics.jsonl
    evaluated: int = -1  # the step of the latest evaluation
    bad: int = 0  # bad records met and replaced
    refused: int = 0  # steps that the guard refused
    in_a_row: int = 0  # of these, since the last one taken
    rewinds: int = 0  # since the newest checkpoint
    sampling: History = ()  # of a mixture: (position, weights from there on)
