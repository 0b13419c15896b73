"""What the tests of the data sources share."""

import io
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pytest

from ssljax.data import Source
from ssljax.data.pack import same_record


def png(value: int, side: int = 8) -> bytes:
    return cv2.imencode(".png", np.full((side, side, 3), value, np.uint8))[1].tobytes()


def write_tar(path, members):
    """members: name -> bytes, or a TarInfo without content."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_files(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(i))
    return root


def assert_is_a_good_source(source: Any) -> list[dict]:
    """What every source promises: protocol, negative indices, ends, pickling, many threads."""
    n = len(source)
    records = [source[i] for i in range(n)]
    assert all("key" in record for record in records)
    assert same_record(source[-1], records[-1])
    assert same_record(source[np.int64(0)], records[0])
    for outside in (n, -n - 1):
        with pytest.raises(IndexError):
            source[outside]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.classes == source.classes
    with ThreadPoolExecutor(8) as threads:
        order = np.random.default_rng(0).permutation(np.tile(np.arange(n), 5)).tolist()
        for reader in (source, copy):
            read = list(threads.map(reader.__getitem__, order))
            assert all(same_record(record, records[i]) for i, record in zip(order, read, strict=True))
    assert isinstance(source, Source)
    return records
