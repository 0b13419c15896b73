"""Bad data in a run: it finishes, good samples keep their places, and every bad record is counted and named once."""

import io
import json
import logging
import os
import pickle
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import quick_compilation, simclr  # noqa: F401
from source_helpers import png, write_files, write_tar
from test_stream import INLINE, Numbers, assert_same, draw, flat, join, layouts, take

from ssljax.cli import main
from ssljax.data import (
    ArrayRecord,
    Arrays,
    BadSample,
    ByteTokenizer,
    Captions,
    Digits,
    Folder,
    HostTransform,
    Loader,
    Parquet,
    Tar,
    pack,
    train_batches,
    typical_sample,
)
from ssljax.data.errors import BadSamples
from ssljax.data.shuffle import shuffled
from ssljax.encode import Encoder, Pixels
from ssljax.mesh import Mesh
from ssljax.metrics import read_records
from ssljax.train import train

STEPS, BATCH = 20, 16
SHARDS, IN_SHARD = 6, 50


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    """Indices of read-only shards go to the home folder; keep them out of the real one."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def tiff(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF")
    return buffer.getvalue()


def digit(i: int) -> tuple[bytes, bytes]:
    record = Digits()[i]
    jpeg = cv2.imencode(".jpg", record["image"])[1].tobytes()
    return jpeg, json.dumps({"label": record["label"]}).encode()


def members_of(i: int) -> dict[str, bytes]:
    """Of sample i: a digit, or something that is wrong with it."""
    jpeg, label = digit(i)
    nan = np.full((16, 16), np.nan, np.float32)
    damage: dict[int, dict[str, bytes]] = {
        11: {"jpg": jpeg[: len(jpeg) // 2], "json": label},
        62: {"jpg": jpeg[:30] + bytes(range(256)), "json": label},
        113: {"jpg": b"", "json": label},
        35: {"jpg": jpeg, "json": b'{"label": "three"}'},
        77: {"jpg": jpeg, "json": b'{"label": 2.5}'},
        120: {"jpg": jpeg, "json": b'{"other": 1}'},
        141: {"tif": tiff(nan), "json": label},
        180: {"tif": tiff(np.full((16, 16), 7, np.int32)), "json": label},
    }
    sample = damage.get(i, {"jpg": jpeg, "json": label})
    return {f"{i:04d}.{extension}": content for extension, content in sample.items()}


BAD = {f"{i:04d}" for i in (11, 62, 113, 35, 77, 120, 141, 180)} | {"set-4.tar", "set-5.tar"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Tar:
    """Five of six shards, the last of them cut within a member."""
    folder = tmp_path_factory.mktemp("shards")
    for s in range(SHARDS - 1):
        samples = range(s * IN_SHARD, (s + 1) * IN_SHARD)
        write_tar(folder / f"set-{s}.tar", {k: v for i in samples for k, v in members_of(i).items()})
    last = folder / f"set-{SHARDS - 2}.tar"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    return Tar(f"{folder}/set-{{0..5}}.tar", fields={"tif": "image"}, missing="drop")


@pytest.fixture(scope="module")
def bad(shards) -> frozenset[int]:
    """The indices of `BAD`."""
    keys = []
    for i in range(len(shards)):
        try:
            keys.append(shards[i]["key"])
        except BadSample as error:
            keys.append(error.key)
    assert len(keys) == len(set(keys))
    assert set(keys) >= BAD
    return frozenset(i for i, key in enumerate(keys) if key in BAD)


@contextmanager
def quiet():
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def listed(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


# --- a run ----------------------------------------------------------------------------------------


def experiment(shards: Tar, *overrides: str):
    source = {"type": "Tar", "path": shards.path, "fields": {"tif": "image"}, "missing": "drop"}
    options = f"batch_size={BATCH}", f"steps={STEPS}", "checkpoint.every=8", "checkpoint.keep_last=9"
    return simclr(f"data.train={source}", *options, *overrides)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    train(experiment(shards), workdir, devices=jax.devices()[:1])
    return workdir


def expected_count(n: int, bad: frozenset[int], steps: int) -> int:
    """Bad records met in so many steps, by the rule that the stream documents."""
    count = 0
    for position, index in enumerate(shuffled(np.arange(steps * BATCH), n, 0).tolist()):
        attempt = 0
        while index in bad:
            index = int(np.random.default_rng((0, position, attempt)).integers(n))
            attempt += 1
        count += attempt
    return count


def test_a_run_finishes_and_names_every_bad_record_once(run, shards, bad):
    assert len(shards) > 4 * IN_SHARD + len(BAD)
    assert len(shards) < STEPS * BATCH  # every record is met
    assert Counter(listed(run / "bad_samples.jsonl")) == Counter(BAD)
    records = [record for record in read_records(run) if "loss" in record]
    assert len(records) == STEPS
    assert all(np.isfinite(record["loss"]) for record in records)
    for record in records:
        assert record["bad_samples"] == expected_count(len(shards), bad, record["step"])
    assert records[-1]["bad_samples"] >= len(BAD)


def test_reasons_say_what_is_wrong(run):
    lines = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in lines}
    for key, reason in {
        "0011": "truncated JPEG",
        "0062": "JPEG",
        "0113": "0 bytes",
        "0035": "'label' is 'three' (str)",
        "0077": "'label' is 2.5 (float); expected an integer",
        "0120": "'label' is missing, but int32[] in this run",
        "0141": "[0, 1]; these run from nan",
        "0180": "pixels of type int32",
        "set-4.tar": "set-4.tar is truncated",
        "set-5.tar": "set-5.tar is missing",
    }.items():
        assert reason in reasons[key], key


def test_a_resumed_run_counts_on_and_lists_nothing_twice(run, shards, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    for step in (16, 20):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    path = workdir / "bad_samples.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # the machine died while it wrote the last line
    train(experiment(shards), workdir, devices=jax.devices()[:1])
    count = lambda folder: [r["bad_samples"] for r in read_records(folder) if "loss" in r]  # noqa: E731
    assert count(workdir) == count(run)
    before, after = ((folder / "bad_samples.jsonl").read_text().splitlines() for folder in (run, workdir))
    assert after == [*before[:-1], before[-1][:-19], before[-1]]


def test_too_many_bad_records_in_evaluation():
    """All processes see all features, so all stop at the same place."""
    half = [{"image": png(i) if i % 2 else b"", "key": str(i)} for i in range(120)]
    mesh = Mesh().create(jax.devices()[:1])
    with jax.set_mesh(mesh):
        encoder = Encoder(Pixels(), lambda _, batch: batch, HostTransform(size=8), mesh, 32).at({}, {})
        with pytest.raises(ValueError, match="60 bad records among 120 samples"):
            encoder.features(half)
        assert len(encoder.features(half[21:])["index"]) == 50


# --- order ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged_and_clean(shards, bad) -> tuple[list[dict], list[dict]]:
    """The set with its bad records, and with sound ones in their places."""
    clean = [{"image": png(i % 256), "label": 0} if i in bad else shards[i] for i in range(len(shards))]
    return shards, clean


@pytest.mark.parametrize("threads", [0, 4])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_good_samples_stay_where_they_were(damaged_and_clean, bad, processes, threads):
    check_order(*damaged_and_clean, bad, processes, Loader(threads=threads))


@pytest.mark.parametrize(("processes", "threads"), [(1, 4), (2, 0)])
def test_good_samples_stay_where_they_were_with_workers(damaged_and_clean, bad, processes, threads):
    check_order(*damaged_and_clean, bad, processes, Loader(threads=threads, workers=2))


def check_order(damaged, clean, bad: frozenset[int], processes: int, loader: Loader) -> None:
    transform = HostTransform(size=8)
    options: dict[str, Any] = {"batch_size": BATCH, "seed": 3, "steps": STEPS, "like": typical_sample(clean, transform)}
    expected = take(train_batches(clean, transform, loader=INLINE, **options))
    rows = layouts(BATCH, processes)[0]
    parts = [take(train_batches(damaged, transform, rows=own, loader=loader, **options)) for own in rows]
    found = join(parts, rows)
    assert len(found) == STEPS
    good = ~np.isin(flat(expected), list(bad))
    assert (~good).sum() >= len(bad)
    for name in expected[0]:
        np.testing.assert_array_equal(flat(found, name)[good], flat(expected, name)[good])
    assert not np.isin(flat(found), list(bad)).any()
    np.testing.assert_array_equal(flat(found, "replaced") > 0, ~good)
    assert_same(found, take(train_batches(damaged, transform, loader=INLINE, **options)))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    share=st.floats(0, 0.8),
    seed=st.integers(0, 2**31),
    start=st.sampled_from([0, 5, 10**9]),
    blocks=st.permutations(range(4)),
)
def test_any_bad_records_any_split(n, share, seed, start, blocks):
    """Good samples stay, counts add up to the same sum, whichever process makes which rows."""
    bad = frozenset(np.random.default_rng(seed).permutation(n)[: int(share * n)].tolist())
    options: dict[str, Any] = {"batch_size": 8, "seed": seed, "start": start, "steps": 3, "loader": INLINE}
    clean = take(train_batches(Numbers(n), draw, **options))
    rows = np.array(blocks)[:, None] * 2 + [0, 1]
    with quiet():
        whole = take(train_batches(Numbers(n, bad), draw, **options))
        parts = [take(train_batches(Numbers(n, bad), draw, rows=own, **options)) for own in rows]
    assert_same(join(parts, rows), whole)
    good = ~np.isin(flat(clean), list(bad))
    for name in ("index", "value", "draw"):
        np.testing.assert_array_equal(flat(whole, name)[good], flat(clean, name)[good])
    np.testing.assert_array_equal(flat(whole, "replaced") > 0, ~good)
    assert sum(batch["replaced"].sum() for part in parts for batch in part) == flat(whole, "replaced").sum()


# --- the list -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(starts=st.lists(st.tuples(st.lists(st.integers(0, 9)), st.integers(0, 400)), min_size=1, max_size=5))
def test_the_list_survives_any_crash(tmp_path_factory, starts):
    """Cut anywhere after each start: what is whole is there once, and the last start completes it."""
    path = tmp_path_factory.mktemp("list") / "bad.jsonl"
    for indices, length in [*starts, (range(10), 10**6)]:
        bad = BadSamples(path)
        with quiet():
            for index in indices:
                bad.add(index, BadSample("a \n reason", f'ke"y {index}\ud800'))
        if path.exists():
            os.truncate(path, min(length, path.stat().st_size))
    whole = []
    for line in path.read_bytes().splitlines():
        try:
            whole.append(json.loads(line))
        except ValueError:
            assert b"}" not in line
    assert Counter(entry["index"] for entry in whole) == Counter(range(10))
    assert all(entry["key"] == f'ke"y {entry["index"]}\ud800' for entry in whole)


def test_several_processes_keep_one_list(tmp_path, caplog):
    """Each has a copy of the list, as worker processes have, and does not name what another has named."""
    first = BadSamples(tmp_path / "bad.jsonl")
    first.add(1, BadSample("r", "a"))
    second = pickle.loads(pickle.dumps(first))
    for which, index in ((second, 1), (second, 2), (first, 2), (first, 3), (second, 3), (first, 1)):
        which.add(index, BadSample("r", "abc"[index - 1]))
    assert listed(tmp_path / "bad.jsonl") == ["a", "b", "c"]
    assert [record.args[1] for record in caplog.records] == ["a", "b", "c"]


def test_a_list_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "bad.jsonl", "gs://bucket/bad.jsonl"):
        caplog.clear()
        BadSamples(path).add(1, BadSample("r", "a"))
        assert "bad record 1 (a): r" in caplog.text
        assert str(path) in caplog.text
    assert not Path("gs:").exists()


# --- what is bad ----------------------------------------------------------------------------------

PICTURE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"image": None}, "'image' is a NoneType; expected the bytes of a picture, or an array"),
        ({"image": "photo.jpg"}, r"'image' is 'photo.jpg' \(str\)"),
        ({"image": PICTURE.astype(complex)}, "pixels of type complex128"),
        ({"image": PICTURE.astype(np.int64)}, "pixels of type int64"),
        ({"image": PICTURE + 255.0}, r"must lie in \[0, 1\]"),
        ({"image": PICTURE + np.nan}, r"must lie in \[0, 1\]"),
        ({"label": "cat"}, r"'label' is 'cat' \(str\)"),
        ({"label": 1.0}, r"'label' is 1.0 \(float\); expected an integer of 32 bits"),
        ({"label": 2**40}, "expected an integer of 32 bits"),
        ({"label": 2**70}, "only hold numbers"),
        ({"label": None}, "'label' is a NoneType"),
        ({"label": [[1], [1, 2]]}, "'label' is a list"),
        ({"label": np.ones(3)}, r"'label' is float64\[3\]"),
        ({"text": 7}, r"'text' is 7 \(int\); expected a str, or several"),
        ({"text": float("nan")}, r"'text' is nan \(float\)"),
        ({"text": ("a", None)}, "'text' is a tuple"),
        ({"audio": np.array([0, np.nan, np.inf, 1])}, "2 of the 4 values of 'audio' are NaN or infinite"),
        ({"audio": np.array([1 + 1j * np.inf])}, "1 of the 1 values"),
        ({"audio": b"RIFF"}, "'audio' is a bytes; a batch can only hold numbers"),
        ({"audio": [np.ones(2), np.ones(3)]}, "'audio' is a list"),
    ],
)
def test_wrong_types_and_values_are_bad(entries, reason):
    good = {"image": PICTURE, "label": 3, "text": "three", "audio": np.zeros(4, np.float32)}
    transform = HostTransform(size=8, tokenizer=ByteTokenizer(8), keep=("audio",))
    assert transform(good, None)["label"] == 3
    with pytest.raises(BadSample, match=reason):
        transform({**good, **entries}, None)


def test_integers_of_any_kind_are_labels():
    for label in (3, True, np.uint8(3), np.int64(-3), np.array([1, 2], np.uint64)):
        found = HostTransform()({"label": label}, None)["label"]
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, label)


def odd(i: int) -> dict[str, Any]:
    """Records 3, 8, 11 and 20 are not like the others."""
    record: dict[str, Any] = {"audio": np.zeros(4, np.float32), "label": i, "key": f"clip-{i}"}
    other = {3: {"audio": np.zeros(4)}, 8: {"audio": np.zeros(5, np.float32)}, 11: {"label": [1, 2]}}
    other[20] = {"audio": np.float32([0, np.nan, 0, 0])}
    return {**record, **other.get(i, {})}


def test_records_unlike_the_others_are_bad(tmp_path):
    records, transform = [odd(i) for i in range(40)], HostTransform(keep=("audio",))
    kept = {"audio": ((4,), np.dtype(np.float32)), "label": ((), np.dtype(np.int32))}
    for first in (0, 3, 8, 11):  # whichever record is looked at first
        like = typical_sample([*records[first:], *records[:first]], transform)
        assert {name: (x.shape, x.dtype) for name, x in like.items()} == kept
    options: dict[str, Any] = {"batch_size": 8, "seed": 0, "steps": 10, "loader": INLINE}
    taken = take(train_batches(records, transform, like=like, bad_log=tmp_path / "bad.jsonl", **options))
    assert flat(taken, "audio").shape == (80, 4)
    assert set(flat(taken).tolist()) == set(range(40)) - {3, 8, 11, 20}
    lines = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    reasons = {line["key"]: line["reason"] for line in lines}
    assert reasons == {
        "clip-3": "'audio' is float64[4], but float32[4] in this run",
        "clip-8": "'audio' is float32[5], but float32[4] in this run",
        "clip-11": "'label' is int32[2], but int32[] in this run",
        "clip-20": "1 of the 4 values of 'audio' are NaN or infinite",
    }
    with pytest.raises(ValueError, match="a batch needs one shape"):
        take(train_batches(records, transform, **options))


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_pictures_of_all_sizes_name_the_remedy(n):
    """A run without data.size ends at its start, and does not replace a hundred records first."""
    records = [{"image": np.zeros((8 + i, 8, 3), np.uint8)} for i in range(n)]
    with pytest.raises(ValueError, match=r"a batch needs one shape \(set data.size to fit every image to it\)"):
        typical_sample(records, HostTransform())
    (tmp,) = {tuple(x.shape) for x in typical_sample(records, HostTransform(size=8)).values()}
    assert tmp == (8, 8, 3)


def test_one_picture_of_another_size_is_bad(caplog):
    records = [{"image": np.zeros((8 + (i == 3), 8, 3), np.uint8)} for i in range(40)]
    like = typical_sample(records, HostTransform())
    taken = take(train_batches(records, HostTransform(), batch_size=40, seed=0, steps=1, like=like, loader=INLINE))
    assert 3 not in flat(taken)
    assert "uint8[9, 8, 3], but uint8[8, 8, 3] in this run (set data.size" in caplog.text


# --- shards ---------------------------------------------------------------------------------------


def read_all(source) -> tuple[list[Any], list[str | int]]:
    """(keys of good records, keys of bad ones)"""
    good, bad = [], []
    for i in range(len(source)):
        try:
            good.append(source[i]["key"])
        except BadSample as error:
            bad.append(error.key)
    return good, bad


@settings(max_examples=30, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True))
def test_a_tar_cut_anywhere_has_its_whole_samples(tmp_path_factory, at):
    folder = tmp_path_factory.mktemp("cut")
    members = {f"{i}.{e}": bytes([i]) * 700 for i in range(5) for e in ("jpg", "txt")}
    write_tar(folder / "0.tar", members)
    whole = write_tar(folder / "1.tar", {f"x{name}": data for name, data in members.items()}).read_bytes()
    end = 10 * 3 * 512  # of the last member: a header and two blocks each
    (folder / "1.tar").write_bytes(whole[: int(at * end)])
    with pytest.raises(ValueError, match=r"1.tar is (truncated|empty).*missing='drop'"):
        Tar(str(folder / "*.tar"))
    for _ in range(2):  # the second reads the cached index
        tar = Tar(str(folder / "*.tar"), missing="drop")
        good, bad = read_all(tar)
        # Of a member, its last block holds 188 bytes; what follows is padding.
        count = sum(int(at * end) >= (2 * i + 2) * 3 * 512 - (512 - 188) for i in range(5))
        assert good[5:] == [f"x{i}" for i in range(count)] or (count == 0 and good[5:] == ["x0"])
        assert bad == ["1.tar"]
        assert all(tar[5 + i].keys() == {"image", "text", "key"} for i in range(count))
    (folder / "1.tar").write_bytes(whole)
    assert len(Tar(str(folder / "*.tar"))) == 10


def test_missing_shards_of_a_tar(tmp_path):
    for s in (0, 2):
        write_tar(tmp_path / f"{s}.tar", {f"{c}/{s}{i}.png": png(i) for c in ("cat", "dog") for i in range(2)})
    with pytest.raises(FileNotFoundError, match=r"1.tar is missing \(tar shard 2 of 3 in .*missing='drop'"):
        Tar(f"{tmp_path}/{{0..2}}.tar")
    tar = Tar(f"{tmp_path}/{{0..2}}.tar", missing="drop")
    good, bad = read_all(tar)
    assert (len(tar), len(good), bad) == (9, 8, ["1.tar"])
    assert tar.classes == ("cat", "dog")
    np.testing.assert_array_equal(tar.labels, [0, 0, 1, 1] * 2 + [-1])
    with pytest.raises(FileNotFoundError, match="no tar shard"):
        Tar(f"{tmp_path}/{{7..9}}.tar", missing="drop")
    (tmp_path / "2.tar").write_bytes(b"")
    (tmp_path / "0.tar").unlink()
    with pytest.raises(ValueError, match=r"no sample is left: .*0.tar is missing"):
        Tar(f"{tmp_path}/{{0..2}}.tar", missing="drop")


def test_a_tar_that_vanishes_or_shrinks(tmp_path):
    for s in range(3):
        write_tar(tmp_path / f"{s}.tar", {f"{s}{i}.png": png(i) for i in range(4)})
    tar = Tar(f"{tmp_path}/*.tar")
    (tmp_path / "1.tar").unlink()
    os.truncate(tmp_path / "2.tar", 3 * 1024)
    good, bad = read_all(tar)
    assert bad == ["10", "11", "12", "13", "23"]
    assert len(good) == 7
    assert len(take(train_batches(tar, HostTransform(size=8), batch_size=4, seed=0, steps=3, loader=INLINE))) == 3


def test_pictures_that_vanish(tmp_path):
    folder = Folder(str(write_files(tmp_path / "pictures", ["a.png", "b.png"])))
    (tmp_path / "pictures/a.png").unlink()
    with pytest.raises(BadSample, match=r"cannot be read: .*No such file") as caught:
        folder[0]
    assert caught.value.key == "a.png"


def test_captions_of_a_truncated_tar(tmp_path):
    whole = write_tar(tmp_path / "images.tar", {f"{i}.png": png(i) for i in range(4)}).read_bytes()
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{i},number {i}\n" for i in range(4)))
    (tmp_path / "images.tar").write_bytes(whole[: 2 * 1024 + 100])
    with pytest.raises(ValueError, match=r"images.tar is truncated.*missing='drop'"):
        Captions(str(tmp_path / "t.csv"), str(tmp_path / "images.tar"))
    captions = Captions(str(tmp_path / "t.csv"), str(tmp_path / "images.tar"), missing="drop")
    assert read_all(captions) == (["0.png", "1.png"], [])


def test_missing_and_damaged_array_records(tmp_path):
    pack(Arrays({"label": list(range(12))}), str(tmp_path / "set"), shards=3)
    parts = sorted((tmp_path / "set").glob("*.array_record"))
    source, blob = ArrayRecord(str(tmp_path / "set")), parts[1].read_bytes()
    os.truncate(parts[1], 1000)
    for i in (4, 7):
        with pytest.raises(BadSample) as caught:
            source[i]
        assert caught.value.key == i
    with pytest.raises(ValueError, match=rf"{parts[1].name} is truncated .*missing='drop'"):
        ArrayRecord(str(tmp_path / "set"))
    good, bad = read_all(ArrayRecord(str(tmp_path / "set"), missing="drop"))
    assert (len(good), bad) == (8, [parts[1].name])
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"holds 8 records, but .* says 12: a shard is missing.*missing='drop'"):
        ArrayRecord(str(tmp_path / "set"))
    assert read_all(ArrayRecord(str(tmp_path / "set"), missing="drop"))[1] == ["set"]
    named = str(tmp_path / "set" / "part-0000{0..2}-of-00003.array_record")
    assert read_all(ArrayRecord(named, missing="drop"))[1] == [parts[1].name]
    parts[1].write_bytes(blob)
    assert len(ArrayRecord(named, missing="drop")) == 12


def test_missing_and_damaged_parquet(tmp_path):
    for s in range(3):
        columns = {"image": [png(i) for i in range(4)], "label": [i % 2 for i in range(4)]}
        pq.write_table(pa.table(columns), tmp_path / f"{s}.parquet", row_group_size=2)
    source = Parquet(str(tmp_path), cache_mib=0)
    (tmp_path / "1.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"1.parquet is not a complete .*missing='drop'"):
        Parquet(str(tmp_path))
    damaged = Parquet(str(tmp_path), missing="drop")
    good, bad = read_all(damaged)
    assert (len(good), bad) == (8, ["1.parquet"])
    np.testing.assert_array_equal(damaged.labels, [0, 1] * 4 + [-1])
    (tmp_path / "1.parquet").unlink()
    assert read_all(Parquet(f"{tmp_path}/{{0..2}}.parquet", missing="drop"))[1] == ["1.parquet"]
    taken = take(train_batches(source, HostTransform(size=8), batch_size=12, seed=0, steps=1, loader=INLINE))
    np.testing.assert_array_equal(
        np.flatnonzero(flat(taken, "replaced")), np.flatnonzero(shuffled(np.arange(12), 12, 0) // 4 == 1)
    )


def test_an_error_names_its_record_on_the_command_line(tmp_path, capsys, monkeypatch):
    """Of a kind that the transform did not foresee."""
    write_files(tmp_path / "pictures", ["a.png"])

    def fail(*_):
        raise ValueError("oops")

    monkeypatch.setattr("ssljax.data.pictures._resize", fail)
    overrides = f"data.train=folder:{tmp_path / 'pictures'}", "evals={}"
    config = Path(__file__).parent.parent / "configs/simclr.py:digits"
    assert main(["train", "--config", str(config), "--workdir", str(tmp_path / "run"), *overrides]) == 1
    message = capsys.readouterr().err
    assert "ValueError: oops\nrecord 0, key 'a.png'" in message
