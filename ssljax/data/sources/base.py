"""What all sources share: the protocol, paths with `$VARS` and `~`, and open files that survive pickling."""

import difflib
import glob
import itertools
import operator
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from ssljax.bounded import LARGEST_RECORD, read_file
from ssljax.data.errors import BadSample
from ssljax.data.media import MEDIA

Record = dict[str, Any]
"""One sample: numpy arrays, bytes, str, ints, floats, tuples of str, and `Path`s of files that are better not read as a
whole. Conventional keys: `image` (uint8 `[H,W,C]` or the encoded bytes of a picture), `video`, `audio`, `volume`,
`points` (an array, encoded bytes, or a `Path`), `graph` (a dict of arrays: see `ssljax.data.Graph`), `label` (int),
`text` (str or tuple of str), `key` (for messages)."""

Missing = Literal["error", "drop"]
"""What a source of shards does about one that is missing or damaged when it is opened. `drop`: the samples that can be
read are used, and one last record for each such shard is bad and names it, so that the loss is counted and listed."""

PICTURES = MEDIA["image"]


@runtime_checkable
class Source(Protocol):
    """A random-access sequence of records (also satisfies grain's `RandomAccessDataSource`).

    Picklable, and safe to read from many threads. `classes` names the labels, or is `()`. Sources that know all their
    labels without reading samples also have `labels` (int array `[n]`, -1 where there is none). A record whose content
    is damaged raises `ssljax.data.errors.BadSample`; one that cannot be read may also raise `OSError`.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


def check_index(index: int, length: int) -> int:
    """`index` as a plain int in `[0, length)`; negative ones count from the end, as in a list."""
    i = operator.index(index)
    if not -length <= i < length:
        raise IndexError(f"index {i} is outside a source of {length} samples")
    return i % length


def int32(labels: np.ndarray) -> np.ndarray:
    """Integers as int32. Raises ValueError where they do not fit."""
    narrow = labels.astype(np.int32)
    if (narrow != labels).any():
        raise ValueError(f"labels from {labels.min()} to {labels.max()} do not fit into 32 bits")
    return narrow


def read_picture(path: Path, key: str) -> bytes:
    """The content of a picture's file. Raises BadSample for a pipe, a device and a file of more than
    `ssljax.bounded.LARGEST_RECORD` bytes."""
    try:
        return read_file(path)
    except ValueError as error:
        raise BadSample(str(error), key) from error


def walk(root: Path) -> Iterator[str]:
    """Names of the plain files below `root`, `/`-joined. Hidden ones are skipped; links are followed, loops are not."""
    folders: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # (name, the folders above it)
    while folders:
        name, above = folders.pop()
        status = os.stat(root / name)
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # its own ancestor
            continue
        with os.scandir(root / name) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append((f"{name}{entry.name}/", (*above, identity)))
                elif entry.is_file():
                    yield name + entry.name


def expand(path: str | os.PathLike) -> Path:
    """`path` with `~` and `$VARS` replaced. An unset variable raises ValueError."""
    expanded = os.path.expanduser(os.path.expandvars(os.fspath(path)))
    if missing := re.findall(r"\$\{?(\w+)\}?", expanded):
        raise ValueError(f"{os.fspath(path)!r} uses ${missing[0]}, which is not set; export {missing[0]}=... first")
    return Path(expanded)


def expand_files(pattern: str, what: str, missing: Missing = "error") -> tuple[Path, ...]:
    """The files of a path, a glob (`a-*.tar`), or a brace range (`a-{000..009}.tar`, `{x,y}.tar`), in order.

    Raises:
        FileNotFoundError: nothing matches, or a file of the range is missing (`drop`: it is named all the same).
    """
    names = _expand_braces(pattern)
    files: list[Path] = []
    absent: list[Path] = []
    for name in names:
        path = expand(name)
        if path.is_file():
            files.append(path)
        elif matches := sorted(glob.glob(str(path))):
            files += [Path(match) for match in matches if os.path.isfile(match)]
        elif len(names) > 1 and missing == "drop":
            files.append(path)
            absent.append(path)
        elif len(names) > 1:
            raise FileNotFoundError(
                f"{path} is missing ({what} {names.index(name) + 1} of {len(names)} in {pattern!r}); to go on without "
                "it, set missing='drop'"
            )
    if len(files) == len(absent):
        raise FileNotFoundError(f"no {what} at {expand(pattern)}{_hint_for(expand(pattern))}")
    return tuple(dict.fromkeys(files))


def _expand_braces(pattern: str) -> list[str]:
    parts: list[list[str]] = []
    # `${NAME}` is a variable, not a brace range
    for text in re.split(r"((?<!\$)\{[^{}]*\})", pattern):
        if match := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", text):
            first, last = match.groups()
            if int(last) < int(first):
                raise ValueError(f"the range {text} in {pattern!r} counts down; write {{{last}..{first}}}")
            parts.append([str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)])
        elif text.startswith("{"):
            parts.append(text[1:-1].split(","))
        else:
            parts.append([text])
    return ["".join(choice) for choice in itertools.product(*parts)]


def _hint_for(path: Path) -> str:
    """What is there instead of the missing `path`."""
    if path.is_dir():
        return f": it is a folder; say which files, as in '{path}/*'"
    if not path.parent.is_dir():
        return f": the folder {path.parent} does not exist"
    return nearest(path.name, (entry.name for entry in path.parent.iterdir()))


def nearest(name: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the empty string when nothing is near."""
    close = difflib.get_close_matches(name, list(options), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def extension(name: str) -> str:
    """`photo.JPG` -> `jpg`; a name without a dot gives the empty string."""
    return os.path.splitext(name)[1][1:].lower()


class OpenFiles:
    """Descriptors by path, opened at first use. `pread` needs no lock and no seek, so threads share them; a pickled
    copy starts without any."""

    # Beyond this many shards, files are opened for each read: the usual limit is 1,024 descriptors a process.
    _KEEP = 256

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def read(self, path: Path, offset: int, size: int) -> bytes:
        if size > LARGEST_RECORD:
            raise BadSample(f"{path} has a member of {size:,} bytes, over the limit of {LARGEST_RECORD:,}")
        descriptor = self._descriptors.get(path)
        if descriptor is not None:
            return os.pread(descriptor, size, offset)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        kept = len(self._descriptors) < self._KEEP and self._descriptors.setdefault(path, descriptor) == descriptor
        try:
            return os.pread(descriptor, size, offset)
        finally:
            if not kept:
                os.close(descriptor)

    def __reduce__(self):
        return OpenFiles, ()

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
