"""Contrastive losses against dense float64 numpy: value and every gradient, in every form of the sweep.

Every loss of the family x 1, 2, 4, 8 devices x (one tile, even tiles, ragged tiles) x (gather, ring) x masked rows, in
float32 (relative 1e-5) and bfloat16; and what the compiled programs hold, send and compute.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import loss64
import numpy as np
import pytest
from beartype import beartype
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import TypeCheckError, jaxtyped
from loss64 import make_mesh, rows
from small import quick_compilation  # noqa: F401

from ssljax import losses
from ssljax.losses import sharded
from ssljax.mesh import BATCH


@dataclass(frozen=True)
class Case:
    """A loss and its reference, both as functions of the arguments that get gradients."""

    ours: Any
    reference: Any
    arguments: tuple  # arrays [n, D] by rows, unless `whole`; then scalars
    whole: int = 0  # how many arrays of the end (before the scalars) every device has in full
    teachers: tuple = ()  # arrays without gradient


def cases(n, dtype=np.float32):
    """All losses with their options, on n rows rounded to `dtype`."""

    def rounded(x):
        return np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))

    a, b = map(rounded, rows(0, n))
    c, queue = rounded(rows(1, n)[1]), rounded(rows(2, n + 7)[0])
    old = tuple(map(rounded, rows(3, n, 5)))
    rng = np.random.default_rng(4)
    ids = rng.integers(0, n // 3, n).astype(np.int32)
    mask = rng.random(n) < 0.7
    weights = rng.uniform(0.5, 1.5, n).astype(np.float32)

    def views(ours, reference, *arrays, **options):
        def on(loss, *arguments):
            return loss(*arguments[:-1], temperature=arguments[-1], **options)

        return Case(partial(on, ours), partial(on, reference), (*arrays, 0.2))

    def both(name, arguments, whole=0, **options):
        """The same call of both."""
        return Case(
            partial(getattr(losses, name), **options), partial(getattr(loss64, name), **options), arguments, whole
        )

    def classes(**options):
        def on(loss, x, temperature):
            return loss(x, ids, temperature, **options)

        return Case(partial(on, losses.sup_con), partial(on, loss64.sup_con), (a, 0.3))

    def bank(**options):
        def on(loss, query, key, negatives, temperature):
            return loss(query, key, temperature, negatives, **options)

        return Case(partial(on, losses.info_nce), partial(on, loss64.info_nce), (a, b, queue, 0.07), whole=1)

    def dcl(sigma=None, mask=None):
        weights = np.ones(n) if sigma is None else loss64.mises_fisher(a, b, sigma, mask)

        def ours(a, b, temperature):
            return losses.decoupled(a, b, temperature=temperature, sigma=sigma, mask=mask)

        def reference(a, b, temperature):  # no gradient through the weights
            return loss64.decoupled(a, b, temperature=temperature, weights=weights, mask=mask)

        return Case(ours, reference, (a, b, 0.2))

    def distillation(**options):
        def ours(image, text, scale, *teachers):
            return losses.similarity_distillation(image, text, *teachers, scale=scale, teacher_scale=2.0, **options)

        def reference(image, text, scale):
            teachers = {"teacher_image": old[0], "teacher_text": old[1], "teacher_scale": 2.0}
            return loss64.similarity_distillation(image, text, scale, **teachers, **options)

        return Case(ours, reference, (a, b, 5.0), teachers=old)

    ntx = losses.nt_xent, loss64.nt_xent
    deb = losses.debiased, loss64.debiased
    return {
        "nt_xent": views(*ntx, a, b),
        "nt_xent_three_views": views(*ntx, a, b, c),
        "nt_xent_masked": views(*ntx, a, b, mask=mask, weights=weights),
        "decoupled": dcl(),
        "decoupled_weighted": dcl(sigma=0.5),
        "decoupled_masked": dcl(sigma=0.5, mask=mask),
        "debiased": views(*deb, a, b, prior=0.05),
        "debiased_floor": views(*deb, a, b, prior=0.6),
        "debiased_hard_masked": views(*deb, a, b, c, prior=0.01, hardness=0.8, mask=mask),
        "sup_con": classes(),
        "sup_con_masked": classes(mask=mask),
        "info_nce": both("info_nce", (a, b, 0.1)),
        "info_nce_masked": both("info_nce", (a, b, 0.1), margin=-0.3, mask=mask, weights=weights),
        "queue": bank(),
        "queue_masked": bank(margin=0.1, mask=mask),
        "clip_softmax": both("clip_softmax", (a, b, 14.3)),
        "clip_softmax_masked": both("clip_softmax", (a, b, 14.3), mask=mask, weights=weights),
        "clip_softmax_margin": both("clip_softmax", (a, b, 14.3), margin=0.2, label_smoothing=0.1, mask=mask),
        "clip_softmax_ids": both("clip_softmax", (a, b, 14.3), ids=ids, label_smoothing=0.1),
        "clip_softmax_ids_masked": both("clip_softmax", (a, b, 14.3), ids=ids, mask=mask),
        "sigmoid": both("sigmoid", (a, b, 10.0, -2.7)),
        "sigmoid_ids_masked": both("sigmoid", (a, b, 10.0, -2.7), ids=ids, mask=mask, weights=weights),
        "distillation": distillation(),
        "distillation_masked": distillation(only_right=True, mask=mask),
    }


EXPECTED = {}


def expected(n, dtype):
    """Value and gradients of every case in float64, once for all tests."""
    if (n, dtype) not in EXPECTED:
        EXPECTED[n, dtype] = {
            name: loss64.value_and_gradients(case.reference, case.arguments) for name, case in cases(n, dtype).items()
        }
    return EXPECTED[n, dtype]


def evaluate(all_cases, dtype, mesh=None):
    """Value and gradients of all cases, in one compilation."""
    arguments = {}
    for name, case in all_cases.items():
        placed = []
        for i, x in enumerate((*case.arguments, *case.teachers)):
            x = jnp.asarray(x, dtype if np.ndim(x) else jnp.float32)
            arrays = sum(np.ndim(y) > 0 for y in case.arguments) - case.whole
            by_rows = mesh is not None and x.ndim and (i < arrays or i >= len(case.arguments))
            placed.append(jax.device_put(x, NamedSharding(mesh, PartitionSpec(BATCH))) if by_rows else x)
        arguments[name] = placed

    @jax.jit
    def run(arguments):
        return {
            name: jax.value_and_grad(case.ours, argnums=tuple(range(len(case.arguments))))(*arguments[name])
            for name, case in all_cases.items()
        }

    if mesh is None:
        return run(arguments)
    with jax.set_mesh(mesh):
        return run(arguments)


def assert_expected(got, n, dtype, rtol):
    for name, (value, gradients) in got.items():
        want_value, want_gradients = expected(n, dtype)[name]
        assert abs(value - want_value) <= rtol * abs(want_value), (name, value, want_value)
        for i, (gradient, want) in enumerate(zip(gradients, want_gradients, strict=True)):
            error = np.linalg.norm(np.asarray(gradient, np.float64) - want)
            assert error <= rtol * np.linalg.norm(want), (name, i, error, np.linalg.norm(want))


# mesh, rows, largest tile, most bytes to gather. 56 rows are 28, 14 and 7 on 2, 4 and 8 devices.
FORMS = {
    "one device, one tile": (None, 56, 1024, None),
    "one device, even tiles": (None, 56, 7, None),
    "one device, ragged tiles": (None, 53, 5, None),
    "2 devices": ((2, 1, 1), 56, 1024, None),
    "4 devices, even tiles": ((1, 4, 1), 56, 7, None),
    "8 devices, ragged tiles": ((4, 2, 1), 56, 5, None),
    "8 devices, 2 of them tensor parallel": ((2, 2, 2), 56, 1024, None),
    "2 devices, ring": ((1, 2, 1), 56, 7, 0),
    "4 devices, ring, ragged tiles": ((2, 2, 1), 56, 5, 0),
    "8 devices, ring": ((1, 8, 1), 56, 1024, 0),
}


@pytest.fixture
def form(request, monkeypatch):
    shape, n, tile, limit = FORMS[request.param]
    monkeypatch.setattr(sharded, "TILE", dict.fromkeys(sharded.TILE, tile))
    if limit is not None:
        monkeypatch.setattr(sharded, "GATHER_LIMIT", limit)
    return None if shape is None else make_mesh(shape), n


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_float32_equals_float64(form):
    mesh, n = form
    assert_expected(evaluate(cases(n), jnp.float32, mesh), n, jnp.float32, 1e-5)


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_bfloat16_equals_float64(form):
    """dL before its products, and the gradients, are rounded once more, by 2^-9; sums amplify it."""
    mesh, n = form
    got = evaluate(cases(n, jnp.bfloat16), jnp.bfloat16, mesh)
    assert all(value.dtype == jnp.float32 for value, _ in got.values())
    for name, (value, gradients) in got.items():
        want_value, want_gradients = expected(n, jnp.bfloat16)[name]
        # Products and sums are float32, so the value is as exact as that of float32 inputs.
        assert abs(value - want_value) <= 1e-5 * abs(want_value), (name, value, want_value)
        for i, (gradient, want) in enumerate(zip(gradients, want_gradients, strict=True)):
            error = np.linalg.norm(np.asarray(gradient, np.float64) - want)
            assert error <= 2**-6 * np.linalg.norm(want), (name, i, error, np.linalg.norm(want))


def value_and_gradients(fn, args):
    args = [jnp.asarray(x, jnp.float32) for x in args]
    return jax.jit(jax.value_and_grad(fn, argnums=tuple(range(len(args)))))(*args)


def test_batch_must_divide():
    a, b = map(jnp.asarray, rows(0, n=12))
    message = r"batch 12 .* 8 data shards .* use 8 or 16"
    with jax.set_mesh(make_mesh((4, 2, 1))), pytest.raises(ValueError, match=message):
        losses.clip_softmax(a, b, 1.0)


A, B = map(jnp.asarray, rows(0))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda: losses.clip_softmax(A, B[:-1], 1.0), "got 16 and 15 rows"),
        (lambda: losses.nt_xent(A, B[:-1], temperature=1.0), r"views must be alike.*\[16, 6\], \[15, 6\]"),
        (lambda: losses.nt_xent(A, temperature=1.0), "at least two, got 1"),
        (lambda: losses.decoupled(A[:1], B[:1], temperature=1.0), "at least two images"),
        (lambda: losses.info_nce(A[None], B[None], 1.0), r"\[rows, dim\], got shape \[1, 16, 6\]"),
        (lambda: losses.info_nce(A, B[:, :5], 1.0), "widths 6 and 5"),
        (lambda: losses.info_nce(A, B, 1.0, B[:, :5]), "widths 6 and 5"),
        (lambda: losses.clip_softmax(A, B, 1.0, ids=jnp.zeros(15, int)), "ids must have one entry per row: 16 rows"),
        (lambda: losses.clip_softmax(A, B, 1.0, mask=jnp.ones(15, bool)), "mask must have one entry per row: 16 rows"),
        (lambda: losses.clip_softmax(A, B, 1.0, ids=jnp.zeros(16, int), margin=0.1), "ids or a margin"),
        (lambda: losses.debiased(A, B, temperature=1.0, prior=1.0), r"prior .* got 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        loss()


def test_inside_a_manual_region_the_local_rows_are_the_batch():
    """Under someone else's shard_map the losses must not gather again."""
    spec = PartitionSpec(BATCH)

    def local(a, b):
        return losses.info_nce(a, b, 1.0)[None]

    with jax.set_mesh(make_mesh((4, 2, 1))):
        got = jax.jit(jax.shard_map(local, in_specs=(spec, spec), out_specs=spec))(A, B)
    want = [losses.info_nce(A[i : i + 2], B[i : i + 2], 1.0) for i in range(0, 16, 2)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_many_losses_at_once():
    """vmap over pairs of batches and their scales, as over seeds."""
    a, b, scale = jnp.stack([A, B]), jnp.stack([B, A[::-1]]), jnp.array([3.0, 14.0])
    grad = jax.value_and_grad(losses.clip_softmax, argnums=(0, 1, 2))
    got = jax.jit(jax.vmap(grad))(a, b, scale)
    for i in range(2):
        want = grad(a[i], b[i], scale[i])
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=2e-5, atol=1e-7), got, want)


def test_length_of_embeddings_does_not_matter():
    got = losses.nt_xent(5 * A, 0.1 * B, temperature=0.2)
    np.testing.assert_allclose(got, losses.nt_xent(A, B, temperature=0.2), rtol=1e-6)


def test_a_mixed_pair_is_computed_in_float32():
    """An image tower in bfloat16 and a text tower in float32: no side is rounded down."""
    a = A.astype(jnp.bfloat16)
    value, gradients = jax.value_and_grad(losses.clip_softmax, argnums=(0, 1))(a, B, 14.3)
    np.testing.assert_allclose(value, losses.clip_softmax(a.astype(jnp.float32), B, 14.3), rtol=1e-6)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]


SOFTMAX = ["nt_xent", "info_nce", "clip_softmax", "queue", "sup_con", "clip_softmax_ids", "debiased"]


@pytest.mark.parametrize("name", [*SOFTMAX, "sigmoid", "distillation"])
def test_identical_rows_and_scale_100(name):
    """The collapsed batch: all logits are equal, so a softmax loss is the logarithm of their number."""
    n = 16
    case = cases(n)[name]
    sharp = {"clip_softmax": 100.0, "clip_softmax_ids": 100.0, "sigmoid": 100.0, "distillation": 100.0}.get(name, 0.01)
    arrays = [np.ones_like(x) for x in case.arguments if np.ndim(x)]
    rest = [x for x in case.arguments if not np.ndim(x)][1:]
    value, gradients = value_and_gradients(lambda *x: case.ours(*x, *case.teachers), (*arrays, sharp, *rest))
    assert all(np.isfinite(g).all() for g in gradients)
    known = {"nt_xent": 31, "info_nce": 16, "clip_softmax": 16, "clip_softmax_ids": 16, "queue": n + 8, "sup_con": 15}
    if name in known:
        np.testing.assert_allclose(value, np.log(known[name]), rtol=1e-5)
    elif name != "distillation":
        np.testing.assert_allclose(
            value, loss64.value_and_gradients(case.reference, (*arrays, sharp, *rest))[0], rtol=1e-4
        )


@pytest.mark.parametrize("name", ["clip_softmax", "nt_xent", "info_nce", "sup_con", "sigmoid"])
def test_scale_100_against_float64(name):
    """Rounding of a float32 cosine is 1e-7, of its logit 1e-5: gradients to 1e-4, as dense float32."""
    case = cases(32)[name]
    position = next(i for i, x in enumerate(case.arguments) if not np.ndim(x))
    arguments = list(case.arguments)
    arguments[position] = 100.0 if name in ("clip_softmax", "sigmoid") else 0.01
    got = value_and_gradients(case.ours, arguments)
    want = loss64.value_and_gradients(case.reference, arguments)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for gradient, reference in zip(got[1], want[1], strict=True):
        assert np.linalg.norm(gradient - reference) <= 1e-4 * np.linalg.norm(reference)


def test_a_loss_near_zero_keeps_its_digits():
    """Pairs almost equal: the loss is no difference of two large logits."""
    rng = np.random.default_rng(0)
    a = np.linalg.qr(rng.normal(size=(16, 16)))[0].astype(np.float32)[:, :12]
    b = a + 0.01 * rng.normal(size=a.shape).astype(np.float32)
    value, gradients = value_and_gradients(losses.clip_softmax, (a, b, 15.0))
    want, reference = loss64.value_and_gradients(loss64.clip_softmax, (a, b, 15.0))
    assert 0 < want < 1e-4
    np.testing.assert_allclose(value, want, rtol=1e-4)
    for gradient, exact in zip(gradients, reference, strict=True):
        assert np.linalg.norm(gradient - exact) <= 1e-4 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "loss", [lambda a, b: losses.nt_xent(a, b, temperature=0.2), losses.info_nce, losses.clip_softmax]
)
def test_one_pair_has_no_negatives(loss):
    arguments = (A[:1], B[:1]) if loss not in (losses.info_nce, losses.clip_softmax) else (A[:1], B[:1], 0.2)
    value, gradients = value_and_gradients(loss, arguments)
    assert value == 0
    assert all((np.abs(g) < 1e-6).all() for g in gradients)


def test_nothing_left_by_the_mask():
    """A batch without a single valid row costs nothing and teaches nothing."""
    none = jnp.zeros(16, bool)
    for loss in (
        lambda a, b: losses.nt_xent(a, b, temperature=0.1, mask=none),
        lambda a, b: losses.clip_softmax(a, b, 10.0, mask=none),
        lambda a, b: losses.sigmoid(a, b, 10.0, -10.0, mask=none),
        lambda a, b: losses.sup_con(a, jnp.zeros(16, int), 0.1, mask=none) + 0 * b.sum(),
        lambda a, b: losses.similarity_distillation(a, b, b, a, mask=none),
    ):
        value, gradients = value_and_gradients(loss, (A, B))
        assert value == 0
        assert all((g == 0).all() for g in gradients)


def test_sharp_confusion_is_exact():
    """At scale 100 a wrong pair in the lead costs 100 times its lead: no overflow, no saturation."""
    image = jnp.eye(4)
    text = image[jnp.array([1, 0, 2, 3])]
    np.testing.assert_allclose(losses.clip_softmax(image, text, 100.0), 50.0, rtol=1e-6)
    want = loss64.value_and_gradients(loss64.sigmoid, (image, text, 100.0, 0.0))[0]
    np.testing.assert_allclose(losses.sigmoid(image, text, 100.0, 0.0), want, rtol=1e-6)


def test_relations_between_the_losses():
    """CLIP's loss is InfoNCE in both directions; NT-Xent is SupCon of pairs, and the debiased loss without a prior."""
    both = (losses.info_nce(A, B, 0.05) + losses.info_nce(B, A, 0.05)) / 2
    np.testing.assert_allclose(losses.clip_softmax(A, B, 20.0), both, rtol=1e-6)
    simclr = losses.nt_xent(A, B, temperature=0.1)
    pairs = losses.sup_con(jnp.concatenate([A, B]), jnp.tile(jnp.arange(16), 2), 0.1)
    np.testing.assert_allclose(pairs, simclr, rtol=1e-5)
    np.testing.assert_allclose(losses.debiased(A, B, temperature=0.1, prior=0.0), simclr, rtol=1e-5)


def test_a_teacher_that_agrees_costs_nothing():
    assert abs(losses.similarity_distillation(A, B, A, B, scale=5.0, teacher_scale=5.0)) < 1e-6


def test_l2_normalize():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [3e-8, 4e-8]])
    np.testing.assert_allclose(losses.l2_normalize(x), [[0.6, 0.8], [0, 0], [0.03, 0.04]], rtol=1e-6)
    jacobian = jax.jacrev(losses.l2_normalize)(x[1])
    np.testing.assert_allclose(jacobian, 1e6 * np.eye(2), rtol=1e-5)
    assert losses.l2_normalize(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_annotations_hold():
    """The jaxtyping annotations accept what the losses take and refuse embeddings of different widths."""
    for call in (
        lambda loss: loss(losses.nt_xent)(A, B, temperature=0.1, mask=jnp.ones(16, bool), weights=jnp.ones(16)),
        lambda loss: loss(losses.decoupled)(A, B, temperature=0.1, sigma=0.5),
        lambda loss: loss(losses.debiased)(A, B, temperature=jnp.float32(0.1)),
        lambda loss: loss(losses.sup_con)(A, jnp.zeros(16, int), 0.1),
        lambda loss: loss(losses.info_nce)(A, B, 0.1, jnp.asarray(rows(1, 20)[0])),
        lambda loss: loss(losses.clip_softmax)(A, B, 10.0, ids=jnp.zeros(16, int)),
        lambda loss: loss(losses.sigmoid)(A, B, 10.0, jnp.float32(-10.0)),
        lambda loss: loss(losses.similarity_distillation)(A, B, *map(jnp.asarray, rows(1, d=3))),
    ):
        assert np.isfinite(call(lambda loss: jaxtyped(loss, typechecker=beartype)))
    with pytest.raises(TypeCheckError):
        jaxtyped(losses.clip_softmax, typechecker=beartype)(A, B[:, :-1], 1.0)
