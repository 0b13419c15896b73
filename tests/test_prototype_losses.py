"""Losses over prototypes against float64 numpy: values and gradients on 1, 2, 4 and 8 devices, and on hard inputs."""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import TypeCheckError, jaxtyped
from loss64 import make_mesh, numeric_gradient
from scipy.special import log_softmax, softmax

from ssljax import losses
from ssljax.mesh import BATCH

# The equations of the docstrings, once more, in float64 numpy, by the definition rather than by logarithms.


def sinkhorn64(scores, epsilon, iterations=3, mask=None, queue=None):
    rows = np.asarray(scores, np.float64)
    valid = np.ones(len(rows), bool) if mask is None else np.asarray(mask)
    joined = rows[valid] if queue is None else np.concatenate([rows[valid], np.asarray(queue, np.float64)])
    q = np.exp((joined - joined.max()) / epsilon)
    for _ in range(iterations):
        q /= q.sum(axis=0)
        q /= q.sum(axis=1, keepdims=True)
    result = np.zeros_like(rows)
    result[valid] = q[: valid.sum()] / q[: valid.sum()].sum(axis=1, keepdims=True)
    return result


def centre64(centre, teacher, momentum, mask=None):
    rows = np.asarray(teacher, np.float64).reshape(-1, teacher.shape[-1])
    rows = rows if mask is None else rows[np.asarray(mask).reshape(-1)]
    return momentum * np.asarray(centre, np.float64) + (1 - momentum) * rows.mean(axis=0) if len(rows) else centre


def cross_entropy64(targets, logits, temperature):
    return -np.sum(targets * log_softmax(logits / temperature, axis=-1), axis=-1)


def swapped64(targets, logits, temperature):
    pairs = [(t, v) for t in range(len(targets)) for v in range(len(logits)) if t != v]
    return np.mean([cross_entropy64(targets[t], logits[v], temperature) for t, v in pairs])


def masked64(targets, logits, temperature, mask):
    loss = cross_entropy64(targets, logits, temperature)
    return np.mean([row[keep > 0].mean() if keep.any() else 0.0 for row, keep in zip(loss, mask, strict=True)])


RNG = np.random.default_rng(0)
B, K, T, V, N = 16, 10, 2, 5, 3


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def targets(*shape):
    return softmax(5 * normal(*shape), axis=-1)


SCORES, QUEUE, CENTRE = normal(B, K), normal(24, K), normal(K)
PAD = np.arange(B) % 3 != 1
PATCHES = np.array([[True, False, True], [False] * 3, [True] * 3, [False, False, True]] * 4)  # one image has none
WEIGHTS = np.abs(normal(B))


class Case(NamedTuple):
    ours: Callable
    reference: Callable
    args: tuple
    gradients: tuple[int, ...] = ()  # positions of the arguments to differentiate
    rows: int = 0  # axis of the arrays of more than one dimension (and of masks) that the batch is
    whole: tuple[int, ...] = ()  # positions of arrays that are no rows


TARGETS = {
    "sinkhorn": Case(losses.sinkhorn, sinkhorn64, (SCORES, 0.3)),
    "padded": Case(
        lambda s, e, m: losses.sinkhorn(s, e, 2, m), lambda s, e, m: sinkhorn64(s, e, 2, m), (SCORES, 0.3, PAD)
    ),
    "queue": Case(
        lambda s, e, q: losses.sinkhorn(s, e, 2, queue=q),
        lambda s, e, q: sinkhorn64(s, e, 2, queue=q),
        (SCORES, 0.2, QUEUE),
    ),
    "padded queue": Case(
        lambda s, e, m, q: losses.sinkhorn(s, e, 2, m, q),
        lambda s, e, m, q: sinkhorn64(s, e, 2, m, q),
        (SCORES, 0.2, PAD, QUEUE),
        whole=(3,),
    ),
    "softmax": Case(lambda s, e: losses.sinkhorn(s, e, 0), lambda s, e: softmax(s / e, axis=1), (SCORES, 0.2)),
    "centred softmax": Case(
        losses.centred_softmax, lambda t, c, e: softmax((t - c) / e, axis=-1), (normal(T, B, K), CENTRE, 0.2), rows=1
    ),
    "centre": Case(losses.update_centre, centre64, (CENTRE, normal(T, B, K), 0.9), rows=1),
    "masked centre": Case(losses.update_centre, centre64, (CENTRE, normal(B, N, K), 0.9, PATCHES)),
}
LOSSES = {
    "rows": Case(
        lambda q, s, e, w: (w * losses.cross_entropy(q, s, e)).sum(),  # as packed patches use it
        lambda q, s, e, w: (w * cross_entropy64(q, s, e)).sum(),
        (3 * targets(B, K), normal(B, K), 0.2, WEIGHTS),
        (0, 1, 2),
    ),
    "swapped": Case(
        losses.swapped_cross_entropy, swapped64, (targets(T, B, K), normal(V, B, K), 0.1), (0, 1, 2), rows=1
    ),
    "three targets": Case(
        losses.swapped_cross_entropy, swapped64, (targets(3, B, K), normal(3, B, K), 0.3), (1,), rows=1
    ),
    "masked": Case(losses.masked_cross_entropy, masked64, (targets(B, N, K), normal(B, N, K), 0.2, PATCHES), (0, 1, 2)),
}


def cast(x, dtype):
    """Tables in `dtype`; scalars, vectors and masks as they are."""
    return jnp.asarray(x, dtype) if np.ndim(x) > 1 and np.asarray(x).dtype != bool else jnp.asarray(x)


CASES = {
    f"{name} of {dtype}": case._replace(args=tuple(cast(x, dtype) for x in case.args))
    for name, case in (TARGETS | LOSSES).items()
    for dtype in ("float32", "bfloat16")
}


@pytest.fixture(scope="module")
def expected():
    """Values and gradients in float64, at the rounded inputs."""
    results = {}
    for name, case in CASES.items():
        args = [np.asarray(x) if x.dtype == bool else np.asarray(x, np.float64) for x in case.args]
        results[name] = case.reference(*args), [numeric_gradient(case.reference, args, i) for i in case.gradients]
    return results


def value_and_gradients(case, args):
    return jax.value_and_grad(case.ours, case.gradients)(*args) if case.gradients else (case.ours(*args), ())


def place(case, mesh):
    """The rows of tables and masks over the mesh, everything else on all devices."""

    def spec(i, x):
        split = (x.ndim > 1 or x.dtype == bool) and i not in case.whole
        return PartitionSpec(*[None] * case.rows, BATCH) if split else PartitionSpec()

    return [jax.device_put(x, NamedSharding(mesh, spec(i, x))) for i, x in enumerate(case.args)]


@pytest.mark.parametrize("shape", [None, (2, 1, 1), (2, 2, 2), (4, 2, 1)], ids=str)
def test_values_and_gradients_equal_float64(shape, expected):
    """All cases in one compilation, the rows in 1, 2, 4 and 8 parts.

    Gradients with respect to bfloat16 are exact to its rounding, 2^-8.
    """

    def run(args):
        return {name: value_and_gradients(case, args[name]) for name, case in CASES.items()}

    mesh = make_mesh(shape or (1, 1, 1))
    with jax.set_mesh(mesh):
        got = jax.jit(run)({name: place(case, mesh) if shape else case.args for name, case in CASES.items()})
    for name, (value, gradients) in got.items():
        want, wanted_gradients = expected[name]
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-9, err_msg=name)
        for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
            tolerance = 2**-8 if gradient.dtype == jnp.bfloat16 else 1e-5
            error = np.linalg.norm(np.asarray(gradient, np.float64) - wanted)
            assert error <= tolerance * np.linalg.norm(wanted), name


def compiled(fn, shape, *args):
    """`fn` compiled for a mesh; arguments are (shape, axis of the batch)."""
    mesh = make_mesh(shape)
    structs = [
        jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH)))
        for size, dtype, axis in args
    ]
    with jax.set_mesh(mesh):
        return jax.jit(fn).lower(*structs).compile()


def traffic(text):
    """Shapes and kinds of all communication in a compiled program."""
    found = re.findall(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    return {(shape, kind) for shapes, kind in found for shape in re.findall(r"\w+\[[\d,]*\]", shapes)}


def test_sinkhorn_sums_vectors_only():
    """On 8 devices: all-reduces of [K], no [B, K] moves, with padding and a queue of earlier rows on all devices."""

    def fn(scores, mask, queue):
        return losses.sinkhorn(scores, 0.05, mask=mask, queue=queue)

    program = compiled(fn, (4, 2, 1), ((64, 40), "float32", 0), ((64,), "bool", 0), ((128, 40), "float32", 0))
    assert traffic(program.as_text()) == {("f32[40]", "all-reduce")}


def test_cross_entropy_moves_and_keeps_little():
    """Only scalars are summed, and beside its gradient the loss takes less than one table of the logits.

    (The mean of t * log_softmax over pairs takes 2.3 tables.)
    """
    v, b, k = 6, 64, 4096
    fn = jax.value_and_grad(lambda s, t: losses.swapped_cross_entropy(t, s, 0.1))
    program = compiled(fn, (4, 2, 1), ((v, b, k), "float32", 1), ((2, b, k), "float32", 1))
    assert traffic(program.as_text()) == {("f32[]", "all-reduce")}
    assert program.memory_analysis().temp_size_in_bytes < 0.6 * v * b * k * 4 / 8


def test_assignments_have_no_gradient():
    def total(scores, epsilon, centre):
        rows = losses.sinkhorn(scores, epsilon) ** 2 + losses.centred_softmax(scores, centre, epsilon) ** 2
        return rows.sum() + losses.update_centre(centre, scores, 0.9).sum()

    scores, epsilon, centre = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(jnp.asarray(SCORES), 0.2, jnp.asarray(CENTRE))
    assert not scores.any()
    assert not epsilon.any()
    np.testing.assert_allclose(centre, 0.9, rtol=1e-6)


def test_sinkhorn_of_scores_far_apart():
    """scores / epsilon of +-500, with rows that lie 1000 below others: finite, and equal to float64 by logarithms.

    Float32 itself holds 500 to 3e-5, so that is the relative error of an exponential of it.
    """
    scores = RNG.choice([-1.0, 1.0], (B, K)).astype(np.float32) * RNG.uniform(0.9, 1, (B, K)).astype(np.float32)
    scores[0], scores[1] = -1.0, 1.0
    got = np.asarray(jax.jit(losses.sinkhorn)(scores, 0.002))
    u, logits = np.zeros(K), scores.astype(np.float64) / 0.002
    v = np.zeros((B, 1))
    for _ in range(3):
        u = np.logaddexp.reduce(logits - v, axis=0)
        v = np.logaddexp.reduce(logits - u, axis=1, keepdims=True)
    np.testing.assert_allclose(got, np.exp(logits - u - v), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-5)


def test_sinkhorn_balances():
    """SEER's check: after 10 iterations the use of prototypes is within 5 % of uniform."""
    assignments = jax.jit(losses.sinkhorn, static_argnums=2)(normal(400, K), 0.3, 10)
    np.testing.assert_allclose(assignments.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(assignments.sum(axis=0), 400 / K, rtol=0.05)


@pytest.mark.parametrize("rows", [1, 7])
def test_sinkhorn_of_equal_rows_is_uniform(rows):
    scores = jnp.tile(jnp.asarray(SCORES[:1]), (rows, 1))
    np.testing.assert_allclose(jax.jit(losses.sinkhorn)(scores, 0.05), 1 / K, rtol=1e-5)


@pytest.mark.parametrize("garbage", [1e4, -1e4, np.nan, np.inf])
def test_padding_counts_for_nothing(garbage):
    padded = np.where(PAD[:, None], SCORES, np.float32(garbage))
    scores, mask = jnp.asarray(padded), jnp.asarray(PAD)
    got = jax.jit(losses.sinkhorn, static_argnums=2)(scores, 0.05, 3, mask)
    np.testing.assert_allclose(got[PAD], sinkhorn64(SCORES[PAD], 0.05), rtol=1e-4, atol=1e-9)
    assert not got[~PAD].any()
    centre = losses.update_centre(jnp.asarray(CENTRE), scores, 0.9, mask)
    np.testing.assert_allclose(centre, centre64(CENTRE, SCORES, 0.9, PAD), rtol=1e-5)


def test_no_valid_row():
    nothing = jnp.zeros(B, bool)
    scores = jnp.asarray(SCORES)
    for queue in (None, jnp.asarray(QUEUE)):
        assert not losses.sinkhorn(scores, 0.05, mask=nothing, queue=queue).any()
    np.testing.assert_allclose(losses.update_centre(jnp.asarray(CENTRE), scores, 0.9, nothing), CENTRE, rtol=1e-6)
    unmasked = jnp.zeros((B, N), bool)
    q, s = jnp.asarray(targets(B, N, K), jnp.float32), jnp.asarray(normal(B, N, K))
    value, gradient = jax.jit(jax.value_and_grad(losses.masked_cross_entropy, 1))(q, s, 0.1, unmasked)
    assert value == 0
    assert not gradient.any()


def test_cross_entropy_of_large_logits():
    """Certain and right costs 0, certain and wrong the distance, whatever the size of the logits."""
    logits = jnp.asarray([[500.0, -500.0, 0.0]])
    right, wrong, none = (jnp.asarray([x]) for x in ([1.0, 0, 0], [0, 1.0, 0], [0.0, 0, 0]))
    loss = jax.jit(lambda s, q: losses.cross_entropy(q, s, 1.0).sum())
    for q, want in ((right, 0), (wrong, 1000), (none, 0)):
        value, gradient = jax.value_and_grad(loss)(logits, q)
        np.testing.assert_allclose(value, want, atol=1e-30)
        np.testing.assert_allclose(gradient, q.sum() * right - q, atol=1e-30)
    same = jnp.stack([logits, logits, -logits])
    np.testing.assert_allclose(losses.swapped_cross_entropy(jnp.stack([right, right]), same, 1.0), 500, rtol=1e-6)


def test_derivatives_forward_and_twice():
    """The rule of the log-sum-exp can itself be differentiated: the Hessian is p p^T's."""
    q, s = jnp.asarray(targets(1, K), jnp.float32), jnp.asarray(normal(1, K))
    hessian = jax.jit(jax.hessian(lambda s: losses.cross_entropy(q, s, 0.5).sum()))(s)[0, :, 0]
    p = softmax(np.asarray(s[0], np.float64) / 0.5)
    np.testing.assert_allclose(hessian, (np.diag(p) - np.outer(p, p)) / 0.25, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.sinkhorn(jnp.ones((4, 3)), 0.1, -1), "use 0 or more"),
        (lambda: losses.sinkhorn(jnp.ones((4, 3)), 0.1, queue=jnp.ones((4, 2))), "same prototypes; got 3 and 2"),
        (lambda: losses.sinkhorn(jnp.ones((4, 3)), 0.1, mask=jnp.ones(3, bool)), "one entry per row"),
        (lambda: losses.cross_entropy(jnp.ones((4, 3)), jnp.ones((4, 2)), 0.1), "same prototypes; got 3 and 2"),
        (lambda: losses.swapped_cross_entropy(jnp.ones((3, 4, 3)), jnp.ones((2, 4, 3)), 0.1), "V >= T"),
        (lambda: losses.swapped_cross_entropy(jnp.ones((1, 4, 3)), jnp.ones((1, 4, 3)), 0.1), "V >= 2"),
        (
            lambda: losses.masked_cross_entropy(jnp.ones((4, 2, 3)), jnp.ones((4, 2, 3)), 0.1, jnp.ones((4, 3), bool)),
            "agree in B and N",
        ),
    ],
)
def test_wrong_shapes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["sinkhorn", "centred softmax", "centre", "masked centre", "swapped", "masked"])
def test_annotations_hold(name):
    case = CASES[f"{name} of bfloat16"]
    checked = jaxtyped(case.ours, typechecker=beartype)
    assert np.isfinite(checked(*case.args)).all()
    with pytest.raises(TypeCheckError):
        checked(*(x.astype(int) if x.dtype == jnp.bfloat16 else x for x in case.args))
