"""Hostile files of every kind that ssljax reads, and the readers that must refuse them.

`CASES`: name -> `Case`. Started as a program, it reads files in a process of their own and says what became of each,
how long it took and how much memory: see `main`.
"""

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from hostile_archives import MIB, NPZ, TAR, Cases, Files
from hostile_arrays import BANDS, GRAPHS, POINTS, VOLUMES
from hostile_pictures import PICTURES
from hostile_tables import CAPTIONS, LOGS, PARQUET, TOKENIZERS

from ssljax.checkpoint import CheckpointError, CheckpointStore
from ssljax.data import (
    ArrayRecord,
    BadSample,
    Bands,
    Captions,
    ClipBPE,
    Graphs,
    Npz,
    Parquet,
    Points,
    SentencePiece,
    Source,
    Tar,
    TokenizerFile,
    Volume,
    decode,
)
from ssljax.metrics import read_records

RECORDS = 5  # read of every source
_PATIENCE = 60  # seconds for a file


@dataclass(frozen=True)
class Case:
    """`refused`: what the refusal must match; None if the files may be read, quickly and in little memory."""

    reader: str
    files: Callable[[], Files]
    refused: str | None


def _read(source: Source) -> None:
    """Some records of a source. A refused record ends it, as a refused file does."""
    for i in range(min(len(source), RECORDS)):
        record = source[i]
        if "image" in record:
            decode(record["image"])


def checkpoint_like() -> dict[str, jax.ShapeDtypeStruct]:
    """What the checkpoints hold that `read_checkpoint` reads."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {"kernel": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=here),
            "step": jax.ShapeDtypeStruct((), np.int32, sharding=here)}  # fmt: skip


def read_checkpoint(path: Path) -> None:
    """`path`: any file in a checkpoint of step 1."""
    folder = next(parent for parent in path.parents if parent.name == "1")
    with CheckpointStore(folder.parent.parent) as store:
        store.restore(cast(Any, checkpoint_like()), 1)


READERS: dict[str, Callable[[Path], Any]] = {
    "picture": lambda path: decode(path.read_bytes()),
    "tar": lambda path: _read(Tar(str(path))),
    "npz": lambda path: _read(Npz(str(path))),
    "parquet": lambda path: _read(Parquet(str(path))),
    "arrayrecord": lambda path: _read(ArrayRecord(str(path))),
    "captions": lambda path: _read(Captions(str(path), str(path.parent / "images"))),
    "clip": lambda path: ClipBPE(str(path))("a photo of a dog"),
    "tokenizer.json": lambda path: TokenizerFile(str(path), 16)("a dog ﬁ"),
    "sentencepiece": lambda path: SentencePiece(str(path), 16)("a dog ﬁ"),
    "volume": lambda path: Volume((64, 64, 64), spacing=(1, 1, 1))(path, np.random.default_rng(0)),
    "points": lambda path: Points(1024)(path, None),
    "bands": lambda path: Bands(64, (0,))(path, None),
    "graphs": lambda path: Graphs(str(path))[0],
    "records": lambda path: read_records(path.parent),
    "checkpoint": read_checkpoint,
}


def _named(reader: str, cases: Cases) -> dict[str, Case]:
    return {f"{reader}: {name}": Case(reader, files, refused) for name, (files, refused) in cases.items()}


CASES: dict[str, Case] = {
    **{f"picture: {name}": Case("picture", lambda build=build: {"a": build()}, refused)
       for name, (build, refused) in PICTURES.items()},
    **_named("tar", TAR),
    **_named("npz", NPZ),
    **_named("parquet", PARQUET),
    **_named("captions", CAPTIONS),
    **{f"tokenizer: {name}": Case(*case) for name, case in TOKENIZERS.items()},
    **_named("records", LOGS),
    **_named("volume", VOLUMES),
    **_named("points", POINTS),
    **_named("bands", BANDS),
    **_named("graphs", GRAPHS),
}  # fmt: skip


def write(case: Case, folder: Path) -> Path:
    """Writes a case's files; returns the one to read."""
    files = case.files()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        os.utime(folder / name, (0, 0))  # what `planted` says
    return folder / next(iter(files))


@dataclass(frozen=True)
class Outcome:
    """What became of a file. `error` is the type of the exception, "" if the file was read."""

    error: str
    message: str
    seconds: float
    mib: float
    refused: bool  # by one of the errors that say so


REFUSALS = (BadSample, CheckpointError, ValueError, OSError)


def attempt(read: Callable[[Path], Any], path: Path) -> Outcome:
    """Reads a file and measures: processor time, and the peak of the resident memory above what it was before."""
    before, started = memory("VmRSS"), time.process_time()
    error: BaseException | None = None
    try:
        read(path)
    except BaseException as raised:
        error = raised
    seconds = time.process_time() - started
    kind, message = ("", "") if error is None else (type(error).__name__, str(error))
    return Outcome(kind, message[:2000], seconds, memory("VmHWM") - before, isinstance(error, REFUSALS))


def memory(name: str) -> float:
    """MiB of this process. `VmRSS` also makes the peak, `VmHWM`, start anew."""
    if name == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def limit_memory(mib: int) -> None:
    """Lets the address space of this process grow by so much, so that a bomb ends in MemoryError."""
    size = int((memory("VmSize") + mib) * MIB)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main() -> None:
    """For each line `reader<tab>path` of the standard input, one line of JSON: an `Outcome`."""
    limit_memory(2048)
    for line in sys.stdin:
        reader, path = line.rstrip("\n").split("\t")
        signal.alarm(_PATIENCE)  # ends the process
        print(json.dumps(asdict(attempt(READERS[reader], Path(path)))), flush=True)


if __name__ == "__main__":
    main()
