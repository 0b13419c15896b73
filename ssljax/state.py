"""The state of a run: one registered dataclass of plain nested dicts."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes. The random key is not here: it follows from the seed and the step."""

    step: jax.Array  # int32 scalar: steps taken
    params: dict[str, Any]
    opt: Any  # optax's state
    method: dict[str, Any]  # the method's own state: batch statistics, EMA teacher, queue, ...
    ema: dict[str, Any] | None  # moving average of the parameters, if `optim.ema` is set

    @property
    def eval_params(self) -> dict[str, Any]:
        """What evaluation and export use: the averaged parameters if there are any."""
        return self.params if self.ema is None else self.ema
