"""Steps that would harm the run: refused on the device, counted, gone back from, and explained."""

import json
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import quick_compilation, simclr  # noqa: F401

from ssljax.checkpoint import CheckpointStore
from ssljax.data import Digits
from ssljax.data.shuffle import shuffled
from ssljax.diagnose import first_not_finite
from ssljax.flight import DivergedError
from ssljax.guard import Guard, why_refused
from ssljax.mesh import abstract_like
from ssljax.metrics import read_records
from ssljax.models import ViT
from ssljax.run import Run
from ssljax.train import train

MARK = 99  # the label of records that spoil their batch
SIZE = 16  # of a batch


@dataclass(frozen=True)
class MarkedDigits:
    """The digits; records at the given positions of the first epoch carry the label MARK."""

    first: int = 0
    last: int = 0  # positions first..last-1 are marked

    def __post_init__(self):
        object.__setattr__(self, "digits", Digits("train", 8))
        marked = shuffled(np.arange(self.first, self.last), len(self.digits), 0).tolist()  # of seed 0
        object.__setattr__(self, "marked", frozenset(marked))

    classes = ()

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.digits[index]
        return {**record, "label": MARK} if index in self.marked else record


@dataclass(frozen=True)
class Spoiled:
    """A method whose loss a marked record multiplies by `factor` (its gradient too)."""

    inner: Any
    factor: float

    def init(self, key, batch):
        return self.inner.init(key, batch)

    def loss(self, params, state, batch, ctx):
        loss, (state, metrics) = self.inner.loss(params, state, batch, ctx)
        factor = jnp.where(jnp.any(batch["label"] == MARK), self.factor, 1.0)
        return loss * factor, (state, metrics)

    def update(self, params, state, ctx):
        return self.inner.update(params, state, ctx)

    def features(self, params, state, batch):
        return self.inner.features(params, state, batch)


def spoiled(factor: float, first: int, last: int, *overrides: str, **guard: Any):
    """Batches `first` to `last - 1` (counted from 0) of the run are spoiled."""
    e = simclr("optim.ema=0.9", *overrides)
    source = MarkedDigits(first * SIZE, last * SIZE)
    return replace(
        e,
        method=Spoiled(e.method, factor),
        data=replace(e.data, train=source),
        guard=replace(Guard(window=2, in_a_row=3), **guard),
    )


def take(run: Run, state, batches: list[int]):
    """The state after steps on these batches of the stream, and how many steps were refused."""
    step, refused = run.compile_step(), 0
    for number in batches:
        stream = run.batches(number * SIZE)
        state, _, notes = step(state, run.place(next(stream)))
        stream.close()
        refused += int(notes.tally[0] > 0)
    return state, refused


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# -------------------------------------------------------------------------------------------------------- on the device


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1000.0])
def test_a_refused_step_leaves_no_trace(factor, devices):
    """NaN, infinity, a gradient a thousand times too large: bit for bit the state of a run without the batch."""
    run = Run(spoiled(factor, 4, 5), jax.devices()[:devices])
    with jax.set_mesh(run.mesh):
        state, refused = take(run, run.init(), [0, 1, 2, 3, 4, 5, 6])
        without, none = take(run, run.init(), [0, 1, 2, 3, 5, 6])
    assert (refused, none) == (1, 0)
    assert int(state.step) == 6
    same(state, without)


def judged(guard: Guard, losses, norms) -> tuple[list[bool], dict[str, Any]]:
    seen, taken = guard.init(), []
    for loss, norm in zip(losses, norms, strict=True):
        ok, following, _ = guard.judge(seen, jnp.float32(loss), jnp.float32(norm), {})
        taken.append(bool(ok))
        seen = following if ok else seen
    return taken, {name: float(x) for name, x in seen.items()}


def test_moments_are_those_of_the_steps_taken():
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(5, 1, 50), rng.uniform(1, 2, 50)
    _, seen = judged(Guard(window=50), losses, norms)
    np.testing.assert_allclose(seen["loss_mean"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(seen["loss_variance"], losses.var(), rtol=1e-4)
    np.testing.assert_allclose(seen["gradient_mean"], norms.mean(), rtol=1e-5)


def test_limits_wait_for_a_full_window():
    assert judged(Guard(window=3), [1, 1, 1, 1], [1, 1, 500, 1])[0] == [True, True, True, True]
    assert judged(Guard(window=3), [1, 1, 1, 1, 1], [1, 1, 1, 500, 1])[0] == [True, True, True, False, True]


def test_loss_spikes_are_counted_in_standard_deviations():
    guard = Guard(window=4, spike_sigma=3.0, gradient_factor=None)
    quiet = [1.0, 2.0, 1.0, 2.0]  # mean 1.5, deviation 0.5
    assert judged(guard, [*quiet, 2.9], [1] * 5)[0][-1]
    assert not judged(guard, [*quiet, 3.1], [1] * 5)[0][-1]
    assert judged(guard, [*quiet, -50.0], [1] * 5)[0][-1]  # a fall is no spike


def test_any_metric_counts():
    ok, _, _ = Guard().judge(Guard().init(), jnp.float32(1), jnp.float32(1), {"loss/kl": jnp.float32("nan")})
    assert not ok


def test_the_reason_names_the_first_term():
    nan, limits = float("nan"), {"loss": 9.0, "grad_norm": float("inf")}
    values = {"grad_norm": nan, "loss": nan, "loss/kl": nan, "x": 1.0}
    assert why_refused(values, limits) == "loss/kl is nan (also loss, grad_norm)"
    assert why_refused({"loss": 10.0, "grad_norm": 1.0}, limits) == "loss is 10, over its limit 9"


@pytest.mark.parametrize(
    "wrong", [{"window": 0}, {"in_a_row": 0}, {"rewinds": -1}, {"gradient_factor": 1.0}, {"spike_sigma": 0.0}]
)
def test_options_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Guard(**wrong)


# ---------------------------------------------------------------------------------------------------------- in the loop


def test_a_run_with_one_bad_batch_finishes(tmp_path):
    e = spoiled(float("nan"), 4, 5, "steps=8")
    result = train(e, tmp_path, devices=jax.devices()[:1])
    run = Run(e, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        without, _ = take(run, run.init(), [0, 1, 2, 3, 5, 6, 7, 8])
    same(result.state, without)
    assert [r["step"] for r in read_records(tmp_path)] == list(range(1, 9))
    assert read_records(tmp_path)[-1]["refused_steps"] == 1
    (incident,) = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert incident["kind"] == "refused"
    assert incident["text"] == "step 5 refused (samples 64 to 79 of the stream): loss is nan (also grad_norm)"
    with CheckpointStore(tmp_path) as store:
        found = store.restore(abstract_like(run.state_shapes, run.state_shardings))
    assert found.progress["position"] == 9 * SIZE
    assert found.progress["refused"] == 1


def test_many_bad_batches_send_the_run_back(tmp_path):
    """Batches 6 to 9 are bad: from the checkpoint of step 4 it goes on with batch 10."""
    e = spoiled(1000.0, 6, 10, "steps=10", "checkpoint.every=4")
    result = train(e, tmp_path, devices=jax.devices()[:1])
    run = Run(e, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        without, _ = take(run, run.init(), [0, 1, 2, 3, 10, 11, 12, 13, 14, 15])
    same(result.state, without)
    assert [r["step"] for r in read_records(tmp_path)] == list(range(1, 11))
    assert "going back to step 4, and on with the data from sample 160" in (tmp_path / "incidents.jsonl").read_text()


def test_a_run_that_cannot_go_on_says_why(tmp_path):
    e = spoiled(float("nan"), 2, 50, "steps=10", "checkpoint.every=1", rewinds=1)
    with pytest.raises(DivergedError) as caught:
        train(e, tmp_path, devices=jax.devices()[:1])
    message = str(caught.value)
    assert "step 3: 3 steps in a row were refused, also after going back to the last checkpoint 1 times" in message
    assert "loss is nan (also grad_norm); the first NaN comes out of `select_n` in jvp(), " in message
    assert "tests/test_guard.py" in message
    assert "Largest gradients: " in message
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == [1, 2]


# ---------------------------------------------------------------------------------------------------------- where it is


@pytest.mark.parametrize("scan", [False, True])
def test_the_layer_of_the_first_nan_is_named(scan):
    module, x = ViT(image_size=16, patch=8, width=16, depth=3, heads=2, scan=scan), jnp.ones((2, 16, 16, 3))
    params = module.init(jax.random.key(0), x)
    blocks = params["params"]["transformer"]
    if scan:
        kernel = blocks["blocks"]["mlp"]["fc1"]["kernel"]
        blocks["blocks"]["mlp"]["fc1"]["kernel"] = kernel.at[1].multiply(jnp.inf)
    else:
        blocks["block_1"]["mlp"]["fc1"]["kernel"] *= jnp.inf

    def loss(params, x):
        return module.apply(params, x)["features"].sum()

    place = first_not_finite(jax.value_and_grad(loss), params, x)
    assert place is not None
    assert "the first NaN comes out of `dot_general`" in place
    assert ("transformer[1]/" if scan else "transformer/block_1/mlp/fc1") in place
    assert "mlp/fc1" in place


def test_backward_passes_and_infinities_are_searched_too():
    place = first_not_finite(jax.grad(lambda x: jnp.sqrt(x * 0).sum()), jnp.ones(3))
    assert place is not None
    assert "transpose" in place
    place = first_not_finite(lambda x: jnp.exp(x) + 1, jnp.float32(1000))
    assert place is not None
    assert "the first infinity comes out of `exp`" in place
    assert first_not_finite(lambda x: jnp.where(x > 0, x, -jnp.inf).max(), jnp.arange(3.0)) is None


def test_what_is_given_may_be_nan_already():
    batch = {"index": jnp.arange(2), "audio": jnp.array([1.0, jnp.nan])}
    place = first_not_finite(lambda params, batch: (params * batch["audio"]).sum(), jnp.float32(2), batch)
    assert place == "there is NaN already in audio, before any operation"
