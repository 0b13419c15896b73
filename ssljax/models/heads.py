"""Heads on top of an encoder's features: projectors, predictors and prototypes."""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Projector(nn.Module):
    """Multi-layer perceptron: dense, norm and activation for each hidden width, then a dense layer to `out_dim`.

    The defaults are SimCLR's published head but for `hidden`: (2048,) is v1's, (2048, 2048) v2's; its kernels start at
    `kernel_init_std=0.01`. A dense layer followed by a norm has no bias (the norm would cancel it). Predictors (BYOL,
    SimSiam) are Projectors too.
    """

    hidden: tuple[int, ...] = (2048,)
    out_dim: int = 128
    norm: Literal["batch", "none"] = "batch"  # after every hidden layer
    last_norm: Literal["none", "plain", "scale", "full"] = "scale"  # "full": scale and shift, "plain": neither
    last_bias: bool = False
    activation: Literal["relu", "gelu"] = "relu"
    kernel_init_std: float | None = None  # normal; None: 1 / sqrt(width of the input)
    norm_momentum: float = 0.9
    norm_eps: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"], train: bool = False) -> Float[Array, "*b out_dim"]:
        """Returns float32."""
        std = self.kernel_init_std
        kernel_init = nn.initializers.lecun_normal() if std is None else nn.initializers.normal(std)
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=kernel_init)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.norm_momentum,
            epsilon=self.norm_eps,
            dtype=self.dtype,
        )
        activation = {"relu": nn.relu, "gelu": partial(jax.nn.gelu, approximate=False)}[self.activation]
        for i, width in enumerate(self.hidden, start=1):
            x = dense(width, use_bias=self.norm == "none", name=f"fc{i}")(x)
            x = norm(name=f"norm{i}")(x) if self.norm == "batch" else x
            x = activation(x)
        last = len(self.hidden) + 1
        x = dense(self.out_dim, use_bias=self.last_bias, name=f"fc{last}")(x)
        if self.last_norm != "none":
            scale, shift = self.last_norm != "plain", self.last_norm == "full"
            x = norm(use_scale=scale, use_bias=shift, name=f"norm{last}")(x)
        return x.astype(jnp.float32)


class Prototypes(nn.Module):
    """Cosine of every feature to `count` prototypes: the last layer of DINO and SwAV.

    The columns of "kernel" [d, count] are normalised on the fly (weight normalisation with the gain fixed at 1), and so
    are the features.
    """

    count: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b count"]:
        """Returns float32."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.count))
        x, kernel = _unit(x, axis=-1).astype(self.dtype), _unit(kernel, axis=0).astype(self.dtype)
        return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _unit(x: Array, axis: int) -> Array:
    """`x` over its norm, in float32; zero stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis, keepdims=True), 1e-24))
