"""Any source as ArrayRecord shards: `pack`. Read them with `sources.ArrayRecord`."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from ssljax.data.sources.base import Source, expand
from ssljax.data.sources.shards import INDEX, ArrayRecord, encode_record


def pack(source: Source, folder: str, shards: int = 8, verify: bool = True) -> ArrayRecord:
    """Writes `source` to `folder` as `part-00000-of-00008.array_record`, ... and `dataset.json`, in the source's order.

    Encoded pictures stay the bytes they are, arrays stay arrays. `dataset.json` (count, classes, keys) is written
    last: a folder without it is unfinished. With `verify` every record is read back and compared.

    Raises:
        FileExistsError: the folder already has a packed set or other shards.
        ValueError: a record read back differs (a failing disk).
    """
    from array_record.python.array_record_module import ArrayRecordWriter  # slow to import

    root = expand(folder)
    root.mkdir(parents=True, exist_ok=True)
    if taken := sorted(p.name for p in root.iterdir() if p.name == INDEX or p.suffix == ".array_record"):
        raise FileExistsError(f"{root} already has {taken[0]!r}; choose an empty folder, or remove the old set first")
    if shards < 1:
        raise ValueError(f"shards={shards}: write at least one")
    count, keys = len(source), set()
    bounds = np.linspace(0, count, min(shards, count) + 1).round().astype(int).tolist()
    unfinished: list[Path] = []
    try:
        for s, (start, stop) in enumerate(itertools.pairwise(bounds)):
            unfinished.append(root / f".part-{s:05d}-of-{len(bounds) - 1:05d}.array_record")
            # One record a group: random access reads no neighbours.
            writer = ArrayRecordWriter(str(unfinished[-1]), "group_size:1")
            try:
                for i in range(start, stop):
                    record = source[i]
                    keys |= record.keys()
                    writer.write(encode_record(record))
            finally:
                writer.close()
        for part in unfinished:
            part.rename(part.with_name(part.name.removeprefix(".")))
    finally:
        for part in unfinished:
            part.unlink(missing_ok=True)
    packed = ArrayRecord(str(root))
    if verify:
        for i in range(count):
            if not same_record(source[i], packed[i]):
                raise ValueError(
                    f"record {i} read back from {root} differs from the source; check the disk and pack again"
                )
    index = {"count": count, "classes": list(source.classes), "keys": sorted(keys)}
    (root / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return ArrayRecord(str(root))


def same_record(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """True if two records have the same keys, types, shapes and values."""
    return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and (a == b or (a != a and b != b))  # NaN equals NaN here
