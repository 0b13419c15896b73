"""Tar shards: what tarfile wrote is read by offset, what is damaged or unsafe is refused."""

import gzip
import json
import os
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from source_helpers import assert_is_a_good_source, png, write_tar

from ssljax.data import Tar
from ssljax.data.errors import BadSample
from ssljax.data.pack import same_record


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    """Indices of read-only shards go to the home folder; keep them out of the real one."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def webdataset(i):
    name = f"dir/{i:04d}"
    meta = {"width": i, "ok": 0.5, "who": "me", "nested": {"a": 1}}
    return {
        f"{name}.png": png(i), f"{name}.cls": str(i % 3).encode(), f"{name}.txt": f"number {i}\n".encode(),
        f"{name}.json": json.dumps(meta).encode(), f"{name}.seg.png": b"not asked for",
    }  # fmt: skip


def shards(folder):
    for s in range(3):
        write_tar(folder / f"part-{s:03d}.tar", {k: v for i in range(4) for k, v in webdataset(4 * s + i).items()})
    return folder


def test_tar_webdataset(tmp_path):
    tar = Tar(str(shards(tmp_path) / "part-{000..002}.tar"))
    records = assert_is_a_good_source(tar)
    assert len(tar) == 12
    assert records[7] == {
        "image": png(7), "label": 1, "text": "number 7", "width": 7, "ok": 0.5, "who": "me", "key": "dir/0007",
    }  # fmt: skip
    assert tar.classes == ()
    assert len(Tar(str(tmp_path / "part-*.tar"))) == 12
    segmented = Tar(str(tmp_path / "part-000.tar"), fields={"seg.png": "mask"})
    assert segmented[0]["mask"] == b"not asked for"


def test_tar_with_class_folders_and_long_names(tmp_path):
    long = "n" * 180
    members = {f"./train/{c}/{long}_{i}.jpg": png(i) for c in ("dog", "cat") for i in range(2)}
    members["./train/dog/._junk.jpg"] = b"macOS"
    members["./train/README.md"] = b"read me"
    records = assert_is_a_good_source(tar := Tar(str(write_tar(tmp_path / "a.tar", members))))
    assert tar.classes == ("cat", "dog")
    assert [r["label"] for r in records] == [1, 1, 0, 0]
    assert records[0]["key"] == f"train/dog/{long}_0"
    np.testing.assert_array_equal(tar.labels, [1, 1, 0, 0])


def test_tar_index_is_cached_and_follows_changes(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.png": png(1), "2.png": png(2)})
    first = Tar(str(path))
    cache = tmp_path / "a.tar.index.npz"
    written = cache.stat().st_mtime_ns
    assert [r["key"] for r in Tar(str(path))] == ["1", "2"]
    assert cache.stat().st_mtime_ns == written
    cache.write_bytes(cache.read_bytes()[:100])  # a damaged cache is not believed
    assert same_record(Tar(str(path))[1], first[1])
    write_tar(path, {"1.png": png(1), "2.png": png(2), "3.png": png(3)})
    assert [r["key"] for r in Tar(str(path))] == ["1", "2", "3"]
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(BadSample, match="shorter than when it was indexed"):
        first[1]


@pytest.mark.parametrize("obstacle", ["read-only folder", "a folder of that name"])
def test_tar_index_goes_home_where_it_cannot_lie_beside(tmp_path, obstacle):
    (folder := tmp_path / "shards").mkdir()
    write_tar(folder / "a.tar", {"1.png": png(1)})
    if obstacle == "read-only folder":
        folder.chmod(0o555)  # holds for root too
    else:
        (folder / "a.tar.index.npz").mkdir()
    before = sorted(os.listdir(folder))
    assert len(Tar(str(folder / "a.tar"))) == 1
    assert sorted(os.listdir(folder)) == before
    (cache,) = (Path.home() / ".cache" / "ssljax").iterdir()
    written = cache.stat().st_mtime_ns
    assert Tar(str(folder / "a.tar"))[0]["image"] == png(1)
    assert cache.stat().st_mtime_ns == written
    folder.chmod(0o755)


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"a.png": b"x", "l": special("b.png", tarfile.SYMTYPE, "/etc/passwd")}, "link or device inside: 'b.png'"),
        ({"a.png": b"x", "l": special("b.png", tarfile.LNKTYPE, "a.png")}, "hard-dereference"),
        ({"d": special("d.png", tarfile.CHRTYPE)}, "link or device"),
        ({"../up.png": b"x"}, r"named '\.\./up.png'"),
        ({"/abs.png": b"x"}, "named '/abs.png'"),
        ({"a.jpg": b"x", "a.png": b"y"}, "fields={'png': 'mask'}"),
        ({"IMG.2020.01.jpg": b"x"}, "ends at the first dot"),
        ({"a.xyz": b"x"}, r"found are \['xyz'\]"),
        ({}, "no files inside"),
    ],
)
def test_tar_refuses(tmp_path, members, says):
    path = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(ValueError, match=says) as error:
        Tar(str(path))
    assert "bad.tar" in str(error.value)


def test_tar_truncated_empty_compressed_missing(tmp_path):
    members = {f"{i}.png": png(i, 32) for i in range(20)}
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    cut = tmp_path / "cut.tar"
    with tarfile.open(tmp_path / "whole.tar") as tar:
        boundary = tar.getmembers()[10].offset  # between two members
    for size in (boundary, boundary + 100, boundary + 512, boundary + 600):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut.tar is truncated"):
            Tar(str(cut))
    damaged = bytearray(whole)
    damaged[boundary : boundary + 512] = b"\xff" * 512
    cut.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"cut.tar is truncated"):
        Tar(str(cut))
    cut.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cut.tar is empty \(0 bytes\)"):
        Tar(str(cut))
    cut.write_bytes(b"hello " * 1000)
    with pytest.raises(ValueError, match="not a tar file"):
        Tar(str(cut))
    cut.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match="gunzip"):
        Tar(str(cut))
    with pytest.raises(FileNotFoundError, match=r"did you mean 'whole.tar'"):
        Tar(str(tmp_path / "hole.tar"))
    shards(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"part-003.tar is missing \(tar shard 4 of 5"):
        Tar(str(tmp_path / "part-{000..004}.tar"))


def test_tar_bad_content_is_a_bad_sample(tmp_path):
    for name, content in {"cls": b"cat", "json": b"[1]", "txt": b"\xff\xfe"}.items():
        tar = Tar(str(write_tar(tmp_path / f"{name}.tar", {"a.png": png(0), f"a.{name}": content})))
        with pytest.raises(BadSample, match=r"a in .*: cannot read its"):
            tar[0]


def test_many_shards_do_not_run_out_of_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr("ssljax.data.sources.base.OpenFiles._KEEP", 3)
    for s in range(9):
        write_tar(tmp_path / f"{s}.tar", {f"{s}-{i}.png": png(9 * s + i) for i in range(3)})
    tar = Tar(str(tmp_path / "*.tar"))
    before = len(os.listdir("/proc/self/fd"))
    barrier = threading.Barrier(8)

    def read(_):
        barrier.wait()
        return [tar[i]["image"] for i in range(27)]

    with ThreadPoolExecutor(8) as threads:
        for images in threads.map(read, range(8)):
            assert images == [png(i // 3 * 9 + i % 3) for i in range(27)]
    assert len(os.listdir("/proc/self/fd")) - before <= 3 + 8
