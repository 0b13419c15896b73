"""2-D convolution with gradients that are fast on CPU.

XLA:CPU may compute the gradients of a convolution many times slower than its value: the weight gradient is a
convolution whose window is the whole image, and the input gradient of a strided one convolves an image full of zeros.
On CPU both become matrix products, one for each tap of the kernel, on shifted views of the input. Other platforms keep
XLA's own convolutions. What this gains depends on machine, XLA and shape: `python -m bench.conv` prints it, and
`bench/results` has figures.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]
LANES = 8  # at most; parts of the batch that give one image each to a piece of the kernel's gradient
PIECE = 2**19  # numbers in the patches of one piece: 2 MiB, about a core's share of the caches


def _explicit_padding(padding: str | Padding, size: Pair, kernel: Pair, strides: Pair) -> Padding:
    """((top, bottom), (left, right)) for "SAME", "VALID" or explicit padding."""
    if isinstance(padding, str):
        (top, bottom), (left, right) = lax.padtype_to_pads(size, kernel, strides, padding)
    else:
        (top, bottom), (left, right) = padding
    return (top, bottom), (left, right)


def _lax_conv(x: Array, kernel: Array, strides: Pair, padding: Padding, groups: int = 1) -> Array:
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dimensions, feature_group_count=groups
    )


def _pad(x: Array, padding: Padding) -> Array:
    return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def _pointwise_by_matmul(x: Array, kernel: Array, strides: Pair, padding: Padding) -> Array:
    return _pad(x, padding)[:, :: strides[0], :: strides[1]] @ kernel[0, 0]


def _kernel_grad_by_matmul(x: Array, grad: Array, kernel: Array, strides: Pair, padding: Padding) -> Array:
    """dL/dK[i, j] = sum over pixels p of x[p strides + (i, j)]^T g[p], one product for all taps (i, j).

    Sums over pieces of the batch whose patches fit the cache: a few rows of one image of every lane. Lanes are equal
    parts of the batch, so where that is spread over devices each device has its share of every piece.
    """
    (kh, kw), (sh, sw), x = kernel.shape[:2], strides, _pad(x, padding)
    (batch, h, w, features), channels = grad.shape, x.shape[-1]
    patch = kh * kw * channels
    lanes = max(n for n in range(1, LANES + 1) if batch % n == 0)
    fitting = [rows for rows in range(1, h + 1) if h % rows == 0 and lanes * rows * w * patch <= PIECE]
    rows = max(fitting, default=1)
    x, grad = (a.reshape(lanes, batch // lanes, *a.shape[1:]) for a in (x, grad))

    def piece(total: Array, place: Array) -> tuple[Array, None]:
        image, top = place // (h // rows), place % (h // rows) * rows
        pixels = lax.dynamic_slice(
            x, (0, image, top * sh, 0, 0), (lanes, 1, (rows - 1) * sh + kh, x.shape[3], channels)
        )[:, 0]
        taps = [
            pixels[:, i : i + (rows - 1) * sh + 1 : sh, j : j + (w - 1) * sw + 1 : sw]
            for i in range(kh)
            for j in range(kw)
        ]
        patches = jnp.concatenate(taps, axis=-1).reshape(-1, patch)
        g = lax.dynamic_slice(grad, (0, image, top, 0, 0), (lanes, 1, rows, w, features)).reshape(-1, features)
        # g^T patches and not its transpose: XLA:CPU likes the wide matrix on the right, up to twice as much
        return total + jnp.matmul(g.T, patches, preferred_element_type=_sum_dtype(g)), None

    zeros = jnp.zeros_like(grad, _sum_dtype(grad), (features, patch))
    total, _ = lax.scan(piece, zeros, jnp.arange(batch // lanes * (h // rows)))
    return total.T.reshape(kernel.shape).astype(kernel.dtype)


def _input_grad_by_matmul(x: Array, grad: Array, kernel: Array, strides: Pair, padding: Padding) -> Array:
    """dL/dx[p + (i, j)] += g[p] K[i, j]^T: every tap's product is spread by the strides and added in its place."""
    _, h, w, _ = grad.shape
    (top, bottom), (left, right) = padding
    rows, columns = x.shape[1] + top + bottom, x.shape[2] + left + right
    zero, total = jnp.zeros((), _sum_dtype(grad)), 0.0
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            tap = jnp.matmul(grad, kernel[i, j].T, preferred_element_type=zero.dtype)
            after = rows - i - (h - 1) * strides[0] - 1, columns - j - (w - 1) * strides[1] - 1
            spread = (0, 0, 0), (i, after[0], strides[0] - 1), (j, after[1], strides[1] - 1), (0, 0, 0)
            total += lax.pad(tap, zero, spread)
    return jnp.asarray(total)[:, top : top + x.shape[1], left : left + x.shape[2]].astype(x.dtype)


def _sum_dtype(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: Array, kernel: Array, strides: Pair, padding: Padding) -> Array:
    default = partial(_lax_conv, strides=strides, padding=padding)
    if kernel.shape[:2] != (1, 1):
        return default(x, kernel)
    return lax.platform_dependent(
        x, kernel, cpu=partial(_pointwise_by_matmul, strides=strides, padding=padding), default=default
    )


def _conv_fwd(x: Array, kernel: Array, strides: Pair, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return _conv(x, kernel, strides, padding), (x, kernel)


def _conv_bwd(strides: Pair, padding: Padding, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    def by_lax(x: Array, kernel: Array, grad: Array) -> tuple[Array, Array]:
        return jax.vjp(partial(_lax_conv, strides=strides, padding=padding), x, kernel)[1](grad)

    def by_matmul(x: Array, kernel: Array, grad: Array) -> tuple[Array, Array]:
        # XLA:CPU does well at stride 1, where this gradient is a plain convolution, and for the few channels of images
        by_taps = kernel.shape[:2] == (1, 1) or (strides != (1, 1) and x.shape[-1] >= 16)
        x_grad = _input_grad_by_matmul(x, grad, kernel, strides, padding) if by_taps else by_lax(x, kernel, grad)[0]
        return x_grad, _kernel_grad_by_matmul(x, grad, kernel, strides, padding)

    return lax.platform_dependent(*saved, grad, cpu=by_matmul, default=by_lax)


_conv.defvjp(_conv_fwd, _conv_bwd)


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c_per_group f"],
    strides: Pair = (1, 1),
    padding: Literal["SAME", "VALID"] | Padding = "SAME",
    groups: int = 1,
) -> Float[Array, "b oh ow f"]:
    """Convolution (cross-correlation) of NHWC images; differentiable in reverse mode, as often as you like.

    Grouped convolutions use XLA's gradients on every platform.
    """
    h, w = x.shape[1:3]
    kh, kw = kernel.shape[:2]
    explicit = _explicit_padding(padding, (h, w), (kh, kw), strides)
    if groups > 1:
        return _lax_conv(x, kernel, strides, explicit, groups)
    return _conv(x, kernel, strides, explicit)


class Conv(nn.Module):
    """`nn.Conv` for NHWC images, with the same parameters ("kernel" [kh, kw, in / groups, out], "bias" [out])."""

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Literal["SAME", "VALID"] | tuple[tuple[int, int], tuple[int, int]] = "SAME"
    groups: int = 1
    use_bias: bool = True
    dtype: Any = None
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow f"]:
        channels = x.shape[-1]
        if channels % self.groups or self.features % self.groups:
            raise ValueError(
                f"{self.groups} groups must divide both the {channels} input channels and the {self.features} features"
            )
        shape: Sequence[int] = (*self.kernel_size, channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = conv(x, kernel, self.strides, self.padding, self.groups)
        return y if bias is None else y + bias
