"""What goes wrong in practice: a run counts it and goes on, or ends in a message that says what to do."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from PIL import Image
from small import CONFIGS, quick_compilation, simclr, train_command  # noqa: F401

import ssljax
from ssljax.checkpoint import CheckpointStore
from ssljax.cli import main
from ssljax.metrics import read_records
from ssljax.train import train


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The message of a command that fails as it should: exit status 1, no traceback."""
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


# ---------------------------------------------------------------------------------------------------------- pictures


def bomb(side: int = 12_000) -> bytes:
    """A sound PNG of a few kilobytes that unpacks to 144 million pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side * (1 + side // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def saved(image: np.ndarray, kind: str, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(buffer, kind)
    return buffer.getvalue()


def good_pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    colour = cv2.resize(rng.integers(0, 256, (5, 5, 3), np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC)
    return {
        "plain.jpg": saved(colour, "JPEG"),
        "grey.jpg": saved(colour[..., 0], "JPEG"),
        "cmyk.jpg": saved(colour, "JPEG", "CMYK"),
        "transparent.png": saved(np.dstack([colour, colour[..., :1]]), "PNG"),
        "palette.png": saved(colour, "PNG", "P"),
        "deep.png": cv2.imencode(".png", colour.astype(np.uint16) * 257)[1].tobytes(),
        "deep_grey.png": saved(colour[..., 0].astype(np.uint16) * 257, "PNG"),
        "photo.webp": saved(colour, "WEBP"),
    }


def bad_pictures() -> dict[str, bytes]:
    photo = good_pictures()["plain.jpg"]
    return {
        "corrupt.jpg": photo[:200] + bytes(range(256)) * 4,
        "cut.jpg": photo[: len(photo) // 2],
        "empty.jpg": b"",
        "text.jpg": b"This is not the picture you are looking for.\n",
        "bomb.png": bomb(),
    }


def write(folder: Path, pictures: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    return folder


def classification(folder: Path, *protocols: str) -> str:
    source = f"folder:{folder}"
    return f"evals.frozen={dict(type='Classification', train=source, test=source, protocols=protocols, k=(1,))}"


def test_bad_pictures_are_counted_and_good_ones_of_every_kind_train(tmp_path, capsys):
    assert len(bomb()) < 100_000
    write(tmp_path / "pictures/a", good_pictures())
    write(tmp_path / "pictures/b", good_pictures() | bad_pictures())
    overrides = f"data.train=folder:{tmp_path / 'pictures'}", "steps=6", classification(tmp_path / "pictures", "knn")
    assert main(train_command(tmp_path / "run", *overrides)) == 0
    records = read_records(tmp_path / "run")
    assert all(np.isfinite(r["loss"]) for r in records if "loss" in r)
    counts = [r["bad_samples"] for r in records if "loss" in r]
    assert counts == sorted(counts)
    assert counts[-1] >= len(bad_pictures())
    assert f"{counts[-1]:.0f} of 48 samples were bad and replaced" in capsys.readouterr().out
    assert {r["step"]: r["eval/frozen/knn1_top1"] for r in records if "eval/frozen/knn1_top1" in r}.keys() == {0, 6}
    bad = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in bad}
    assert len(reasons) == len(bad)
    assert reasons.keys() == {f"b/{name}" for name in bad_pictures()}
    assert "truncated" in reasons["b/cut.jpg"]
    assert "0 bytes" in reasons["b/empty.jpg"]
    assert "not an image" in reasons["b/text.jpg"]
    assert "12000x12000" in reasons["b/bomb.png"]


def test_a_folder_of_bad_pictures_only(tmp_path, capsys):
    write(tmp_path / "pictures", bad_pictures())
    message = fails(capsys, train_command(tmp_path / "run", f"data.train=folder:{tmp_path / 'pictures'}"))
    assert "100 records in a row are bad" in message


def test_too_many_bad_pictures(tmp_path, capsys):
    """One good picture among eleven bad ones: a run that trains on hardly anything stops."""
    write(tmp_path / "pictures/a", bad_pictures())
    write(tmp_path / "pictures/b", {"plain.jpg": good_pictures()["plain.jpg"], **bad_pictures()})
    message = fails(capsys, train_command(tmp_path / "run", f"data.train=folder:{tmp_path / 'pictures'}", "steps=20"))
    assert "more than max_bad_fraction=0.05 allows" in message
    assert str(tmp_path / "run/bad_samples.jsonl") in message


@pytest.mark.parametrize(
    ("name", "message"),
    [("empty", "no picture in {}"), ("absent", "there is no folder {}"), ("notes", "extensions ['txt']")],
)
def test_folders_without_pictures(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "notes", {"readme.txt": b"hello"})
    found = fails(capsys, train_command(tmp_path / "run", f"data.train=folder:{tmp_path / name}"))
    assert message.format(tmp_path / name) in found
    assert not (tmp_path / "run").exists()


def test_one_class_trains_and_is_trivial_to_classify(tmp_path):
    write(tmp_path / "pictures/cats", good_pictures())
    evaluation = classification(tmp_path / "pictures", "knn", "linear", "fewshot")
    source = f"data.train=folder:{tmp_path / 'pictures'}"
    assert main(train_command(tmp_path / "run", source, "steps=1", evaluation)) == 0
    last = read_records(tmp_path / "run")[-1]
    shares = {name: value for name, value in last.items() if name.startswith("eval/") and name.endswith("top1")}
    assert len(shares) >= 3
    assert set(shares.values()) == {1.0}


def test_evaluation_without_labels(tmp_path, capsys):
    write(tmp_path / "pictures", good_pictures())
    overrides = f"data.train=folder:{tmp_path / 'pictures'}", classification(tmp_path / "pictures", "knn")
    assert "classification needs labels" in fails(capsys, train_command(tmp_path / "run", *overrides))


# ------------------------------------------------------------------------------------------------- configs and losses


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=12", "batch size 12 is not divisible by the 8 data shards of the mesh; use 8 or 16"),
        (
            "method.temprature=1",
            "config.method.temprature: SimCLR has no option 'temprature'; did you mean 'temperature'",
        ),
        ("optim.lr=fast", "config.optim.lr should be float, not 'fast' (str)"),
        ("steps", "override 'steps' should look like"),
        ("mesh.fsdp=3", "does not fill 8 device(s)"),
        ("data.train=folders:x", "did you mean 'folder'?"),
        ("optim.freeze=('stem_conv2',)", "freeze rule 'stem_conv2' matches no parameter"),
        ("data.views.views.x1.flip=7", "View.flip is a probability"),
    ],
)
def test_configs_that_cannot_work(tmp_path, capsys, override, message):
    assert message in fails(capsys, train_command(tmp_path / "run", override))


@pytest.mark.parametrize(
    ("config", "message"),
    [("simcrl.py", "did you mean"), ("simclr.py:cifar", "has no variant 'cifar'; did you mean 'cifar10'?")],
)
def test_configs_that_do_not_exist(tmp_path, capsys, config, message):
    command = ["train", "--config", f"{CONFIGS}/{config}", "--workdir", str(tmp_path / "run")]
    assert message in fails(capsys, command)


def test_a_loss_that_is_not_a_number(tmp_path, capsys):
    message = fails(capsys, train_command(tmp_path, "optim.lr=1e30", "optim.warmup=0"))
    assert "DivergedError: step 2: 10 steps in a row were refused" in message
    assert "loss is nan" in message or "loss is inf" in message
    assert "optim.lr" in message
    assert CheckpointStore(tmp_path).steps() == []


# ----------------------------------------------------------------- checkpoints (damaged ones are in test_checkpoint.py)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of three steps with checkpoints of the last two."""
    workdir = tmp_path_factory.mktemp("trained")
    train(simclr("steps=3", "batch_size=8", "checkpoint.every=2"), workdir, devices=jax.devices()[:1])
    return workdir


@pytest.fixture
def workdir(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def embed(workdir: Path) -> list[str]:
    return ["embed", "--workdir", str(workdir), "--source", "digits:test", "--out", f"{workdir}.npz"]


def test_a_disk_that_is_full(workdir):
    """A limit on the size of files stands in for the disk: writing a checkpoint fails, the small files still fit."""
    small = ["bash", "-c", 'ulimit -f 16; exec "$@"', "bash"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {
        "PYTHONPATH": str(CONFIGS.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [*small, sys.executable, "-m", "ssljax.cli", *train_command(workdir, "steps=5", "checkpoint.every=1")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1, result.stderr
    _, message = result.stderr.rsplit("ssljax: ", 1)
    assert message.startswith("CheckpointError: saving")
    assert "Complete checkpoints: 2, 3. Is the disk full" in message
    assert "Traceback" not in result.stderr
    assert CheckpointStore(workdir).steps() == [2, 3]
    assert [ssljax.load(workdir, step).step for step in (2, 3)] == [2, 3]
    assert main(train_command(workdir, "steps=5", "checkpoint.every=1")) == 0  # there is room again
    assert CheckpointStore(workdir).steps()[-1] == 5


def test_a_workdir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    message = fails(capsys, train_command(tmp_path / "file/run"))
    assert "CheckpointError: cannot open" in message
    assert "Not a directory" in message
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_workdir_without_checkpoints(tmp_path, capsys):
    for command in (["eval", "--workdir", str(tmp_path / "typo")], embed(tmp_path / "typo")):
        assert "no checkpoint in" in fails(capsys, command)
    assert not (tmp_path / "typo").exists()


def test_a_step_without_checkpoint(workdir, capsys):
    message = fails(capsys, [*embed(workdir), "--step", "7"])
    assert "no checkpoint of step 7" in message
    assert "there are 2, 3" in message
