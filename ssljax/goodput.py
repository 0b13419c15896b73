"""Where the time of a run goes: a clock of the process, a record of every session, and the goodput of all of them.

Goodput is the share of wall-clock time that went into steps which count. In the terms of ML Productivity Goodput
(Google Cloud, 2024; arXiv:2502.06982) it is scheduling goodput times runtime goodput; the third factor, program
goodput, is the MFU, which the log has on its own.

A session is one process life (with several processes: process 0's). The wall-clock time of a run, from the start of its
first session to the end of its last, is the sum of these parts:

  step: steps that are in the final state, each counted once, with all that the loop does around them
  lost: steps that are not: repeated by a later session (after a kill, what came after the last checkpoint), taken back
        by a rewind, or refused; at the mean duration of a step of their session
  down: between two sessions; not after one that finished, as then nothing was left to do. A session that was killed
        ends with its last record, so what it did after that is down as well.
  start: from the start of the process to the loop, without the next two: imports, set-up
  compile, restore: of the training step and of the checkpoint. What runs beside another phase costs only the wait.
  data wait, save, eval, report: the loop stands still for a batch, for a checkpoint, for evaluations, for the report
  check: copies of the state are compared; or what made the loss NaN is searched for
"""

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import jax
from etils import epath

from ssljax.bounded import read_json

PHASES: tuple[str, ...] = ("start", "compile", "restore", "data wait", "save", "eval", "check", "report")
PARTS: tuple[str, ...] = ("step", "lost", "down", *PHASES)
_PAUSE = 1.0  # seconds at least between two writings of a record


def process_age() -> float:
    """Seconds since the operating system started this process; 0 where it does not tell (anywhere but Linux)."""
    try:
        # The name of the program, in brackets, may hold anything; the 22nd field is the start in ticks since boot.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


class Clock:
    """Seconds of this process by phase. What is in no phase is "start" until `start_steps`, and "step" from then on.

    Of nested phases only the inner one counts, so the seconds add up to the life of the clock. For one thread, the
    loop's. Wait for the device before a phase begins: steps under way would be counted as part of it.

    Attributes:
      started: seconds since the epoch.
      steps, lost_steps: steps that were run, and those of them that turned out useless (refused, or taken back by a
        rewind). The session counts them.

    Args:
      age: seconds that had passed before the clock was made; see `process_age`.
    """

    def __init__(self, age: float = 0.0):
        self.started = time.time() - age
        self.steps = self.lost_steps = 0
        self._seconds = dict.fromkeys(("step", *PHASES), 0.0) | {"start": age}
        self._phases = ["start"]
        self._since = perf_counter()

    def phase(self, name: str) -> "Phase":
        """`with clock.phase("eval"): ...`; the names are `PHASES`. Costs about a microsecond."""
        return Phase(self, name)

    def start_steps(self) -> None:
        """The loop begins."""
        self._charge()
        self._phases[0] = "step"

    def seconds(self) -> dict[str, float]:
        """Seconds until now of "step" and each of `PHASES`."""
        self._charge()
        return dict(self._seconds)

    def goodput(self) -> float:
        """Share of this session's time in steps that count, as far as it knows."""
        seconds = self.seconds()
        useful = max(0.0, 1 - self.lost_steps / self.steps) if self.steps else 0.0
        return useful * seconds["step"] / max(sum(seconds.values()), 1e-9)

    def _charge(self) -> None:
        now = perf_counter()
        self._seconds[self._phases[-1]] += now - self._since
        self._since = now


class Phase:
    """`name` may be changed inside: a wait for data while the device is busy is a "step" after all."""

    __slots__ = ("_clock", "name")

    def __init__(self, clock: Clock, name: str):
        self._clock, self.name = clock, name

    def __enter__(self) -> Self:
        self._clock._charge()
        self._clock._phases.append(self.name)
        return self

    def __exit__(self, *_: object) -> None:
        self._clock._phases[-1] = self.name
        self._clock._charge()
        self._clock._phases.pop()


@dataclass
class Record:
    """One session, as `<workdir>/sessions/<start>.json` has it."""

    started: float  # seconds since the epoch, like `ended`
    ended: float  # of the session, or where it was killed of its last record
    first_step: int | None = None  # steps done before the session and at its end; None: it did not get so far
    last_step: int | None = None
    first_step_after: float | None = None  # seconds from the start of the process to the end of its first step
    steps: int = 0
    lost_steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, and "step"
    end: str | None = None  # "finished", "preempted", "error: ..."; None: it was killed, or is under way


class Session:
    """Keeps the record of this session. A context manager: leaving it records the end and its reason.

    `end`: set it to give the reason; otherwise "finished", or the exception.
    """

    def __init__(self, workdir: epath.PathLike, clock: Clock | None = None):
        self.clock = clock or Clock()
        self.end: str | None = None
        self._record = Record(self.clock.started, self.clock.started)
        self._written = -math.inf
        name = datetime.fromtimestamp(self.clock.started, UTC).strftime("%Y%m%dT%H%M%S.%f")
        self._path = epath.Path(workdir) / "sessions" / f"{name}.json"

    def __enter__(self) -> Self:
        self.write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end = self.end or ("finished" if kind is None else f"error: {kind.__name__}")
        self.write()

    def start_steps(self, step: int) -> None:
        """The loop begins; `step` steps were done before it."""
        self.clock.start_steps()
        self._record.first_step = self._record.last_step = step
        self.write()

    def first_step_done(self, metrics: Any) -> float:
        """Seconds from the start of the process to the end of its first step, whose metrics these are (it waits)."""
        jax.block_until_ready(metrics)
        self._record.first_step_after = sum(self.clock.seconds().values())
        self.write()
        return self._record.first_step_after

    def stepped(self, step: int) -> None:
        """One more step was run, and `step` steps are done: fewer than were run where some were refused, or undone."""
        self.clock.steps += 1
        self.clock.lost_steps = max(0, self.clock.steps - (step - (self._record.first_step or 0)))
        self.reached(step)

    def reached(self, step: int) -> None:
        """`step` steps are done, a checkpoint of them may exist. Recorded at most once a second."""
        self._record.last_step = step
        if time.monotonic() - self._written > _PAUSE:
            self.write()

    def write(self) -> None:
        """Brings the file up to date (process 0)."""
        if jax.process_index():
            return
        record, self._written = self._record, time.monotonic()
        record.seconds = {name: round(seconds, 3) for name, seconds in self.clock.seconds().items()}
        record.steps, record.lost_steps = self.clock.steps, self.clock.lost_steps
        record.ended, record.end = record.started + sum(record.seconds.values()), self.end
        with suppress(OSError):  # a missing record is no reason to stop; who cannot write at all hears it from others
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # A reader, or a kill, never meets half a record.
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps(asdict(record), indent=1) + "\n")
            new.replace(self._path)


def read_sessions(workdir: epath.PathLike) -> list[Record]:
    """The sessions of a run, oldest first; [] if there are none. Files that are no records are left out."""
    records = []
    for path in (epath.Path(workdir) / "sessions").glob("*.json"):
        with suppress(ValueError, TypeError, AttributeError):
            record = Record(**read_json(path))
            numbers = [record.started, record.ended, record.steps, record.lost_steps, *record.seconds.values()]
            numbers += [x for x in (record.first_step, record.last_step, record.first_step_after) if x is not None]
            if all(map(math.isfinite, numbers)):  # raises TypeError for what is no number
                records.append(record)
    return sorted(records, key=lambda record: record.started)


@dataclass(frozen=True)
class Goodput:
    """Where the time of a run went: `seconds` of each of `PARTS` (see the module). They add up to `wall`."""

    sessions: int
    seconds: dict[str, float]

    @property
    def wall(self) -> float:
        """Seconds from the start of the first session to the end of the last, less the pauses of a finished run."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of `wall` in steps that count, 0 to 1."""
        return self.seconds["step"] / self.wall if self.wall else 0.0

    def __str__(self) -> str:
        rest = [(name, self.seconds[name]) for name in PARTS[1:] if self.seconds[name] >= 0.001 * self.wall]
        rest.sort(key=lambda part: -part[1])
        where = ", ".join(f"{name} {duration(seconds)}" for name, seconds in rest)
        sessions = f" in {self.sessions} sessions" if self.sessions > 1 else ""
        return f"goodput {100 * self.goodput:.1f} % of {duration(self.wall)}{sessions}" + (where and f"; {where}")


def run_goodput(sessions: Sequence[Record]) -> Goodput:
    """The goodput of a run over all its sessions, oldest first."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for i, session in enumerate(sessions):
        parts = split_steps(session, sessions[i + 1 :])
        for name, value in parts.items():
            seconds[name] += value
        if i and sessions[i - 1].end != "finished":
            seconds["down"] += max(0.0, session.started - max(s.ended for s in sessions[:i]))
    return Goodput(len(sessions), seconds)


def split_steps(session: Record, later: Sequence[Record] = ()) -> dict[str, float]:
    """Seconds of a session by part, its steps split into "step" and "lost" by what later sessions did again."""
    lost = session.lost_steps
    if session.first_step is not None and session.last_step is not None:
        again = min((s.first_step for s in later if s.first_step is not None), default=session.last_step)
        lost += max(0, session.last_step - max(again, session.first_step))
    share = min(1.0, lost / session.steps) if session.steps else 1.0
    seconds = {name: session.seconds.get(name, 0.0) for name in ("step", *PHASES)}
    return {**seconds, "step": (1 - share) * seconds["step"], "lost": share * seconds["step"]}


def duration(seconds: float) -> str:
    """For people: 8.2 s, 3:05 min, 2:10 h, 3.5 days."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3_599.5:
        return "{}:{:02} min".format(*divmod(round(seconds), 60))
    if seconds < 2 * 86_400:
        return "{}:{:02} h".format(*divmod(round(seconds / 60), 60))
    return f"{seconds / 86_400:.1f} days"
