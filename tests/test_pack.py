"""Packing keeps every record; inspection counts and draws them."""

import io
import json

import cv2
import numpy as np
import pytest
from rich.console import Console
from source_helpers import assert_is_a_good_source, write_files

from ssljax.data import (
    ArrayRecord,
    Arrays,
    Folder,
    Scenes,
    inspect,
    pack,
    print_summary,
)
from ssljax.data.errors import BadSample
from ssljax.data.pack import same_record
from ssljax.data.sources.shards import decode_record, encode_record


@pytest.mark.parametrize("count", [1, 11])
def test_pack_keeps_every_record(tmp_path, count):
    source = Scenes(count=count, size=16, objects=2)
    packed = pack(source, str(tmp_path / "out"), shards=3)
    records = assert_is_a_good_source(packed)
    assert all(same_record(records[i], source[i]) for i in range(count))
    assert packed.classes == source.classes
    assert len(list((tmp_path / "out").glob("*.array_record"))) == min(3, count)
    index = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (index["count"], index["keys"]) == (count, sorted(source[0]))
    assert same_record(ArrayRecord(str(tmp_path / "out" / "part-*.array_record"))[0], source[0])
    with pytest.raises(FileExistsError, match=r"dataset.json"):
        pack(source, str(tmp_path / "out"))


def test_records_of_every_type_survive_encoding():
    record = {
        "key": "ä", "image": b"\0\1", "empty": b"", "label": -3, "weight": 0.1, "nan": float("nan"), "yes": True,
        "text": ("a", "b"), "none": (), "mask": np.eye(3, dtype=bool), "f16": np.ones((2, 0), np.float16),
        "turned": np.arange(6).reshape(2, 3).T, "scalar": np.array(2, np.float32),
        "u2": np.array([65535], np.uint16),
    }  # fmt: skip
    again = decode_record(encode_record(record))
    assert list(again) == list(record)
    assert same_record(again, record)
    assert not same_record(again, {**record, "label": -3.0})
    for bad in (None, np.array(["x"]), np.array([{}]), [1], np.float64(1), np.int64(1)):
        with pytest.raises(TypeError, match="'x' is"):
            encode_record({"x": bad})
    blob = encode_record(record)
    for damaged in (b"", blob[:7], blob[:40], blob[:-1], b"\xff" * 8 + blob[8:]):
        with pytest.raises(BadSample, match="not one that"):
            decode_record(damaged)


def test_array_record_says_what_is_wrong(tmp_path):
    folder = tmp_path / "out"
    pack(Scenes(count=9, size=16), str(folder), shards=3)
    shard = folder / "part-00001-of-00003.array_record"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=r"holds 6 records, but its dataset.json says 9"):
        ArrayRecord(str(folder))
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match=r"part-00001-of-00003.array_record is empty"):
        ArrayRecord(str(folder))
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated or not ArrayRecord"):
        ArrayRecord(str(folder))
    with pytest.raises(FileNotFoundError, match="no ArrayRecord shard"):
        ArrayRecord(str(tmp_path / "nothing"))


def test_a_failed_pack_leaves_no_shards(tmp_path):
    with pytest.raises(TypeError, match="'bad' is"):
        pack(Arrays({"image": np.zeros((2, 1)), "bad": [1, None]}), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_inspect_counts_and_draws(tmp_path):
    write_files(tmp_path / "in", [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)])
    (tmp_path / "in" / "dog" / "2.png").write_bytes(b"\x89PNG broken")
    summary = inspect(Folder(str(tmp_path / "in")), str(tmp_path / "new" / "sheet.png"), n=10)
    assert (summary["count"], summary["sampled"], summary["classes"]) == (6, 6, {"cat": 3, "dog": 3})
    assert list(summary["unreadable"]) == ["dog/2.png"]
    assert summary["keys"]["image"] == "bytes, decoded 8x8 (HxW)"
    sheet = cv2.imread(str(tmp_path / "new" / "sheet.png"))
    # the first tile is the first picture, enlarged: grey 0
    assert sheet is not None
    assert (sheet[20:130, 20:130] == 0).all()
    print_summary(summary, Console(file=(printed := io.StringIO()), width=100))
    assert "dog/2.png" in printed.getvalue()

    summary = inspect(Scenes(count=1_000), n=7)
    assert (summary["labels_counted"], summary["sampled"], len(summary["classes"])) == ("sampled", 7, 48)
    assert summary["keys"]["mask"] == "uint8 [32, 32]"
    assert sum(summary["classes"].values()) == 7
