"""What every method promises (see `ssljax.method.Method`), for every config file; the size of the published ones."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import quick_compilation, tiny  # noqa: F401

from ssljax.config import Experiment, experiment, load_config, load_variants
from ssljax.data import eval_batches
from ssljax.listing import config_files
from ssljax.method import Context, Method
from ssljax.optim import parameter_rules
from ssljax.rules import names
from ssljax.run import Run
from ssljax.state import TrainState

FILES = config_files(Path(__file__).parent.parent / "configs")


def by_name(tree: Any) -> dict[str, Any]:
    """name -> leaf"""
    return dict(zip(jax.tree.leaves(names(tree)), jax.tree.leaves(tree), strict=True))


def kinds(tree: Any) -> dict[str, tuple]:
    """name -> shape and dtype"""
    return {name: (x.shape, x.dtype) for name, x in by_name(tree).items()}


# ------------------------------------------------------------------------------------------------- every method, tiny


@dataclass(frozen=True)
class Tiny:
    """A tiny run of a method: its state before and after three steps, and a batch."""

    run: Run
    before: TrainState
    after: TrainState
    batch: dict[str, jax.Array]

    @property
    def method(self) -> Method:
        return self.run.experiment.method

    def context(self, key: int = 0) -> Context:
        return Context(jax.random.key(key), self.after.step, self.after.step / self.run.experiment.steps)

    @functools.cached_property
    def views(self) -> dict[str, jax.Array]:
        return jax.jit(self.run.experiment.data.views)(jax.random.key(1), self.batch)

    @functools.cached_property
    def loss_and_gradient(self) -> Any:
        """(views, key) -> ((loss, (state, metrics)), gradient) after the steps, compiled once."""
        after, context = self.after, self.context()

        def loss(params, views, key):
            return self.method.loss(params, after.method, views, replace(context, key=key))

        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return lambda views, key=0: compiled(after.params, views, jax.random.key(key))

    @functools.cached_property
    def features(self) -> Any:
        """Evaluation batch -> features, compiled once."""
        view = self.run.experiment.data.eval_view

        def features(params, state, batch):
            return self.method.features(params, state, view(None, batch) if "image" in batch else batch)

        compiled = jax.jit(features)
        return lambda batch: compiled(self.after.params, self.after.method, batch)


@pytest.fixture(scope="module", params=FILES, ids=lambda file: file.stem)
def method(request) -> Tiny:
    run = Run(tiny(request.param), jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        step, before = run.compile_step(), run.init()
        batches, after = run.batches(0), run.init()
        for _ in range(3):
            batch = run.place(next(batches))
            after, metrics, _ = step(after, batch)
        batches.close()
    assert np.isfinite(float(metrics["loss"]))
    return Tiny(run, before, after, batch)


def test_metrics_are_finite_scalars_and_embeddings_are_rows(method):
    (loss, (_, metrics)), _ = method.loss_and_gradient(method.views)
    assert loss.shape == ()
    assert loss.dtype == jnp.float32
    embeddings = metrics.pop("embeddings", ())
    for name, value in {"loss": loss, **metrics}.items():
        assert jnp.shape(value) == (), name
        assert np.isfinite(value), name
    assert isinstance(embeddings, tuple)
    assert len(embeddings) <= 2
    assert len({x.shape for x in embeddings}) <= 1
    for x in embeddings:
        assert x.ndim == 2
        assert np.isfinite(x).all()


def test_every_trained_parameter_learns_and_frozen_ones_stay(method):
    """Not at the first step: behind a residual branch whose last scale starts at zero, gradients do too."""
    frozen = by_name(parameter_rules(method.run.experiment.optim, method.after.params).frozen)
    frozen = {name for name, value in frozen.items() if value}
    _, gradient = method.loss_and_gradient(method.views)
    gradient, before, after = by_name(gradient), by_name(method.before.params), by_name(method.after.params)
    assert all(np.isfinite(x).all() for x in gradient.values())
    assert {name for name, x in gradient.items() if not np.any(x)} <= frozen
    assert {name for name in before if np.array_equal(before[name], after[name])} == frozen


def test_everything_is_float32_and_keeps_its_shape(method):
    """Parameters, method state (but for integers) and optimiser state, after `loss`, `update` and whole steps."""
    assert kinds(method.after) == kinds(method.before)
    (_, (state, _)), _ = method.loss_and_gradient(method.views)
    assert kinds(state) == kinds(method.before.method)
    updated = jax.eval_shape(method.method.update, method.after.params, method.after.method, method.context())
    assert kinds(updated) == kinds((method.before.params, method.before.method))
    floats = [x.dtype for x in jax.tree.leaves(method.after) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype(jnp.float32)}


def test_order_of_the_rows_does_not_matter(method):
    """The loss of a permuted batch is the same; in the mean over keys, where the loss draws random numbers."""
    order = np.random.default_rng(0).permutation(len(method.batch["index"]))
    permuted = {name: x[order] for name, x in method.views.items()}
    loss = lambda views, key: float(method.loss_and_gradient(views, key)[0][0])  # noqa: E731
    if np.isclose(loss(method.views, 0), loss(method.views, 1), rtol=1e-6):
        np.testing.assert_allclose(loss(permuted, 0), loss(method.views, 0), rtol=1e-5)
    else:
        difference = np.array([loss(permuted, key) - loss(method.views, key) for key in range(64)])
        assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(difference))


def test_features_of_a_row_do_not_depend_on_the_others(method):
    run = method.run
    batches = eval_batches(run.experiment.data.train, run.eval_transform, batch_size=8)
    first, second = (jax.device_put(next(batches)) for _ in range(2))
    batches.close()
    features, half = method.features(first), 4
    mixed = method.features({name: jnp.concatenate([x[:half], second[name][half:]]) for name, x in first.items()})
    assert features
    for name, x in features.items():
        assert len(x) == 8, name
        assert jnp.issubdtype(x.dtype, jnp.floating), name
        assert np.isfinite(x).all(), name
        np.testing.assert_allclose(mixed[name][:half], x[:half], rtol=1e-5, atol=1e-6, err_msg=name)
        assert not np.allclose(mixed[name][half:], x[half:]), name
    if "image" in features:
        assert features["image"].ndim == 2


def test_bfloat16(method, request):
    """The same state in half the precision: nearly the same loss. Parameters, state and loss stay float32."""
    file = request.node.callspec.params["method"]
    half = Run(tiny(file, "precision=bf16"), jax.devices()[:1], method.run.batch_shapes)
    assert kinds(half.state_shapes) == kinds(method.before)
    state, context = method.after, method.context()
    (expected, _), _ = method.loss_and_gradient(method.views)
    loss, (next_state, _) = jax.jit(half.experiment.method.loss)(state.params, state.method, method.views, context)
    assert loss.dtype == jnp.float32
    assert kinds(next_state) == kinds(state.method)
    assert loss != expected  # or nothing was computed in bfloat16
    np.testing.assert_allclose(loss, expected, rtol=0.05)


# ---------------------------------------------------------------------------------------------- the published variants

# Parameters by the first part of their name, "" being all; from the papers and their code, or counted by hand.
PUBLISHED = {
    "simclr:paper": {
        "encoder": 23_508_032,  # ResNet-50 without its classifier: 25,557,032 - 2,049,000
        "projector": 2 * (2048 * 2048 + 2 * 2048) + 2048 * 128 + 128,  # two layers with norms, one with a scale only
    },
    "clip:paper": {"image": 87_849_216, "text": 63_428_096, "": 151_277_313},  # the released ViT-B/32
    "clip:paper_b16": {"": 149_620_737},
    "clip:paper_l14": {"": 427_616_513},
}
PAPERS = [f"{file.stem}:{name}" for file in FILES for name in load_variants(str(file)) if name.startswith("paper")]


def published(spec: str) -> Experiment:
    """A paper variant without its data."""
    config = load_config(f"{FILES[0].parent}/{spec.replace(':', '.py:')}")
    config.data.train, config.evals = None, {}
    return experiment(config)


@pytest.mark.parametrize("spec", PAPERS)
def test_published_variants(spec):
    """Shapes only: parameter counts, and a trace of the whole training step at the paper's batch size, 8 devices."""
    run = Run(published(spec))
    counted = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in run.state_shapes.params.items()}
    counted[""] = sum(counted.values())
    assert spec in PUBLISHED, f"add the published numbers of parameters of {spec} here; there are {counted}"
    assert {name: counted[name] for name in PUBLISHED[spec]} == PUBLISHED[spec]
    with jax.set_mesh(run.mesh):
        state, metrics, _ = jax.eval_shape(run.step, run.state_shapes, run.batch_shapes)
    assert kinds(state) == kinds(run.state_shapes)
    assert all(x.shape == () for x in metrics.values())
