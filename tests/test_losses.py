"""Contrastive losses against float64 numpy: value and every gradient, dense and sharded over 2, 4 and 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import TypeCheckError, jaxtyped
from scipy.special import logsumexp

from ssljax import losses
from ssljax.losses.sharded import BATCH_AXES, over_batch_shards
from ssljax.mesh import BATCH

MESHES = [(2, 1, 1), (1, 4, 1), (1, 8, 1), (4, 2, 1), (2, 2, 2)]


def make_mesh(shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("replica", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


# The equations of the docstrings, once more, in float64 numpy.


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nt_xent64(a, b, temperature):
    z = unit(np.concatenate([a, b]))
    n = len(a)
    s = z @ z.T / temperature
    np.fill_diagonal(s, -np.inf)
    partner = np.r_[np.arange(n, 2 * n), np.arange(n)]
    return np.mean(logsumexp(s, axis=1) - s[np.arange(2 * n), partner])


def info_nce64(query, key, temperature):
    s = unit(query) @ unit(key).T / temperature
    return np.mean(logsumexp(s, axis=1) - np.diag(s))


def queue64(query, key, temperature, negatives):
    positive = np.sum(unit(query) * unit(key), axis=1, keepdims=True)
    s = np.concatenate([positive, unit(query) @ unit(negatives).T], axis=1) / temperature
    return np.mean(logsumexp(s, axis=1) - s[:, 0])


def clip64(image, text, scale):
    s = scale * unit(image) @ unit(text).T
    return np.mean(logsumexp(s, axis=1) + logsumexp(s, axis=0) - 2 * np.diag(s)) / 2


def sigmoid64(image, text, scale, bias):
    s = scale * unit(image) @ unit(text).T + bias
    z = 2 * np.eye(len(s)) - 1
    return np.sum(np.logaddexp(0, -z * s)) / len(s)


def rows(seed, n=16, d=6, noise=1.0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, d)).astype(np.float32)
    return a, (a + noise * rng.normal(size=(n, d))).astype(np.float32)


A, B = rows(0)
QUEUE = rows(1, n=24)[0]
CASES = {
    "nt_xent": (losses.nt_xent, nt_xent64, (A, B, 0.2)),
    "info_nce": (losses.info_nce, info_nce64, (A, B, 0.1)),
    "queue": (losses.info_nce, queue64, (A, B, 0.07, QUEUE)),
    "clip_softmax": (losses.clip_softmax, clip64, (A, B, 14.3)),
    "sigmoid": (losses.sigmoid, sigmoid64, (A, B, 10.0, -2.7)),
}


def numeric_gradient(fn, args, position, h=1e-5):
    """Central differences in float64, one coordinate at a time."""
    args = [np.array(x, np.float64) for x in args]
    gradient = np.zeros_like(args[position])
    for i in np.ndindex(gradient.shape):
        up, down = args[position].copy(), args[position].copy()
        up[i] += h
        down[i] -= h
        values = [fn(*args[:position], x, *args[position + 1 :]) for x in (up, down)]
        gradient[i] = (values[0] - values[1]) / (2 * h)
    return gradient


@pytest.fixture(scope="module")
def expected():
    """Value and gradients of every case in float64."""
    return {
        name: (reference(*args), [numeric_gradient(reference, args, i) for i in range(len(args))])
        for name, (_, reference, args) in CASES.items()
    }


def assert_same(value, gradients, expected):
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for got, want in zip(gradients, expected[1], strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def value_and_gradients(fn, args):
    args = [jnp.asarray(x, jnp.float32) for x in args]
    return jax.jit(jax.value_and_grad(fn, argnums=tuple(range(len(args)))))(*args)


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
def test_value_and_gradients_equal_float64(shape, expected):
    """Dense without a mesh; under a mesh with the rows spread over its devices. All cases in one compilation."""

    def all_losses(cases):
        return {
            name: jax.value_and_grad(fn, argnums=tuple(range(len(cases[name]))))(*cases[name])
            for name, (fn, _, _) in CASES.items()
        }

    cases = {name: [jnp.asarray(x, jnp.float32) for x in args] for name, (_, _, args) in CASES.items()}
    if shape is None:
        got = jax.jit(all_losses)(cases)
    else:
        mesh = make_mesh(shape)
        by_rows = NamedSharding(mesh, PartitionSpec(BATCH))
        with jax.set_mesh(mesh):
            placed = {name: [*jax.device_put(args[:2], by_rows), *args[2:]] for name, args in cases.items()}
            got = jax.jit(all_losses)(placed)
    for name, (value, gradients) in got.items():
        np.testing.assert_allclose(value, expected[name][0], rtol=1e-5, err_msg=name)
        for argument, (gradient, want) in enumerate(zip(gradients, expected[name][1], strict=True)):
            assert np.linalg.norm(gradient - want) <= 1e-5 * np.linalg.norm(want), (name, argument)


@pytest.mark.parametrize("name", CASES)
def test_no_device_holds_the_whole_table(name):
    """The compiled gradient on 8 devices has tables of [B/8, B] and nowhere one of [B, B]."""
    n, k = 64, 72
    fn, _, args = CASES[name]
    a, b = rows(2, n)
    args = [a, b, *args[2:]] if name != "queue" else [a, b, 0.1, rows(3, k)[0]]
    mesh = make_mesh((4, 2, 1))
    by_rows = NamedSharding(mesh, PartitionSpec(BATCH))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, by_rows) if i < 2 else jnp.asarray(x, jnp.float32) for i, x in enumerate(args)]
        text = jax.jit(jax.grad(fn, argnums=(0, 1))).lower(*placed).compile().as_text() or ""
    width = {"nt_xent": 2 * n, "queue": k + 1}.get(name, n)
    assert f"f32[{n // 8},{width}]" in text
    assert f"f32[{n},{width}]" not in text
    assert f"f32[{n},{n}]" not in text


def test_batch_axes_are_those_of_the_mesh():
    assert BATCH_AXES == BATCH


def test_batch_must_divide():
    a, b = rows(0, n=12)
    message = r"batch 12 .* 8 data shards .* use 8 or 16"
    with jax.set_mesh(make_mesh((4, 2, 1))), pytest.raises(ValueError, match=message):
        losses.nt_xent(jnp.asarray(a), jnp.asarray(b), 0.1)


def test_pairs_must_match():
    with pytest.raises(ValueError, match=r"\[16, 15\] rows"):
        losses.clip_softmax(jnp.asarray(A), jnp.asarray(B[:-1]), 1.0)


def test_inside_a_manual_region_the_local_rows_are_the_batch():
    """Under someone else's shard_map the losses must not gather again."""
    mesh = make_mesh((4, 2, 1))
    spec = PartitionSpec(BATCH)

    def local(a, b):
        return losses.info_nce(a, b, 1.0)[None]

    with jax.set_mesh(mesh):
        got = jax.jit(jax.shard_map(local, in_specs=(spec, spec), out_specs=spec))(A, B)
    want = [info_nce64(A[i : i + 2], B[i : i + 2], 1.0) for i in range(0, 16, 2)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_any_loss_of_rows_can_be_sharded():
    """`over_batch_shards` with a loss of one's own: the mean squared distance to all other rows."""

    def spread(rows, columns, index, weight):
        return weight * jnp.sum((rows[0][:, None] - columns[0][None]) ** 2, axis=(1, 2)) + 0.0 * index

    want = 3.0 * np.mean(np.sum((A[:, None].astype(np.float64) - A[None]) ** 2, axis=(1, 2)))
    for mesh in (make_mesh((1, 1, 1)), make_mesh((2, 2, 2))):
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(over_batch_shards(spread, (jnp.asarray(A),), 3.0), want, rtol=1e-5)


def test_length_of_embeddings_does_not_matter():
    got = losses.nt_xent(jnp.asarray(5 * A), jnp.asarray(0.1 * B), 0.2)
    np.testing.assert_allclose(got, nt_xent64(A, B, 0.2), rtol=1e-5)


def test_bfloat16_inputs_are_computed_in_float32():
    a, b = jnp.asarray(A, jnp.bfloat16), jnp.asarray(B, jnp.bfloat16)
    got = losses.clip_softmax(a, b, 14.3)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, clip64(a.astype(jnp.float32), b.astype(jnp.float32), 14.3), rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_identical_rows_and_scale_100(name):
    """The collapsed batch: all logits are equal, so a softmax loss is the logarithm of their number."""
    fn, reference, args = CASES[name]
    same = np.ones((16, 6), np.float32)
    sharp = 100.0 if name in ("clip_softmax", "sigmoid") else 0.01
    args = (same, same, sharp, *(np.ones_like(x) if np.ndim(x) else x for x in args[3:]))
    value, gradients = value_and_gradients(fn, args)
    np.testing.assert_allclose(value, reference(*args), rtol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)
    if name == "nt_xent":
        np.testing.assert_allclose(value, np.log(31), rtol=1e-5)
    if name == "clip_softmax":
        np.testing.assert_allclose(value, np.log(16), rtol=1e-5)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip_softmax"])
def test_one_pair_has_no_negatives(name):
    fn, _, args = CASES[name]
    value, gradients = value_and_gradients(fn, (A[:1], B[:1], args[2]))
    assert value == 0
    assert all((np.abs(g) < 1e-6).all() for g in gradients)


def test_sharp_confusion_is_exact():
    """At scale 100 a wrong pair in the lead costs 100 times its lead: no overflow, no saturation."""
    image = np.eye(4, dtype=np.float32)
    text = image[[1, 0, 2, 3]]
    pair = jnp.asarray(image), jnp.asarray(text)
    np.testing.assert_allclose(losses.clip_softmax(*pair, 100.0), 50.0, rtol=1e-6)
    np.testing.assert_allclose(losses.sigmoid(*pair, 100.0, 0.0), sigmoid64(image, text, 100.0, 0.0), rtol=1e-6)


def test_temperature_and_scale_are_reciprocal():
    """CLIP's loss is InfoNCE in both directions."""
    a, b = jnp.asarray(A), jnp.asarray(B)
    both = (losses.info_nce(a, b, 0.05) + losses.info_nce(b, a, 0.05)) / 2
    np.testing.assert_allclose(losses.clip_softmax(a, b, 20.0), both, rtol=1e-6)


def test_l2_normalize():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [3e-8, 4e-8]])
    np.testing.assert_allclose(losses.l2_normalize(x), [[0.6, 0.8], [0, 0], [0.03, 0.04]], rtol=1e-6)
    jacobian = jax.jacrev(losses.l2_normalize)(x[1])
    np.testing.assert_allclose(jacobian, 1e6 * np.eye(2), rtol=1e-5)
    assert losses.l2_normalize(x.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("name", CASES)
def test_annotations_hold(name):
    """The jaxtyping annotations accept what the losses take and refuse embeddings of different widths."""
    fn, _, args = CASES[name]
    checked = jaxtyped(fn, typechecker=beartype)
    args = [jnp.asarray(x) if np.ndim(x) else x for x in args]
    assert np.isfinite(checked(*args))
    with pytest.raises(TypeCheckError):
        checked(args[0], args[1][:, :-1], *args[2:])
