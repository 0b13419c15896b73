"""Multi-head attention, and the rotary and sine-cosine encodings of positions on a grid."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float

Initializer = Callable[..., Any]


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017), of `x` to itself or to `context`.

    Parameters: "query", "key", "value" (kernel [d, heads, head_dim]) and "out" (kernel [heads, head_dim, d]), so that
    splitting the heads over devices is a rule on one axis.
    """

    heads: int
    dtype: Any = None
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    out_init: Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m d"] | None = None,
        mask: Bool[Array, "b_or_1 heads_or_1 n_or_1 m"] | None = None,
        angles: Float[Array, "b_or_1 n half"] | None = None,
        causal: bool = False,
    ) -> Float[Array, "b n d"]:
        """`mask` is True where a query may look; `angles` (radians) rotate queries and keys, see `axial_angles`."""
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"attention: width {width} is not divisible by {self.heads} heads")
        context = x if context is None else context

        def project(name: str, inputs: Array) -> Array:
            shape = (self.heads, width // self.heads)
            return nn.DenseGeneral(shape, dtype=self.dtype, kernel_init=self.kernel_init, name=name)(inputs)

        query, key, value = project("query", x), project("key", context), project("value", context)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        y = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, kernel_init=self.out_init, name="out")(y)


def rotate(
    x: Float[Array, "b n heads head_dim"], angles: Float[Array, "b_or_1 n half"]
) -> Float[Array, "b n heads head_dim"]:
    """Turns the pairs (x[i], x[i + head_dim / 2]) by the angles, in float32 (RoFormer, Su et al., 2021, eq. 34)."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def axial_angles(grid: tuple[int, int], head_dim: int, base: float = 100.0) -> Float[np.ndarray, "n half"]:
    """Rotary angles of patches on a grid: half of them turn with the row and half with the column.

    Coordinates are patch centres in [-1, 1] whatever the size, as in DINOv3 (Siméoni et al., 2025): angle
    2 pi coordinate / base^(4 k / head_dim), for k < head_dim / 4.
    """
    if head_dim % 4:
        raise ValueError(f"rotary positions need a head width divisible by 4, got {head_dim}")
    periods = base ** (4 * np.arange(head_dim // 4) / head_dim)
    row, column = (2 * (np.arange(n) + 0.5) / n - 1 for n in grid)
    angles = [2 * np.pi * coordinate[:, None] / periods for coordinate in (row, column)]
    down, across = repeat(angles[0], "h k -> (h w) k", w=grid[1]), repeat(angles[1], "w k -> (h w) k", h=grid[0])
    return np.concatenate([down, across], axis=-1).astype(np.float32)


def resize_positions(
    table: Float[Array, "n width"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Array, "m width"]:
    """Learned positions of one grid for another: bicubic, without antialiasing, half-pixel centres.

    Keys' parameter is -0.5; PyTorch's interpolation uses -0.75, so results differ a little from its models'.
    """
    if grid == new_grid:
        return table
    table = rearrange(table, "(h w) d -> h w d", h=grid[0])
    table = jax.image.resize(table, (*new_grid, table.shape[-1]), "cubic", antialias=False)
    return rearrange(table, "h w d -> (h w) d")


def sincos_positions(grid: tuple[int, int], width: int) -> Float[np.ndarray, "n width"]:
    """Fixed 2-D table of MAE (He et al., 2022): [sin, cos] of the column, then of the row, over 10000^(4 k / width)."""
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, got {width}")
    frequency = 10000.0 ** (-4 * np.arange(width // 4) / width)
    rows, columns = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    phases = [rearrange(place, "h w -> (h w) 1") * frequency for place in (columns, rows)]
    return np.concatenate([wave(phase) for phase in phases for wave in (np.sin, np.cos)], axis=-1).astype(np.float32)
