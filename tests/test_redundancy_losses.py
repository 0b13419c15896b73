"""Barlow Twins, VICReg and KoLeo against float64 numpy: values and gradients on 1, 2, 4 and 8 devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import TypeCheckError, jaxtyped
from loss64 import make_mesh, numeric_gradient, rows

from ssljax import losses
from ssljax.losses import sharded
from ssljax.mesh import BATCH

# The equations of the docstrings, once more, in float64 numpy.


def barlow64(a, b, weight=5e-3):
    a, b = ((x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5) for x in (a, b))
    c = a.T @ b / len(a)
    diagonal = np.diag(c)
    return np.sum((1 - diagonal) ** 2) + weight * (np.sum(c**2) - np.sum(diagonal**2))


def variance64(x):
    return np.mean(np.maximum(0, 1 - np.sqrt(x.var(axis=0, ddof=1) + 1e-4)))


def covariance64(x):
    c = np.cov(x.T)
    return (np.sum(c**2) - np.sum(np.diag(c) ** 2)) / len(c)


def vicreg64(a, b, invariance=25.0, variance=25.0, covariance=1.0):
    distance = invariance * np.mean((a - b) ** 2)
    spread = variance * (variance64(a) + variance64(b)) / 2
    return distance + spread + covariance * (covariance64(a) + covariance64(b))


def koleo64(x, groups=1):
    nearest = []
    x = np.asarray(x, np.float64)
    for part in np.split(x / np.linalg.norm(x, axis=1, keepdims=True), groups):
        squared = np.sum((part[:, None] - part[None]) ** 2, axis=-1)
        np.fill_diagonal(squared, np.inf)
        nearest.append(squared.min(axis=1))
    return np.mean(-np.log(np.concatenate(nearest) + 1e-16) / 2)


A, B = (0.4 * x for x in rows(0))  # variances on both sides of the hinge
B[:, 2] *= 5
LOSSES = {
    "barlow_twins": (losses.barlow_twins, barlow64, (A, B, 0.1)),
    "vicreg": (losses.vicreg, vicreg64, (A, B, 10.0, 7.0, 3.0)),
    "variance_hinge": (losses.variance_hinge, variance64, (A,)),
    "covariance_penalty": (losses.covariance_penalty, covariance64, (B,)),
    "koleo": (losses.koleo, koleo64, (A,)),
    "koleo, 2 groups": (partial(losses.koleo, groups=2), partial(koleo64, groups=2), (A,)),
    "koleo, 8 groups": (partial(losses.koleo, groups=8), partial(koleo64, groups=8), (A,)),
}
CASES = {
    f"{name} of {dtype}": (ours, reference, [jnp.asarray(x, dtype if np.ndim(x) else None) for x in args])
    for name, (ours, reference, args) in LOSSES.items()
    for dtype in ("float32", "bfloat16")
}


@pytest.fixture(scope="module")
def expected():
    """Values and gradients in float64, at the rounded inputs."""
    results = {}
    for name, (_, reference, args) in CASES.items():
        args = [np.asarray(x, np.float64) for x in args]
        results[name] = reference(*args), [numeric_gradient(reference, args, i) for i in range(len(args))]
    return results


@pytest.mark.parametrize("shape", [None, (2, 1, 1), (2, 2, 2), (4, 2, 1)], ids=str)
def test_values_and_gradients_equal_float64(shape, expected):
    """All cases in one compilation. Gradients with respect to bfloat16 are exact to its rounding, 2^-8."""

    def run(args):
        return {
            name: jax.value_and_grad(ours, tuple(range(len(args[name]))))(*args[name])
            for name, (ours, _, _) in CASES.items()
        }

    mesh = make_mesh(shape or (1, 1, 1))
    by_rows = NamedSharding(mesh, PartitionSpec(BATCH))
    with jax.set_mesh(mesh):
        args = {
            name: [jax.device_put(x, by_rows) if shape and x.ndim else x for x in args]
            for name, (_, _, args) in CASES.items()
        }
        got = jax.jit(run)(args)
    for name, (value, gradients) in got.items():
        want, wanted_gradients = expected[name]
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, want, rtol=1e-5, err_msg=name)
        for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
            tolerance = 2**-8 if gradient.dtype == jnp.bfloat16 else 1e-5
            error = np.linalg.norm(np.asarray(gradient, np.float64) - wanted)
            assert error <= tolerance * np.linalg.norm(wanted), name


def test_defaults_are_the_papers():
    a, b = jnp.asarray(A), jnp.asarray(B)
    a64, b64 = A.astype(np.float64), B.astype(np.float64)
    np.testing.assert_allclose(losses.barlow_twins(a, b), barlow64(a64, b64), rtol=1e-5)
    np.testing.assert_allclose(losses.vicreg(a, b), vicreg64(a64, b64), rtol=1e-5)


def test_no_table_of_all_rows(monkeypatch):
    """KoLeo's gradient: tiles, on one device and on eight, and nowhere [B, B]; the same value."""
    monkeypatch.setattr(sharded, "TILE", dict.fromkeys(sharded.TILE, 200))
    x = rows(1, n=600, d=8)[0]
    gradient = jax.jit(jax.value_and_grad(losses.koleo))
    text = gradient.lower(jnp.asarray(x)).compile().as_text() or ""
    assert "f32[200,200]" in text
    assert "600,600]" not in text
    value, alone = gradient(jnp.asarray(x))
    np.testing.assert_allclose(value, koleo64(x), rtol=1e-5)

    mesh = make_mesh((4, 2, 1))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(BATCH)))
        text = gradient.lower(x).compile().as_text() or ""
        spread_value, spread = gradient(x)
    assert "f32[75,300]" in text
    assert "600,600]" not in text
    np.testing.assert_allclose(spread_value, value, rtol=1e-6)
    np.testing.assert_allclose(spread, alone, rtol=1e-4, atol=1e-6 * np.abs(alone).max())


@pytest.mark.parametrize("fn", [losses.barlow_twins, losses.vicreg], ids=lambda fn: fn.__name__)
def test_only_statistics_move(fn):
    """On 8 devices: all-reduces of [D] and [D, D], and no gather of rows."""
    mesh = make_mesh((4, 2, 1))
    row = jax.ShapeDtypeStruct((64, 24), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(BATCH)))
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(fn, argnums=(0, 1))).lower(row, row).compile().as_text() or ""
    assert "all-reduce" in text
    assert not any(kind in text for kind in ("all-gather", "all-to-all", "collective-permute", "[64,24]"))


def test_collapsed_batch():
    """All rows equal: every column constant, every neighbour at distance 0."""
    same = jnp.tile(jnp.asarray(A[:1]), (16, 1))

    def each(x):
        return [
            jax.value_and_grad(fn)(x)
            for fn in (lambda x: losses.barlow_twins(x, x), losses.variance_hinge, losses.koleo)
        ]

    (barlow, d_barlow), (hinge, d_hinge), (koleo, d_koleo) = jax.jit(each)(same)
    np.testing.assert_allclose(barlow, 6, rtol=1e-6)  # 1 for each diagonal entry
    np.testing.assert_allclose(hinge, 1 - 0.01, rtol=1e-6)
    np.testing.assert_allclose(koleo, -np.log(1e-8), rtol=1e-6)
    assert np.isfinite(d_barlow).all()
    assert np.isfinite(d_hinge).all()
    assert not d_koleo.any()


def test_near_duplicates_repel():
    """Distances far below the rounding of a cosine are still measured, and their gradients finite."""
    pair = np.array([[1.0, 0.0], [1.0, 1e-6], [-1.0, 0.0], [-1.0, 1e-3]], np.float32)
    value, gradient = jax.value_and_grad(losses.koleo)(jnp.asarray(pair))
    np.testing.assert_allclose(value, koleo64(pair), rtol=1e-5)
    np.testing.assert_allclose(gradient[:2, 1], [5e5, -5e5], rtol=1e-3)


def test_constant_column_and_far_mean():
    """A dead unit, and a batch whose mean is 1000 times its spread: subtracted first, the variance keeps its digits."""
    a, b = A.copy(), B.copy()
    a[:, 1] = 3.0
    pairs = [(a, b), (A + 1000, B + 1000)]
    for pair in pairs:
        pair64 = [np.asarray(x, np.float64) for x in pair]
        for fn, reference in ((losses.barlow_twins, barlow64), (losses.vicreg, vicreg64)):
            value, gradients = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(*(jnp.asarray(x) for x in pair))
            np.testing.assert_allclose(value, reference(*pair64), rtol=1e-4)  # of the mean's own rounding
            assert all(np.isfinite(g).all() for g in gradients)


def test_one_row():
    one = jnp.asarray(A[:1])
    np.testing.assert_allclose(losses.barlow_twins(one, one), 6, rtol=1e-6)
    for fn in (losses.variance_hinge, losses.covariance_penalty, lambda x: losses.vicreg(x, x)):
        with pytest.raises(ValueError, match="batch of two or more"):
            fn(one)
    with pytest.raises(ValueError, match="1 rows do not make 1 equal group"):
        losses.koleo(one)


@pytest.mark.parametrize("groups", [0, 3, 16])
def test_groups_must_divide(groups):
    with pytest.raises(ValueError, match=f"16 rows do not make {groups} equal"):
        losses.koleo(jnp.asarray(A), groups=groups)


@pytest.mark.parametrize("fn", [losses.barlow_twins, losses.vicreg])
def test_views_must_match(fn):
    with pytest.raises(ValueError, match=r"same shape \[B, D\]; got \(16, 6\) and \(15, 6\)"):
        fn(jnp.asarray(A), jnp.asarray(B[:-1]))


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "variance_hinge", "covariance_penalty", "koleo"])
def test_annotations_hold(name):
    fn, _, args = CASES[f"{name} of bfloat16"]
    checked = jaxtyped(fn, typechecker=beartype)
    assert np.isfinite(checked(*args))
    with pytest.raises(TypeCheckError):
        checked(*(x[0] if x.ndim else x for x in args))
