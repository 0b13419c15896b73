"""The convolution against XLA's own and against float64."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssljax.models import Conv, conv
from ssljax.models.conv import PIECE


def lax_conv(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def loop_conv(x, kernel, strides, padding):
    """Float64 convolution and gradients of sum(y * upstream), straight from the definition."""
    (top, bottom), (left, right) = padding
    padded = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    kh, kw = kernel.shape[:2]
    h, w = (padded.shape[1] - kh) // strides[0] + 1, (padded.shape[2] - kw) // strides[1] + 1

    def window(i, j):
        return slice(None), slice(i * strides[0], i * strides[0] + kh), slice(j * strides[1], j * strides[1] + kw)

    y = np.zeros((len(x), h, w, kernel.shape[-1]))
    for i in range(h):
        for j in range(w):
            y[:, i, j] = np.einsum("bhwc,hwcf->bf", padded[window(i, j)], kernel.astype(np.float64))

    def backward(upstream):
        x_grad, kernel_grad = np.zeros_like(padded), np.zeros(kernel.shape)
        for i in range(h):
            for j in range(w):
                g = upstream[:, i, j].astype(np.float64)
                x_grad[window(i, j)] += np.einsum("bf,hwcf->bhwc", g, kernel)
                kernel_grad += np.einsum("bhwc,bf->hwcf", padded[window(i, j)], g)
        return x_grad[:, top : top + x.shape[1], left : left + x.shape[2]], kernel_grad

    return y, backward


def value_and_grads(function, x, kernel, upstream):
    def run(x, kernel, upstream):
        y, vjp = jax.vjp(function, x, kernel)
        return y, *vjp(upstream)

    return jax.jit(run)(x, kernel, upstream)


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def relative_error(actual, expected):
    return np.max(np.abs(np.asarray(actual, np.float64) - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("size", "channels", "padding"), [(1, 5, "SAME"), (3, 16, "SAME"), (3, 16, "symmetric"), (7, 3, "symmetric")]
)
def test_value_and_gradients_equal_float64(size, channels, stride, padding):
    x, kernel = draw(2, 11, 10, channels), draw(size, size, channels, 6, seed=1)
    strides = (stride, stride)
    explicit = ((size // 2, size // 2),) * 2
    if padding == "SAME":
        explicit = tuple(jax.lax.padtype_to_pads(x.shape[1:3], (size, size), strides, "SAME"))
    y, backward = loop_conv(x, kernel, strides, explicit)
    upstream = draw(*y.shape, seed=2)
    ours = partial(conv, strides=strides, padding="SAME" if padding == "SAME" else explicit)
    results = value_and_grads(ours, x, kernel, upstream)
    for result, expected in zip(results, (y, *backward(upstream)), strict=True):
        assert relative_error(result, expected) < 1e-5


@pytest.mark.parametrize("stride", [1, 2])
def test_pieces_of_the_batch_add_up(stride):
    x, kernel = draw(10, 60, 60, 16), draw(3, 3, 16, 32, seed=1)  # 5 lanes of 2 images, each in several bands of rows
    padding = ((1, 1), (1, 1))
    out = (60 - 1) // stride + 1
    upstream = draw(10, out, out, 32, seed=2)
    assert 5 * out * out * 9 * 16 > PIECE
    ours = value_and_grads(partial(conv, strides=(stride, stride), padding=padding), x, kernel, upstream)
    theirs = value_and_grads(partial(lax_conv, strides=(stride, stride), padding=padding), x, kernel, upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, np.asarray(b, np.float64)) < 1e-5


def test_bfloat16_gradients_have_its_precision_only():
    x, kernel = jnp.asarray(draw(4, 8, 8, 16), jnp.bfloat16), jnp.asarray(draw(3, 3, 16, 8, seed=1), jnp.bfloat16)
    y, backward = loop_conv(np.asarray(x), np.asarray(kernel), (2, 2), ((1, 1), (1, 1)))
    upstream = jnp.asarray(draw(*y.shape, seed=2), jnp.bfloat16)
    results = value_and_grads(partial(conv, strides=(2, 2), padding=((1, 1), (1, 1))), x, kernel, upstream)
    for result, expected in zip(results, (y, *backward(np.asarray(upstream))), strict=True):
        assert result.dtype == jnp.bfloat16
        assert relative_error(result, expected) < 2**-8


def test_groups_and_second_gradients():
    x, kernel = draw(2, 6, 6, 4), draw(3, 3, 2, 6, seed=1)
    ours = conv(x, kernel, groups=2)
    halves = [lax_conv(x[..., 2 * i : 2 * i + 2], kernel[..., 3 * i : 3 * i + 3], (1, 1), "SAME") for i in range(2)]
    np.testing.assert_allclose(ours, np.concatenate(halves, axis=-1), rtol=1e-5, atol=1e-5)

    kernel = draw(3, 3, 4, 3, seed=1)

    def penalty(function):
        """Norm of the input's gradient, as critics use it."""
        inner = jax.grad(lambda x, kernel: jnp.sum(jnp.tanh(function(x, kernel, (2, 2), "SAME"))))
        return jax.jit(jax.grad(lambda kernel: jnp.sum(inner(x, kernel) ** 2)))(kernel)

    np.testing.assert_allclose(penalty(conv), penalty(lax_conv), rtol=1e-4, atol=1e-5)


def test_sharded_batch_and_checkpoint_equal_one_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, kernel = draw(8, 12, 12, 16), draw(3, 3, 16, 8, seed=1)

    def loss(kernel, x):
        y = jax.checkpoint(lambda kernel, x: jnp.tanh(conv(x, kernel, (2, 2))))(kernel, x)
        return jnp.sum(y**2)

    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(kernel, x)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    replicated = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(replicated, sharded).compile()
    assert "all-gather" not in compiled.as_text()
    for a, b in zip(compiled(replicated, sharded), expected, strict=True):
        assert relative_error(a, np.asarray(b, np.float64)) < 1e-5


def test_other_platforms_get_xlas_convolutions():
    """The program for a GPU has three convolutions: value, input gradient, kernel gradient; and no matrix product."""

    def run(x, kernel):
        y, vjp = jax.vjp(conv, x, kernel)
        return vjp(y)

    x, kernel = jnp.zeros((2, 8, 8, 4)), jnp.zeros((1, 1, 4, 4))
    for platform, convolutions in (("cuda", 3), ("tpu", 3), ("cpu", 0)):
        text = jax.jit(run).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == convolutions
        assert ("stablehlo.dot_general" in text) == (platform == "cpu")


def test_module_equals_flax():
    x = draw(2, 7, 7, 4)
    for kwargs in (
        {"kernel_size": (3, 3), "strides": (2, 2), "padding": "SAME"},
        {"kernel_size": (3, 3), "padding": ((0, 1), (2, 0))},
        {"kernel_size": (1, 1), "padding": "VALID", "use_bias": False},
    ):
        theirs, ours = nn.Conv(6, **kwargs), Conv(6, **kwargs)
        variables = jax.jit(theirs.init)(jax.random.key(0), x)
        assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
            lambda leaf: leaf.shape, jax.eval_shape(ours.init, jax.random.key(0), x)
        )
        np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="groups must divide"):
        Conv(6, groups=4).init(jax.random.key(0), x)
