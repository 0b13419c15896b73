"""No silent hang: every process leaves a heartbeat in the workdir, and looks at those of the others when it is stuck.

A collective waits for its slowest process for ever, and says neither that it waits nor for whom. So a thread in each
process writes `<workdir>/heartbeats/<process>.json`: where its main thread is, and since when. When the main thread has
not moved for a while, the thread reads the others' files: a process whose file stands still is frozen, killed or cut
off, and all others leave with its name. If all hearts beat, it says who is where instead, and goes on waiting until
`patience` ends. Clocks of machines are never compared.
"""

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from etils import epath

from ssljax.bounded import parse_json

LOST = 76
"""Exit status of a process that waited for another in vain: the scheduler should start all of them again."""

_FINISHED = "finished"
_OF_A_STEP = ("step", "data wait")


@dataclass(frozen=True)
class Heartbeats:
    """How soon a process that does not answer is given up; all in seconds."""

    every: float = 5.0
    silence: float = (
        30.0  # a heartbeat that stands still for so long, while nothing moves here, is that of a lost process
    )
    patience: float = 1800.0  # all hearts beat and yet nothing moves: the longest that is waited

    def __post_init__(self):
        if not 0 < self.every < self.silence <= self.patience:
            raise ValueError(f"heartbeats need 0 < every < silence <= patience, got {self}")


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another process of the run does not answer any more."""
    return bool(
        re.search(r"\b(Gloo|NCCL)\b.*(connect|peer|remote|closed|timed? ?out)|coordination service", str(error), re.I)
    )


class Watchdog:
    """The heartbeat of this process, and its eye on the others; a context manager around the loop.

    `at(phase, step)` tells it where the main thread is. When that has not moved for three steps and two heartbeats, the
    other processes are watched; one whose file then stands still for `silence`, or that has ended by an error, is lost.
    `life` is a word that all processes share and no earlier start of the run had: files of earlier starts say nothing.
    `leave` ends this process (`os._exit`: the main thread hangs in a collective and cannot be asked).
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        process: int,
        processes: int,
        say: Callable[[str], None],
        times: Heartbeats = Heartbeats(),
        leave: Callable[[int], Any] = os._exit,
        life: str = "",
    ):
        self._folder = epath.Path(workdir) / "heartbeats"
        self._process, self._processes, self._say, self._leave, self._times = process, processes, say, leave, times
        self._life = life
        self._main = threading.get_ident()
        self._where, self._since = ("start", 0), time.monotonic()
        self._step_began, self._step_time = 0.0, 0.0
        self._beats = 0
        self._heard: dict[int, tuple[str, float]] = {}  # process -> its file, and since when we have seen it like that
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ssljax-watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            self._beat(_FINISHED if error is None else f"{type(error).__name__}: {error}")

    def at(self, phase: str, step: int) -> None:
        """The main thread enters `phase` of `step`. Costs about a microsecond."""
        now = time.monotonic()
        if phase == "step":
            if self._step_began:
                self._step_time = max(now - self._step_began, 0.9 * self._step_time)
            self._step_began = now
        elif phase not in _OF_A_STEP:
            self._step_began = 0.0  # what lies between two steps is then no measure of a step
        self._where, self._since = (phase, step), now

    def _watch(self) -> None:
        told = 0.0  # seconds without progress at the last report
        while not self._stop.wait(self._times.every):
            (phase, _), stuck = self._where, time.monotonic() - self._since
            steps = 3 * self._step_time
            if stuck < told:
                told = 0.0
            try:
                self._beat()
                if stuck < steps + 2 * self._times.every:
                    self._heard.clear()
                    continue
                lost = self._lost(self._look())
            except OSError as error:
                self._say(f"heartbeats in {self._folder} cannot be written or read: {error}")
                continue
            # Outside of steps (compilation, evaluation), and before one is timed, a long silence is nothing strange.
            usual = steps + self._times.silence if steps and phase in _OF_A_STEP else max(600.0, self._times.silence)
            if lost:
                self._give_up(f"{'; '.join(lost)}. Waited {stuck:.0f} s; start the run again")
            elif stuck >= self._times.patience:
                self._give_up(f"no progress for {stuck:.0f} s, the longest that is waited. {self._everyone()}")
            elif stuck >= max(usual, 2 * told):
                told = stuck
                self._say(f"no progress for {stuck:.0f} s. {self._everyone()}{self._stack()}")

    def _look(self) -> dict[int, tuple[str, float]]:
        """The other processes' files, and for how long they have stood still."""
        now = time.monotonic()
        for process in range(self._processes):
            if process == self._process:
                continue
            path = self._folder / f"{process}.json"
            text = path.read_text() if path.exists() else ""
            if _parsed(text).get("life") != self._life:
                text = ""
            if process not in self._heard or self._heard[process][0] != text:
                self._heard[process] = text, now
        return {process: (text, now - since) for process, (text, since) in self._heard.items()}

    def _lost(self, others: dict[int, tuple[str, float]]) -> list[str]:
        """The processes that are gone, in words."""
        lost = []
        for process, (text, still) in sorted(others.items()):
            ended = _parsed(text).get("ended")
            if ended is not None and ended != _FINISHED:
                lost.append(_describe(process, text))
            elif ended is None and still >= self._times.silence:
                lost.append(f"{_describe(process, text)}, has not been heard of since: frozen, killed or cut off")
        return lost[:20]

    def _give_up(self, why: str) -> None:
        why = f"process {self._process} on {socket.gethostname()} gives up: {why}"
        print(f"ssljax: {why}", file=sys.stderr, flush=True)
        self._say(why)
        if self._process == 0:
            time.sleep(2 * self._times.every)  # it hosts jax's coordination service: the others are to speak first
        self._leave(LOST)

    def _beat(self, ended: str | None = None) -> None:
        self._beats += 1
        (phase, step), seconds = self._where, time.monotonic() - self._since
        beat = {
            "process": self._process,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "life": self._life,
            "beat": self._beats,
            "phase": phase,
            "step": step,
            "seconds": round(seconds, 1),
        }
        if ended is not None:
            beat["ended"] = ended
        temporary = self._folder / f".{self._process}.json"
        temporary.write_text(json.dumps(beat))
        temporary.replace(self._folder / f"{self._process}.json")

    def _everyone(self) -> str:
        (phase, step), seconds = self._where, time.monotonic() - self._since
        here = f"process {self._process}: {phase}, step {step}, for {seconds:.0f} s"
        return "; ".join([here, *(_describe(p, text) for p, (text, _) in sorted(self._heard.items())[:20])])

    def _stack(self) -> str:
        """Where the main thread stands, innermost lines."""
        frame = sys._current_frames().get(self._main)
        lines = traceback.format_stack(frame)[-4:] if frame is not None else []
        return ". Here:\n" + "".join(lines).rstrip() if lines else ""


def _parsed(text: str) -> dict[str, Any]:
    try:
        beat = parse_json(text)
    except ValueError:
        return {}
    return beat if isinstance(beat, dict) else {}


def _describe(process: int, text: str) -> str:
    beat = _parsed(text)
    if not beat:
        return f"process {process}, no heartbeat seen"
    who = f"process {process} on {beat.get('host')} (pid {beat.get('pid')})"
    if "ended" in beat:
        return f"{who} ended: {beat['ended']}"
    return f"{who}: {beat.get('phase')}, step {beat.get('step')}, for {beat.get('seconds')} s"
