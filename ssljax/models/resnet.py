"""Residual networks (He et al., 2016), with the stride of a bottleneck on its 3x3 convolution ("v1.5")."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssljax.models.conv import Conv

BLOCKS = {
    8: (1, 1, 1),
    20: (3, 3, 3),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
EXPANSION = 4  # output channels of a bottleneck over its inner ones


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions (basic) or 1x1, 3x3, 1x1 (bottleneck), added to the shortcut."""

    channels: int
    stride: int
    bottleneck: bool
    zero_init: bool
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow f"]:
        out = self.channels * (EXPANSION if self.bottleneck else 1)
        layers = [(self.channels, 1, 1), (self.channels, 3, self.stride), (out, 1, 1)]
        if not self.bottleneck:
            layers = [(self.channels, 3, self.stride), (out, 3, 1)]
        y = x
        for i, (channels, kernel, stride) in enumerate(layers, start=1):
            last = i == len(layers)
            scale_init = nn.initializers.zeros if last and self.zero_init else nn.initializers.ones
            y = self.conv(channels, kernel, stride, name=f"conv{i}")(y)
            y = self.norm(scale_init=scale_init, name=f"norm{i}")(y)
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            x = self.norm(name="shortcut_norm")(self.conv(out, 1, self.stride, name="shortcut_conv")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet encoder. Batch statistics (collection "batch_stats") are those of the whole, global batch.

    Depths 18 to 152 have four stages of 64 to 512 channels; 8 and 20 are the three-stage networks of 16 to 64 channels
    for CIFAR (section 4.2 of the paper, with projection shortcuts). Other networks: give `blocks` (and `channels`).
    Convolutions pad both sides alike, as PyTorch's do, so published weights fit.
    """

    depth: int = 50  # at least 50: bottleneck blocks
    width: int = 1  # multiplies all channels
    stem: Literal["imagenet", "cifar"] = "imagenet"  # 7x7 stride 2 and max pooling, or 3x3 stride 1
    blocks: tuple[int, ...] | None = None  # per stage
    channels: tuple[int, ...] | None = None  # per stage, inside the blocks
    projection: int | None = None  # width of a last linear layer without bias, on the features only
    zero_init_residual: bool = True  # the last scale of every block starts at 0
    norm_momentum: float = 0.9
    norm_eps: float = 1e-5
    dtype: Any = None

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """(blocks, channels) of every stage."""
        blocks = self.blocks or BLOCKS.get(self.depth)
        if blocks is None:
            raise ValueError(f"no ResNet of depth {self.depth}: use one of {sorted(BLOCKS)} or give `blocks`")
        first = 16 if len(blocks) == 3 else 64
        channels = self.channels or tuple(first * 2**i for i in range(len(blocks)))
        if len(channels) != len(blocks):
            raise ValueError(f"ResNet: blocks {blocks} and channels {channels} must have one entry per stage each")
        return tuple((n, c * self.width) for n, c in zip(blocks, channels, strict=True))

    @property
    def bottleneck(self) -> bool:
        return self.depth >= 50

    @property
    def out_dim(self) -> int:
        """Width of the features."""
        return self.projection or self.stages[-1][1] * (EXPANSION if self.bottleneck else 1)

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], train: bool = False) -> dict[str, Array]:
        """Returns "patches" [b, h', w', c], the last map, and "features" float32 [b, out_dim], its average."""

        def conv(features: int, size: int, stride: int, name: str) -> nn.Module:
            pad = (size // 2, size // 2)
            kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al., 2015
            return Conv(features, (size, size), (stride, stride), (pad, pad), use_bias=False, dtype=self.dtype,
                        kernel_init=kernel_init, name=name)  # fmt: skip

        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.norm_momentum,
            epsilon=self.norm_eps,
            dtype=self.dtype,
        )
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = conv(self.stages[0][1], size, stride, name="stem_conv")(images)
        x = nn.relu(norm(name="stem_norm")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for i, (blocks, channels) in enumerate(self.stages):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x = ResidualBlock(channels, stride, self.bottleneck, self.zero_init_residual, conv, norm,
                                  name=f"stage{i}_block{j}")(x)  # fmt: skip
        features = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        if self.projection:
            init = nn.initializers.normal(x.shape[-1] ** -0.5)
            features = nn.Dense(self.projection, False, self.dtype, kernel_init=init, name="projection")(features)
            features = features.astype(jnp.float32)
        return {"features": features, "patches": x}
