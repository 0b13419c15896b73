"""Checkpoints prove themselves: whatever is changed in one is found, and a run goes on from the newest good one."""

import gc
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small import quick_compilation, simclr  # noqa: F401

import ssljax
from ssljax.checkpoint import CheckpointError, Checkpoints, CheckpointStore, DamagedCheckpoint
from ssljax.cli import main
from ssljax.digest import MANIFEST, array_digest, digest_tree, json_digest, write_manifest
from ssljax.mesh import abstract_like
from ssljax.metrics import MetricLog, read_records
from ssljax.state import TrainState
from ssljax.train import train

ROOT = Path(__file__).parent.parent

# -------------------------------------------------------------------------------------------------------------- digests

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int32", "uint32", "int16", "int8", "uint8")


def reference(x: np.ndarray) -> list[int]:
    """The digest by its definition, in Python integers."""
    first = second = 0
    for i, word in enumerate(x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}").tolist()):
        h = (word + i * 0x9E3779B9) % 2**32
        h = (h ^ h >> 16) * 0x7FEB352D % 2**32
        h = (h ^ h >> 15) * 0x846CA68B % 2**32
        h ^= h >> 16
        again = h * 0x9E3779B1 % 2**32
        first, second = first + h, second + (again ^ again >> 15)
    return [first % 2**32, second % 2**32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_every_flipped_bit_changes_the_digest(dtype, shape):
    dtype, rng = jnp.dtype(dtype), np.random.default_rng(0)
    data = np.frombuffer(rng.bytes(dtype.itemsize * int(np.prod(shape))), np.uint8)
    flips = np.packbits(np.eye(8 * data.size, dtype=np.uint8), axis=1)  # one bit in each row
    variants = np.concatenate([data[None], data ^ flips]).view(dtype).reshape(-1, *shape)
    digests = np.asarray(jax.jit(jax.vmap(array_digest))(variants))
    assert digests[0].tolist() == reference(variants[0])
    assert (digests[1:, 0] != digests[0, 0]).all()  # by the first sum alone: that is the guarantee
    assert len(np.unique(digests, axis=0)) == len(digests)


def test_booleans_and_random_keys_have_digests():
    for i in range(4):
        flipped = jnp.zeros(4, bool).at[i].set(True)
        assert digest_tree([flipped]) != digest_tree([jnp.zeros(4, bool)])
    assert digest_tree([jax.random.key(0)]) != digest_tree([jax.random.key(1)])
    assert digest_tree({"empty": jnp.zeros((0, 4))}) == {"empty": ("0" * 16,)}


def test_the_digest_sees_order_and_signs():
    """What plain or weighted sums of the words do not see."""
    x = jnp.arange(1.0, 9.0)
    variants = [x, x[::-1], x.at[jnp.array([1, 6])].multiply(-1), x.at[2].set(x[5]).at[5].set(x[2]), -x, x * 0 + 4.5]
    assert len({digest_tree([variant])["0"] for variant in variants}) == len(variants)


def test_the_digest_does_not_depend_on_where_the_parts_lie():
    x = jax.random.normal(jax.random.key(0), (8, 16, 24))
    expected = {"x": digest_tree([x])["0"], "y": digest_tree([x[0]])["0"]}
    for count in (1, 2, 4, 8):
        shape = (count // 2, 2) if count > 1 else (1, 1)
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count])
        for spec in (P(), P("a"), P(None, ("b", "a")), P("b", None, "a"), P(("a", "b"))):
            with jax.set_mesh(mesh):
                tree = {
                    "x": jax.device_put(x, NamedSharding(mesh, spec)),
                    "y": jax.device_put(x[0], NamedSharding(mesh, P())),
                }
                assert digest_tree(tree) == expected


def diverged() -> jax.Array:
    """An array on two devices whose copies are not the same."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    copies = [jax.device_put(jnp.arange(6.0) + i, device) for i, device in enumerate(mesh.devices)]
    return jax.make_array_from_single_device_arrays((6,), NamedSharding(mesh, P()), copies)


def test_copies_that_differ_have_digests_of_their_own():
    assert digest_tree([diverged()])["0"] == (
        *digest_tree([jnp.arange(6.0)])["0"],
        *digest_tree([jnp.arange(1.0, 7)])["0"],
    )


def test_the_digest_of_local_parts():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (16, 6))
    parts = jax.jit(jax.shard_map(lambda x: array_digest(x)[None], mesh=mesh, in_specs=P("d"), out_specs=P("d")))(x)
    assert parts.tolist() == [reference(np.asarray(x[2 * i : 2 * i + 2])) for i in range(8)]


def test_the_digest_stores_no_second_copy():
    compiled = jax.jit(array_digest).lower(jax.ShapeDtypeStruct((2048, 4096), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**16


def test_the_digest_of_json():
    value = {"a": [1, 2.5, None], "b": {"c": "x"}}
    assert json_digest({"b": {"c": "x"}, "a": (1, 2.5, None)}) == json_digest(value)
    assert json_digest(value | {"a": [1, 2.5, 0]}) != json_digest(value)


# ---------------------------------------------------------------------------------------------------------- the store


def state_of(step: int) -> TrainState:
    """A state with every kind of array that one can have."""
    rng = np.random.default_rng(step)
    params = {"layer": {"kernel": jnp.asarray(rng.standard_normal((64, 96), np.float32)), "bias": jnp.arange(96.0)}}
    method = {
        "queue": jnp.asarray(rng.standard_normal((32, 16)), jnp.bfloat16),
        "seen": jnp.asarray(rng.integers(0, 2**30, 10), jnp.int32),
        "mask": jnp.arange(7) % 2 == 0,
        "bytes": jnp.arange(9, dtype=jnp.uint8),
    }
    return TrainState(
        jnp.int32(step), params, (params, {"count": jnp.int32(step)}), method, None, {"count": jnp.float32(step)}
    )


def like(devices: int = 1) -> TrainState:
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    place = lambda x: NamedSharding(mesh, P("d") if x.ndim > 1 else P())  # noqa: E731
    return abstract_like(state_of(0), jax.tree.map(place, state_of(0)))


PROGRESS, METADATA = {"position": 48, "skipped": [3, 7]}, {"config": {"steps": 3, "lr": 1e-3, "name": "Grüße"}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with checkpoints of steps 1, 2 and 3."""
    workdir = tmp_path_factory.mktemp("saved")
    with CheckpointStore(workdir) as store:
        assert store.resume(like(), print) is None
        for step in (1, 2, 3):
            store.save(state_of(step), step, PROGRESS, METADATA)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}


def newest_good(workdir: Path) -> tuple[int, list[str]]:
    """The step that a run would continue from, and what it says of newer ones."""
    reports, store = [], CheckpointStore(workdir)
    found = store.newest_good(partial(store.restore, like()), reports.append)
    jax.tree.map(np.testing.assert_array_equal, found.state, state_of(found.step))
    return found.step, reports


@pytest.mark.parametrize("devices", [1, 4])
def test_what_was_saved_comes_back(saved, devices):
    store = CheckpointStore(saved)
    assert store.steps() == [1, 2, 3]
    for step in (None, 2):
        found = store.restore(like(devices), step)
        assert (found.step, found.progress, found.metadata) == (step or 3, PROGRESS, METADATA)
        jax.tree.map(np.testing.assert_array_equal, found.state, state_of(found.step))
        assert len(found.state.params["layer"]["kernel"].addressable_shards) == devices


def test_any_flipped_bit_is_found(workdir):
    rng, folder = random.Random(0), workdir / "checkpoints/3"
    files = [file for file in files_of(folder) if file.stat().st_size]
    assert {MANIFEST, "_CHECKPOINT_METADATA"} <= {file.name for file in files}
    for i in range(40):
        file = files[i % len(files)]
        bit = rng.randrange(8 * file.stat().st_size)
        flip(file, bit)
        step, reports = newest_good(workdir)
        assert (step, len(reports)) == (2, 1), (file, bit)
        assert f"{folder} is damaged: " in reports[0]
        flip(file, bit)
    assert newest_good(workdir) == (3, [])


@pytest.mark.parametrize("damage", ["missing", "cut", "longer"])
def test_any_damaged_file_is_named(workdir, damage):
    for file in files_of(workdir / "checkpoints/3"):
        whole, name = file.read_bytes(), file.relative_to(workdir / "checkpoints/3").as_posix()
        if (damage == "missing" and name == MANIFEST) or (damage == "cut" and not whole):
            continue
        file.unlink()
        if damage != "missing":
            file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole + b" ")
        step, (report,) = newest_good(workdir)
        assert step == 2
        assert name in report
        file.write_bytes(whole)


@pytest.mark.parametrize(
    "files",
    [
        {"../../secret": [4, "x"]},
        {"/etc/passwd": [4, "x"]},
        {"state//x": [4, "x"]},
        {"x": ["4", "x"]},
        {"x": [4, None]},
        {"x": [4]},
        {"x": 4},
        ["x"],
        "x",
    ],
)
def test_forged_manifests(workdir, files):
    """Whoever writes a checkpoint can write matching digests; what they name is still only the checkpoint's files."""
    (workdir / "secret").write_text("1234")
    manifest = workdir / "checkpoints/3" / MANIFEST
    manifest.write_text(json.dumps({"files": files, "digest": json_digest(files)}))
    step, (report,) = newest_good(workdir)
    assert step == 2
    assert f"{MANIFEST} is damaged: " in report


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" " * 2**22 + "{}", r"has 4,194,306 bytes, over the limit"),
        ("[" * 10**6, r"cannot be read"),
        ('{"custom_metadata": {"record": {"progress": 1, "metadata": {}, "arrays": {}}, "digest": ""}}', "not a dict"),
        ('{"custom_metadata": {"record": {"progress": {}, "metadata": {}, "arrays": {"x": 1}}, "digest": ""}}', "kind"),
        ('{"custom_metadata": {"record": {"attributes": {}}, "digest": ""}}', "unexpected keyword"),
        ('{"custom_metadata": []}', "cannot be read"),
    ],
)
def test_forged_metadata(workdir, text, message):
    (workdir / "checkpoints/3/_CHECKPOINT_METADATA").write_text(text)
    write_manifest(epath.Path(workdir / "checkpoints/3"))
    step, (report,) = newest_good(workdir)
    assert step == 2
    assert re.search(message, report)


def test_a_pipe_in_a_checkpoint_blocks_nobody(workdir):
    file = next(file for file in files_of(workdir / "checkpoints/3") if "_METADATA" in file.name)
    manifest = workdir / "checkpoints/3" / MANIFEST
    files = json.loads(manifest.read_text())["files"]
    files[file.relative_to(manifest.parent).as_posix()][0] = 0
    manifest.write_text(json.dumps({"files": files, "digest": json_digest(files)}))
    file.unlink()
    os.mkfifo(file)
    step, (report,) = newest_good(workdir)
    assert step == 2
    assert "is not a plain file" in report


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # readers that Orbax leaves behind
def test_killed_between_commit_and_manifest(workdir, capsys, monkeypatch):
    """The checkpoint counts; what it holds is proved by the digests that were committed with it."""
    monkeypatch.setenv("COLUMNS", "250")
    folder = workdir / "checkpoints/3"
    (folder / MANIFEST).unlink()
    assert newest_good(workdir) == (3, [])
    assert main(["check", str(workdir)]) == 1  # this workdir has no config.json
    assert "no digests of its files" in capsys.readouterr().out
    metadata = folder / "_CHECKPOINT_METADATA"
    sound = metadata.read_text()
    for before, after in (("skipped", "skippet"), ("0.001", "0.003"), ("{", "[")):
        metadata.write_text(sound.replace(before, after, 1))
        step, (report,) = newest_good(workdir)
        assert step == 2
        assert "its metadata" in report
    metadata.write_text(sound)
    largest = max(files_of(folder), key=lambda file: file.stat().st_size)
    flip(largest, 8 * largest.stat().st_size // 2)
    assert newest_good(workdir)[0] == 2


def test_arrays_that_were_wrong_before_their_files_had_digests(workdir):
    """All files agree with their digests, but they hold the arrays of another step."""
    folder = workdir / "checkpoints/3"
    shutil.rmtree(folder / "state")
    shutil.copytree(workdir / "checkpoints/2/state", folder / "state")
    (folder / MANIFEST).unlink()
    write_manifest(CheckpointStore(workdir).folder / "3")
    step, (report,) = newest_good(workdir)
    assert step == 2
    assert "the array params/layer/kernel is not what was saved" in report
    assert CheckpointStore(workdir).verify(3).progress == PROGRESS


def test_checkpoints_in_each_others_place(workdir):
    folder = workdir / "checkpoints"
    (folder / "2").rename(folder / "4")
    assert newest_good(workdir)[0] == 3


def test_another_config_is_not_damage(workdir):
    other = like()
    other.params["layer"]["kernel"] = jax.ShapeDtypeStruct((64, 97), jnp.float32)
    other.method["seen"] = jax.ShapeDtypeStruct((10,), jnp.float32)
    with pytest.raises(CheckpointError, match=r"another config.*\n  params/layer/kernel: float32\[64,96\] in") as error:
        CheckpointStore(workdir).resume(other, pytest.fail)
    assert not isinstance(error.value, DamagedCheckpoint)
    assert "method/seen: int32[10] in the checkpoint, float32[10] in the config" in str(error.value)
    assert CheckpointStore(workdir).steps() == [1, 2, 3]


def test_no_good_checkpoint(workdir):
    for step in (1, 2, 3):
        (workdir / f"checkpoints/{step}/state/_METADATA").unlink()
    reports = []
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is good. Nothing was changed"):
        CheckpointStore(workdir).resume(like(), reports.append)
    assert len(reports) == 3
    assert CheckpointStore(workdir).steps() == [1, 2, 3]


def test_resuming_makes_room(workdir):
    """Damaged checkpoints go aside, again and again; half-written ones go; readers leave both alone."""
    half = workdir / "checkpoints/4.orbax-checkpoint-tmp/state"
    half.mkdir(parents=True)
    (half / "d").write_bytes(b"half")
    for again in range(2):
        flip(workdir / "checkpoints/3/state/_METADATA", 100)
        assert newest_good(workdir)[0] == 2
        assert half.exists() == (again == 0)
        with CheckpointStore(workdir) as store:
            reports = []
            assert store.resume(like(), reports.append).step == 2
            assert len(reports) == 2
            aside = store.damaged_folder / ("3.1" if again else "3")
            assert reports[1] == f"moved {store.folder / '3'} to {aside}"
            assert files_of(Path(aside))
            store.save(state_of(3), 3, PROGRESS, METADATA)
        assert newest_good(workdir) == (3, [])
    assert [path.name for path in sorted((workdir / "checkpoints").iterdir())] == ["1", "2", "3"]


def test_copies_that_differ_are_saved_as_the_first(tmp_path):
    x = diverged()
    with CheckpointStore(tmp_path) as store:
        store.resume({"x": x}, pytest.fail)
        with pytest.warns(UserWarning, match=r"step 1: x should be the same on several devices, and is not"):
            store.save({"x": x}, 1, {}, {})
    found = store.restore(abstract_like({"x": x}, {"x": x.sharding})).state["x"]
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(6.0))


# Saves until it is killed.
WRITER = """
import sys

import jax.numpy as jnp

from ssljax.checkpoint import CheckpointStore

with CheckpointStore(sys.argv[1]) as store:
    store.resume({"x": jnp.arange(3_000_000)}, print)
    for step in range(1000):
        store.save({"x": jnp.arange(3_000_000) * step}, step, {}, {})
"""


def test_killed_while_it_saves(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], env=environment(), stderr=subprocess.DEVNULL)
    folder, deadline = tmp_path / "checkpoints", time.monotonic() + 120
    while not ((folder / "2").exists() and list(folder.glob("*.orbax-checkpoint-tmp"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.kill()
    process.wait()
    shapes = abstract_like({"x": jnp.arange(3_000_000)}, {"x": jax.sharding.SingleDeviceSharding(jax.devices()[0])})
    with CheckpointStore(tmp_path) as store:
        newest = store.steps()[-1]
        unfinished = store.unfinished()
        found = store.resume(shapes, pytest.fail)
        assert found.step == newest >= 2
        np.testing.assert_array_equal(found.state["x"], np.arange(3_000_000) * newest)
        assert unfinished
        assert not store.unfinished()
        store.save(found.state, newest + 1, {}, {})
    assert store.steps()[-1] == newest + 1


def test_what_is_kept(tmp_path):
    with CheckpointStore(tmp_path, Checkpoints(keep_last=2, keep_every=3)) as store:
        for step in range(1, 9):
            store.save({"x": jnp.arange(3)}, step, {}, {})
    assert store.steps() == [3, 6, 7, 8]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what Orbax no longer awaits
def test_a_disk_that_is_read_only(saved):
    """Reading works and leaves nothing behind; training says what it cannot do."""
    with tempfile.TemporaryDirectory() as folder:  # one that others may enter
        workdir = Path(folder) / "run"
        shutil.copytree(saved, workdir)
        flip(workdir / "checkpoints/3/state/_METADATA", 100)
        for path in [Path(folder), *Path(folder).rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        user = os.geteuid()
        if user == 0:  # whom no permission stops
            os.seteuid(65534)
        try:
            assert newest_good(workdir)[0] == 2
            with pytest.raises(CheckpointError, match=r"cannot move .*checkpoints/3 to .*Permission denied"):
                CheckpointStore(workdir).resume(like(), print)
            with (
                pytest.raises(CheckpointError, match="Is the disk full or read-only"),
                CheckpointStore(workdir) as store,
            ):
                store.save(state_of(4), 4, PROGRESS, METADATA)
            gc.collect()
            with pytest.raises(CheckpointError, match=r"cannot open .* for checkpoints: .*Permission denied"):
                CheckpointStore(Path(folder) / "new").resume(like(), print)
        finally:
            os.seteuid(user)
            for path in [Path(folder), *Path(folder).rglob("*")]:
                path.chmod(0o755)
        assert CheckpointStore(workdir).steps() == [1, 2, 3]


# What each of two processes runs: resume, say how that went, and save.
PROCESS = """
import sys

import jax
import numpy as np

from ssljax.checkpoint import CheckpointStore
from ssljax.distributed import initialize

workdir, save, _, coordinator, _, processes, _, process = sys.argv[1:]
initialize(coordinator, int(processes), int(process))
sys.path.insert(0, "tests")
from test_checkpoint import METADATA, PROGRESS, like, state_of

shapes = like(jax.device_count())
with jax.set_mesh(jax.tree.leaves(shapes)[0].sharding.mesh), CheckpointStore(workdir.format(process)) as store:
    found = store.resume(shapes, lambda text: print("report:", text))
    for x, y in zip(jax.tree.leaves(found.state), jax.tree.leaves(state_of(found.step)), strict=True):
        for part in x.addressable_shards:
            np.testing.assert_array_equal(part.data, np.asarray(y)[part.index])
    print("good:", found.step)
    if save == "save":
        store.save(found.state, 9, PROGRESS, METADATA)
"""


def two_processes(workdir: str, *options: str) -> list[str]:
    command = ["bash", "launch/local.sh", "2", sys.executable, "-c", PROCESS, workdir, *options]
    found = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout.splitlines()


def test_two_processes_take_one_decision(saved, tmp_path):
    """Each has a disk of its own here, and only the second one's is bad."""
    for process in (0, 1):
        shutil.copytree(saved, tmp_path / str(process))
    (tmp_path / "1/checkpoints/3/state/manifest.ocdbt").unlink()
    lines = two_processes(f"{tmp_path}/{{}}", "leave")
    for process in (0, 1):
        assert f"[{process}] good: 2" in lines
        (damage,) = (line for line in lines if line.startswith(f"[{process}] report:") and "is damaged" in line)
        assert "process 1: checkpoint" in damage
        assert "manifest.ocdbt is missing" in damage


def test_two_processes_save_what_one_restores(workdir):
    assert "[1] good: 3" in two_processes(str(workdir), "save")
    found = CheckpointStore(workdir).restore(like(), 9)
    jax.tree.map(np.testing.assert_array_equal, found.state, state_of(3))
    assert CheckpointStore(workdir).steps() == [2, 3, 9]


# ------------------------------------------------------------------------------------------------------------- the run


def test_a_run_goes_on_from_the_newest_good_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    experiment, devices = simclr("steps=4", "batch_size=8", "checkpoint.every=1"), jax.devices()[:1]
    unbroken = train(experiment, tmp_path, devices=devices).state
    records = [r["loss"] for r in read_records(tmp_path) if "loss" in r]
    assert main(["check", str(tmp_path), "--arrays"]) == 0
    assert capsys.readouterr().out.count("│ good") == 5  # three checkpoints, config.json and metrics.jsonl
    for step, bit in ((4, 77), (3, 7777)):
        flip(max(files_of(tmp_path / f"checkpoints/{step}"), key=lambda file: file.stat().st_size), bit)

    assert main(["check", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.out.count("is damaged:") == 2
    assert "2 of these are damaged" in output.err
    with pytest.warns(UserWarning, match="is damaged") as warnings:
        assert ssljax.load(tmp_path).step == 2
    assert len(warnings) == 2
    assert main(["embed", "--workdir", str(tmp_path), "--step", "4", "--source", "digits:test", "--out", "x.npz"]) == 1
    assert "checkpoints/4 is damaged" in capsys.readouterr().err

    resumed = train(experiment, tmp_path, devices=devices).state
    jax.tree.map(np.testing.assert_array_equal, resumed, unbroken)
    assert [r["loss"] for r in read_records(tmp_path) if "loss" in r] == records
    output = capsys.readouterr().out
    assert "resuming at step 2 of 4" in output
    assert output.count("is damaged:") == output.count("moved") == 2
    assert main(["check", str(tmp_path)]) == 0
    assert "damaged, set aside" in capsys.readouterr().out


def test_records_survive_a_disk_that_is_full_when_a_run_resumes(tmp_path):
    lines = [json.dumps({"step": step, "loss": 0.5, **{f"filler{i}": 0.5 for i in range(8)}}) for step in range(100)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            MetricLog(tmp_path, 100, 90, 91)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(read_records(tmp_path)) == 100
    MetricLog(tmp_path, 100, 90, 91).__exit__(None, None, None)
    assert len(read_records(tmp_path)) == 91


def test_check_names_the_line_that_cannot_be_read(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run/config.json").write_text("{}")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n{"step": 2,}\n{"step": 3}\n')
    assert main(["check", str(tmp_path / "run")]) == 1
    assert "metrics.jsonl, line 2: " in capsys.readouterr().out
    assert main(["check", str(tmp_path / "typo")]) == 1
    assert "there is no folder" in capsys.readouterr().err
