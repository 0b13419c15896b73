"""Records that cannot be used: the error that says so, and the list that names each of them once."""

import errno
import fcntl
import json
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

from ssljax.bounded import parse_json

log = logging.getLogger(__name__)

_OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # this process lacks something: no fault of the record
_LOCK = threading.Lock()  # of all lists in this process, so that lists can travel to worker processes


class BadSample(ValueError):
    """A record that cannot be used; the message says why. The stream counts it, logs it and goes on without it.

    `key` names the record, where it is known.
    """

    def __init__(self, reason: str, key: str | int | None = None):
        super().__init__(reason)
        self.key = key

    def __reduce__(self):  # the default forgets `key` on the way back from a worker process
        return type(self), (str(self), self.key)


class UnreadableIsBad:
    """`with` it, an `OSError` (the file is gone, the disk failed) becomes the `BadSample` of the record `key`."""

    def __init__(self, key: str | int | None = None):
        self.key = key

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno not in _OUT_OF:
            raise BadSample(f"cannot be read: {error}", self.key) from error


class BadSamples:
    """Names every bad record once: in the log, and as a line of a local JSON-lines file (`index`, `key`, `reason`).

    Records that the file lists already are not named again, whether an earlier start of the run listed them or another
    process of this machine. The file is first looked at when a record is bad.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None):
        self.path = None if path is None else Path(path)
        if path is not None and "://" in os.fspath(path):
            log.warning("%s is not a local file: bad records are named in the log only", os.fspath(path))
            self.path = None
        self._named: set[tuple[int, str | int]] = set()
        self._known = 0  # bytes of the file, in whole lines, that `_named` covers

    def add(self, index: int, error: BadSample) -> None:
        key = error.key if isinstance(error.key, str | int) else str(error.key)
        with _LOCK:
            if (index, key) in self._named:
                return
            self._named.add((index, key))
            new = True
            if self.path is not None:
                try:
                    new = self._append(index, key, str(error))
                except OSError as problem:
                    log.warning("%s cannot be written: %s", self.path, problem)
        if new:
            log.warning("bad record %d (%s): %s", index, key, error)

    def _append(self, index: int, key: str | int, reason: str) -> bool:
        """False if the file lists the record already."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            with suppress(OSError):  # file systems without locks: two processes may then both list a record
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            file.seek(self._known)
            others = file.read()
            listed = {_name(line) for line in others.splitlines()}
            self._named.update(name for name in listed if name is not None)
            self._known += others.rfind(b"\n") + 1
            if (index, key) in listed:
                return False
            if others and not others.endswith(b"\n"):  # cut by a crash
                file.write(b"\n")
            line = json.dumps({"index": index, "key": key, "reason": reason}) + "\n"
            file.write(line.encode())
            self._known = file.tell()
        return True


def _name(line: bytes) -> tuple[int, str | int] | None:
    """Index and key of a line of the list, or None if it is none (cut short, say)."""
    try:
        entry = parse_json(line)
        index, key = entry["index"], entry["key"]
    except (ValueError, KeyError, TypeError):
        return None
    return (index, key) if isinstance(index, int) and isinstance(key, str | int) else None
