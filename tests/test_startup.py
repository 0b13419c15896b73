"""What makes a start quick: compiled programs that are kept, one tracing of shapes, no needless import."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import clip, quick_compilation, run_steps, simclr  # noqa: F401

from ssljax.checkpoint import CheckpointStore
from ssljax.compilation import compilation_cache
from ssljax.data.stream import _TrainSteps
from ssljax.train import Run, train

HIT = "/jax/compilation_cache/cache_hits"


@contextmanager
def counting() -> Iterator[list[str]]:
    """The programs that jax finds in the cache."""
    hits: list[str] = []

    def listen(event: str, **_: object) -> None:
        hits.extend([event] * (event == HIT))

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def compiled(x: jax.Array) -> jax.Array:
    """Compiles, as a new process would."""
    jax.clear_caches()
    return jax.jit(some_program)(x)


def some_program(x: jax.Array) -> jax.Array:
    for _ in range(4):
        x = jnp.linalg.cholesky(x @ x.T + jnp.eye(len(x)))
    return x


@pytest.fixture(autouse=True)
def everything_is_worth_keeping(monkeypatch):
    monkeypatch.setattr("ssljax.compilation._WORTH", 0.0)


def test_programs_are_kept_and_broken_ones_replaced(tmp_path):
    x = jnp.linspace(0, 1, 64).reshape(8, 8)
    expected, settings = compiled(x), dict(jax.config.values)
    with compilation_cache(tmp_path), counting() as hits:
        np.testing.assert_array_equal(compiled(x), expected)
        (entry,) = tmp_path.glob("jit_some_program-*-cache")
        assert not hits
        np.testing.assert_array_equal(compiled(x), expected)
        assert len(hits) == 1
    whole = entry.read_bytes()
    for broken in (whole[:1000], b"", whole[:-1], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]):
        entry.write_bytes(broken)
        warned = pytest.warns(
            UserWarning, match="Error reading persistent compilation cache entry for 'jit_some_program'"
        )
        with warned, compilation_cache(tmp_path):
            np.testing.assert_array_equal(compiled(x), expected)
        with compilation_cache(tmp_path), counting() as hits:
            np.testing.assert_array_equal(compiled(x), expected)
            assert len(hits) == 1
    assert dict(jax.config.values) == settings


def test_where_the_cache_cannot_be(tmp_path):
    x = jnp.ones((8, 8))
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="persistent compilation cache"), compilation_cache(tmp_path / "file"):
        compiled(x)
    # The user's own folder is taken instead.
    own = tmp_path / "own"
    jax.config.update("jax_compilation_cache_dir", str(own))
    try:
        with compilation_cache(tmp_path / "other"):
            compiled(x + 1)
        assert jax.config.values["jax_compilation_cache_dir"] == str(own)
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert not (tmp_path / "other").exists()


def test_training_from_the_cache_is_the_same(tmp_path):
    """Bit for bit, on several devices: compiled without a cache, into it, and taken from it."""
    e, found = simclr("mesh.fsdp=2", "mesh.min_size=64"), []
    for folder in (None, tmp_path, tmp_path):
        jax.clear_caches()
        with compilation_cache(folder) if folder else nullcontext(), counting() as hits:
            losses, state = run_steps(e, 4, 3)
        found.append((len(hits), losses, jax.device_get(state)))
    (_, *without), (cold, *into), (warm, *taken) = found
    assert list(tmp_path.glob("jit_step-*"))
    assert warm > cold
    jax.tree.map(np.testing.assert_array_equal, without, into)
    jax.tree.map(np.testing.assert_array_equal, without, taken)


def test_shapes_are_traced_once(monkeypatch):
    e, calls = simclr(), []
    init = type(e.method).init
    monkeypatch.setattr(type(e.method), "init", lambda *given: calls.append(1) or init(*given))
    run = Run(e, jax.devices()[:1])
    assert len(calls) == 1
    made = jax.eval_shape(run._init)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), run.state_shapes, made)


@pytest.mark.parametrize(
    "module",
    [
        *("matplotlib", "sklearn", "tensorflow", "jax.experimental.pallas", "tensorboard"),
        *("nibabel", "tifffile", "plyfile", "av", "soundfile", "soxr"),
    ],
)
def test_training_does_not_import(module, imported):
    assert module not in imported


@pytest.fixture(scope="module")
def imported() -> set[str]:
    code = "import sys, ssljax.train; from ssljax.data import Digits; Digits()[0]; print(*sys.modules)"
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    return set(out.stdout.split())


def test_help_imports_nothing_heavy():
    code = "import sys, ssljax.cli; ssljax.cli._parser(); print(*sys.modules)"
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert not {"jax", "numpy", "rich"} & set(out.stdout.split())


def test_batches_are_read_while_the_state_is_restored(tmp_path, monkeypatch):
    """Restoring waits here until the first batch of the continued run has been read; it would wait for ever."""
    train(simclr("steps=2"), tmp_path)
    read, resume = threading.Event(), CheckpointStore.resume
    fill = _TrainSteps.fill

    def watched(steps, step, rows, batch):
        fill(steps, step, rows, batch)
        if steps.start == 32 and step == 0:
            read.set()

    def slowly(store, *args):
        assert read.wait(60)
        return resume(store, *args)

    monkeypatch.setattr(_TrainSteps, "fill", watched)
    monkeypatch.setattr(CheckpointStore, "resume", slowly)
    assert int(train(simclr("steps=3"), tmp_path).state.step) == 3
