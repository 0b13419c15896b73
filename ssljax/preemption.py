"""SIGTERM: the scheduler wants the machine back. The run saves, and leaves with a status that says `start me again`."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

AGAIN = 75
"""Exit status of a run that was told to stop and saved (EX_TEMPFAIL in sysexits.h): the same command continues it."""


class Preempted(Exception):
    """The run was told to stop and has saved; the message says at which step."""


class StopSignal:
    """Turns the first SIGTERM into a wish that the loop looks at; the second ends the process at once.

    A context manager. Outside the main thread Python takes no signals; nothing is installed there.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("SIGTERM: saving, then leaving; a second SIGTERM ends the process at once", flush=True)
