"""What a user types: `ssljax train`, `embed`, `eval`, ... on a folder of own pictures, and `ssljax.load` after it."""

import json
import shutil
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet
import pytest
from small import quick_compilation, simclr_config, train_command  # noqa: F401

import ssljax
from ssljax.cli import main
from ssljax.config import ConfigError, experiment
from ssljax.data import ArrayRecord, Folder
from ssljax.methods import SimCLR
from ssljax.metrics import read_records
from ssljax.train import train

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Pictures:
    """The same twelve pictures in a folder with two classes, in one without, as arrays and as bytes."""

    labelled: Path
    flat: Path
    arrays: tuple[np.ndarray, ...]
    files: tuple[bytes, ...]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Pictures:
    """Mixed sizes; every other one a JPEG, the others PNG, whose pixels are known exactly."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    labelled, flat = root / "labelled", root / "flat"
    flat.mkdir(parents=True)
    arrays, files = [], []
    for i in range(12):
        blobs, size = rng.integers(0, 256, (4, 4, 3), np.uint8), rng.integers(20, 60, 2).tolist()
        image = cv2.resize(blobs, size, interpolation=cv2.INTER_CUBIC)
        ending = (".jpg", ".png")[i % 2]
        data = cv2.imencode(ending, image)[1]
        name = f"{i:02}{ending}"
        for path in (labelled / ("cats", "dogs")[i // 6] / name, flat / name):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.tobytes())
        arrays.append(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB))
        files.append(data.tobytes())
    return Pictures(labelled, flat, tuple(arrays), tuple(files))


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory) -> Path:
    """Two seeds, with an evaluation; the workdir is given as users give it, relative to the current folder."""
    folder = tmp_path_factory.mktemp("runs")
    source = f"folder:{pictures.labelled}"
    evaluation = {"type": "Classification", "train": source, "test": source, "protocols": ("knn",), "k": (3,)}
    overrides = f"data.train={source}", f"evals.pets={evaluation}"
    with chdir(folder):
        assert main(train_command(Path("runs/pets"), *overrides, options=("--seeds", "2"))) == 0
    return folder / "runs/pets"


@pytest.fixture(scope="module")
def workdir(runs) -> Path:
    return runs / "seed_0"


def test_seeds_must_be_positive(tmp_path, capsys):
    assert main(train_command(tmp_path, options=("--seeds", "0"))) == 1
    assert "--seeds is the number of seeds to train, at least 1; got 0" in capsys.readouterr().err


def test_train_with_two_seeds(runs, workdir, pictures, capsys):
    first, second = (read_records(runs / f"seed_{i}") for i in range(2))
    losses = [[r["loss"] for r in records if "loss" in r] for records in (first, second)]
    assert len(losses[0]) == len(losses[1]) == 3
    assert np.isfinite(losses).all()
    assert losses[0] != losses[1]
    assert [r["step"] for r in first if "eval/pets/knn3_top1" in r] == [0, 3]
    assert [r["step"] for r in first if "pixels/pets/knn3_top1" in r] == [0]
    config = json.loads((workdir / "config.json").read_text())
    assert config["data"]["train"]["path"] == str(pictures.labelled)
    assert [json.loads((runs / f"seed_{i}/config.json").read_text())["seed"] for i in range(2)] == [0, 1]


def test_the_same_command_with_more_steps_resumes(runs, pictures, tmp_path, capsys):
    workdir = tmp_path / "resumed"
    shutil.copytree(runs / "seed_1", workdir)
    before = [r for r in read_records(workdir) if "loss" in r]
    more = f"data.train=folder:{pictures.labelled}", "--no-report", "seed=1", "steps=5"  # options and overrides mix
    assert main(train_command(workdir, *more)) == 0
    after = [r for r in read_records(workdir) if "loss" in r]
    assert after[:3] == before
    assert [r["step"] for r in after] == [1, 2, 3, 4, 5]
    out = capsys.readouterr().out
    assert "launch: single process" in out
    assert "resuming at step 3 of 5" in out


def test_embed(workdir, pictures, tmp_path, capsys):
    npz, parquet = tmp_path / "features.npz", tmp_path / "new/features.parquet"
    for out in (npz, parquet):
        command = ["embed", "--workdir", str(workdir), "--source", f"folder:{pictures.labelled}", "--out", str(out)]
        assert main([*command, "--features", "image,patches"]) == 0
    with np.load(npz) as found:
        assert found["image"].shape == (12, 16)
        assert found["patches"].shape == (12, 4, 4, 16)
        np.testing.assert_allclose(found["patches"].mean((1, 2)), found["image"], rtol=1e-5)
        np.testing.assert_array_equal(found["index"], np.arange(12))
        np.testing.assert_array_equal(found["label"], [0] * 6 + [1] * 6)
        table = pyarrow.parquet.read_table(parquet).to_pydict()
        for name in found.files:
            np.testing.assert_array_equal(np.array(table[name], np.float32), found[name].reshape(np.shape(table[name])))
    assert "image (12, 16)" in capsys.readouterr().out


def test_load_gives_what_embed_gives(workdir, pictures, tmp_path):
    """From arrays, from files' bytes, from a mix, and from one array of equal sizes."""
    out = tmp_path / "features.npz"
    assert main(["embed", "--workdir", str(workdir), "--source", f"folder:{pictures.flat}", "--out", str(out)]) == 0
    with np.load(out) as found:
        assert set(found.files) == {"image", "index"}
        expected = found["image"]
    assert np.ptp(expected, axis=0).max() > 1e-3  # the pictures are told apart
    run = ssljax.load(workdir)
    assert run.step == 3
    same = lambda images, rows: np.testing.assert_allclose(run.features(images), expected[rows], rtol=1e-5, atol=1e-6)  # noqa: E731
    same(pictures.files, slice(None))
    same(pictures.arrays[1::2], slice(1, None, 2))  # PNG
    same([*pictures.arrays[1::2], *pictures.files[::2]], [*range(1, 12, 2), *range(0, 12, 2)])
    same(np.stack([pictures.arrays[1], pictures.arrays[1]]), [1, 1])
    assert run.features(pictures.files, "patches").shape == (12, 4, 4, 16)
    with pytest.raises(ValueError, match="no images"):
        run.features([])
    with pytest.raises(ValueError, match=r"no features \['text'\]"):
        run.features(pictures.files, "text")


def test_eval_repeats_the_figures_of_the_run(workdir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["eval", "--workdir", str(workdir)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "pets/knn3_top1" in line]
    values = [r["eval/pets/knn3_top1"] for r in read_records(workdir) if "eval/pets/knn3_top1" in r]
    first, last = (f"{100 * value:.1f}" for value in values)
    assert [cell.strip() for cell in row.strip("│| ").replace("|", "│").split("│")] == ["pets/knn3_top1", last, first]


def test_eval_of_a_run_without_evaluations(own, capsys):
    assert main(["eval", "--workdir", str(own)]) == 1
    assert "Own" in capsys.readouterr().err  # a method of one's own needs `types`, which the command line does not have


def test_methods(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["methods", "--configs", str(ROOT / "configs")]) == 0
    out = capsys.readouterr().out
    for text in ("SimCLR", "Chen et al., ICML 2020", "cifar10_mini", "CLIP", "scenes", "paper"):
        assert text in out


def test_inspect(pictures, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["data", "inspect", f"folder:{pictures.labelled}", "--out", str(sheet)]) == 0
    out = capsys.readouterr().out
    for text in ("12", "cats", "dogs", "0 unreadable"):
        assert text in out
    assert min(cv2.imread(str(sheet)).shape[:2]) > 100


def test_pack(pictures, tmp_path):
    assert main(["data", "pack", f"folder:{pictures.labelled}", str(tmp_path / "packed")]) == 0
    packed, folder = ArrayRecord(str(tmp_path / "packed")), Folder(str(pictures.labelled))
    assert packed.classes == ("cats", "dogs")
    assert [packed[i] for i in range(len(packed))] == [folder[i] for i in range(12)]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["pretrain"], "invalid choice: 'pretrain'"),
        ([], "required: verb"),
        (["train", "--workdir", "x"], "required: --config"),
        (["methods", "--everything"], "unrecognized arguments: --everything"),
        (["methods", "seed=1"], "unrecognized arguments: seed=1"),
        (["train", "--config", "x", "--workdir", "x", "seed=1", "--fast", "seed=3"], "unrecognized arguments: --fast"),
    ],
)
def test_what_the_parser_refuses(command, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- a method of one's own


@dataclass(frozen=True)
class Own(SimCLR):
    """Somebody's own method, which ssljax knows nothing of."""

    sharpness: float = 2.0


@pytest.fixture(scope="module")
def own(pictures, tmp_path_factory) -> Path:
    """A run of `Own` on pictures without labels, which are deleted afterwards."""
    folder, workdir = tmp_path_factory.mktemp("own") / "pictures", tmp_path_factory.mktemp("own_run")
    shutil.copytree(pictures.flat, folder)
    config = simclr_config("batch_size=8", "steps=2", f"data.train=folder:{folder}").to_dict()
    config["method"] |= {"type": Own, "sharpness": 3.0}
    train(experiment(config), workdir)
    shutil.rmtree(folder)
    return workdir


def test_load_needs_no_data_but_the_class(own, pictures):
    run = ssljax.load(own, types={"Own": Own})
    assert isinstance(run.experiment.method, Own)
    assert run.experiment.method.sharpness == 3.0
    assert run.features(pictures.files).shape == (12, 16)
    with pytest.raises(ConfigError, match="type='Own' is not known"):
        ssljax.load(own)
