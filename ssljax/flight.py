"""Steps sent to the devices and not looked at yet."""

from collections import deque
from typing import Any

import jax
import numpy as np
from etils import epath

from ssljax.data import check_bad_fraction
from ssljax.diagnose import first_not_finite
from ssljax.evals.collapse import collapse
from ssljax.guard import why_refused
from ssljax.metrics import Meter, MetricLog
from ssljax.rules import leaf_name
from ssljax.run import Notes, Run
from ssljax.state import Progress, TrainState


class DivergedError(ArithmeticError):
    """Steps were refused again and again; the message names the step, the term of the loss and the layer."""


class Flight:
    """Steps sent to the devices and not looked at yet. Looking waits for the device, so it happens a step late.

    `step` counts the steps taken, those under way among them; a step that turns out refused is taken back. All that is
    decided here follows from arrays that are equal in all processes.
    """

    def __init__(self, run: Run, log: MetricLog, meter: Meter, progress: Progress, step: int, bad_log: epath.Path):
        self.step, self.stop = step, False
        self._experiment, self._log, self._meter, self._progress = run.experiment, log, meter, progress
        self._run, self._bad_log = run, bad_log
        self._steps: deque[tuple[dict[str, Any], Notes, dict[str, np.ndarray], int]] = deque()
        self._diagnose = jax.jit(collapse)
        self._reason, self._rows = "", {}  # of the latest refused step
        self._gradients = np.zeros(0)

    @property
    def under_way(self) -> bool:
        """Whether any step has not been looked at."""
        return bool(self._steps)

    @property
    def device_is_busy(self) -> bool:
        """Whether the newest step is not done."""
        newest: Any = self._steps[-1][1].tally if self._steps else None
        return newest is not None and not newest.is_ready()

    @property
    def refused_too_often(self) -> bool:
        """Whether the guard's patience is at its end."""
        return self._progress.in_a_row >= self._experiment.guard.in_a_row

    def add(self, metrics: dict[str, Any], notes: Notes, rows: dict[str, np.ndarray]) -> None:
        """A step was sent off."""
        self._steps.append((metrics, notes, rows, self._progress.position))
        self.step += 1

    def land(self, leave: int = 0) -> None:
        """Looks at steps, oldest first, until so many are left: counts, writes the log's records, refusals."""
        progress, e = self._progress, self._experiment
        while len(self._steps) > leave:
            metrics, notes, rows, position = self._steps.popleft()
            refused, replaced, stop = jax.device_get(notes.tally).tolist()
            step = self.step - len(self._steps)  # of this one, if it was taken
            self.stop |= stop > 0
            progress.bad += replaced
            check_bad_fraction(progress.bad, position, e.data.loader.max_bad_fraction, self._bad_log)
            if refused:
                self._refuse(step, metrics, notes, rows, position)
            else:
                progress.in_a_row = 0
                if step % e.log_every == 0 or step == e.steps:
                    self._write(step, metrics, notes)
            self._log.advance(self.step - len(self._steps))

    def diagnosis(self, state: TrainState) -> str:
        """What is known of the latest refused step: the term, the layer, the parameters with the largest gradients."""
        names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
        try:
            place = first_not_finite(self._run.gradient, state, self._run.place(self._rows))
        except Exception as error:  # it needs more memory than the compiled step
            place = f"the operation could not be found ({type(error).__name__}: {error})"
        largest = np.argsort(-np.nan_to_num(self._gradients, nan=np.inf), kind="stable")[:3]
        norms = ", ".join(f"{names[i]} {self._gradients[i]:.3g}" for i in largest)
        guard = self._experiment.guard
        return (
            f"step {self.step + 1}: {guard.in_a_row} steps in a row were refused, also after going back to the last "
            f"checkpoint {guard.rewinds} times: {self._reason}"
            + (f"; {place}" if place else "")
            + f". Largest gradients: {norms}. Training stopped; the checkpoints are good. Usual causes: a learning "
            "rate too high or without warm-up (optim.lr, optim.warmup), no gradient clipping (optim.clip), bad values "
            "in the input; or limits too narrow for this run (guard.gradient_factor, guard.spike_sigma)"
        )

    def _refuse(self, step: int, metrics: dict[str, Any], notes: Notes, rows: dict[str, Any], position: int) -> None:
        values, limits, self._gradients = jax.device_get((metrics, notes.limits, notes.gradients))
        self._progress.refused += 1
        self._progress.in_a_row += 1
        self.step -= 1
        self._rows, self._reason = rows, why_refused(values, limits)
        first = position - self._experiment.batch_size
        text = f"step {step} refused (samples {first:,} to {position - 1:,} of the stream): {self._reason}"
        self._log.incident(step, "refused", text)

    def _write(self, step: int, metrics: dict[str, Any], notes: Notes) -> None:
        values = dict(metrics)
        if notes.embeddings:
            values |= {f"collapse/{name}": value for name, value in self._diagnose(*notes.embeddings).items()}
        counts = {"bad_samples": self._progress.bad, "refused_steps": self._progress.refused}
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        self._log.step(step, values | self._meter.read() | counts)
