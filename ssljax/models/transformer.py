"""Pre-norm transformer blocks and stacks of them, unrolled or scanned, with or without rematerialisation."""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from ssljax.axes import batch_axes, batch_shards
from ssljax.models.attention import Attention, Initializer

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
Init = Literal["xavier", "normal", "clip"]
Remat = Literal["none", "full", "dots"]

ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def kernel_inits(init: Init, width: int, depth: int) -> dict[str, Initializer]:
    """Initialisers of a block's kernels.

    "xavier" (uniform) is that of MAE and SigLIP, "normal" (0.02) that of DINO and BEiT, and "clip" that of CLIP, where
    the layers that write to the residual stream shrink with the depth of the stack.
    """
    if init == "xavier":
        return dict.fromkeys(("attn", "attn_out", "fc1", "fc2"), nn.initializers.xavier_uniform())
    if init == "normal":
        return dict.fromkeys(("attn", "attn_out", "fc1", "fc2"), nn.initializers.normal(0.02))
    residual = nn.initializers.normal(width**-0.5 * (2 * depth) ** -0.5)
    return {
        "attn": nn.initializers.normal(width**-0.5),
        "attn_out": residual,
        "fc1": nn.initializers.normal((2 * width) ** -0.5),
        "fc2": residual,
    }


def keep_rows(x: Float[Array, "b *rest"]) -> Float[Array, "b *rest"]:
    """`x`, its rows split over the batch axes of the context mesh, as those of the batch are.

    Said nowhere, the compiler may take the other way to multiply rows by parameters that are sharded over `fsdp`: to
    split the width of the activations like the parameters', and to add them up over the devices layer by layer. That
    moves tens of times as much as gathering the parameters does.
    """
    if not batch_axes() or len(x) % batch_shards():
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_axes(), *free))


class MLP(nn.Module):
    """Two dense layers ("fc1", "fc2") with an activation between."""

    hidden: int
    activation: Activation = "gelu"
    dtype: Any = None
    fc1_init: Initializer = nn.initializers.xavier_uniform()
    fc2_init: Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=self.fc1_init, name="fc1")(x)
        y = ACTIVATIONS[self.activation](y)
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=self.fc2_init, name="fc2")(y)


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    heads: int
    mlp_dim: int | None = None  # None: four times the width
    activation: Activation = "gelu"
    causal: bool = False
    layer_scale: float | None = None  # initial value of the gains on both branches (CaiT); None: no gains
    norm_eps: float = 1e-6
    kernel_init: Init = "xavier"
    depth: int = 1  # blocks in the stack, for `kernel_init`
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        drop_path: Float[Array, ""] | float | None = None,
        mask: Bool[Array, "b_or_1 heads_or_1 n_or_1 n"] | None = None,
        angles: Float[Array, "b_or_1 n half"] | None = None,
    ) -> Float[Array, "b n d"]:
        """`drop_path` is the chance that a branch of an example is left out (needs the rng "dropout"); None: never."""
        width = x.shape[-1]
        inits = kernel_inits(self.kernel_init, width, self.depth)

        def residual(x: Array, branch: Array, name: str) -> Array:
            if self.layer_scale is not None:
                gain = self.param(name, nn.initializers.constant(self.layer_scale), (width,))
                branch = branch * gain.astype(branch.dtype)
            if drop_path is not None:
                kept = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - drop_path, (x.shape[0], 1, 1))
                branch = jnp.where(kept, branch / jnp.asarray(1.0 - drop_path, branch.dtype), 0)
            return x + branch

        norm = partial(nn.LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        attn = Attention(self.heads, self.dtype, inits["attn"], inits["attn_out"], name="attn")
        mlp = MLP(self.mlp_dim or 4 * width, self.activation, self.dtype, inits["fc1"], inits["fc2"], name="mlp")
        y = attn(norm(name="norm1")(x), mask=mask, angles=angles, causal=self.causal)
        x = residual(x, y, "layer_scale1")
        return residual(x, mlp(norm(name="norm2")(x)), "layer_scale2")


class Transformer(nn.Module):
    """A stack of blocks: parameters "block_0", "block_1", ..., or, scanned, "blocks" with a leading axis `depth`.

    Scanning compiles one block however deep the stack is. Rematerialisation keeps only each block's input ("full"), or
    also the results of its matrix products with parameters ("dots"), for the backward pass.
    """

    depth: int
    heads: int
    mlp_dim: int | None = None
    activation: Activation = "gelu"
    causal: bool = False
    drop_path: float = 0.0  # of the last block; grows linearly from 0 (Huang et al., 2016)
    layer_scale: float | None = None
    norm_eps: float = 1e-6
    kernel_init: Init = "xavier"
    remat: Remat = "none"
    scan: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b_or_1 heads_or_1 n_or_1 n"] | None = None,
        angles: Float[Array, "b_or_1 n half"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b n d"]:
        block: Any = Block
        if self.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
            block = nn.remat(Block, policy=policy, prevent_cse=not self.scan)
        block = partial(
            block,
            heads=self.heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            causal=self.causal,
            layer_scale=self.layer_scale,
            norm_eps=self.norm_eps,
            kernel_init=self.kernel_init,
            depth=self.depth,
            dtype=self.dtype,
        )
        rates = jnp.linspace(0.0, self.drop_path, self.depth) if train and self.drop_path > 0 else None
        if not self.scan:
            for i in range(self.depth):
                x = keep_rows(block(name=f"block_{i}")(x, None if rates is None else rates[i], mask, angles))
            return x

        def body(block: Block, x: Array, *rest: Array | None) -> tuple[Array, None]:
            return keep_rows(block(keep_rows(x), *rest)), None

        scanned = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=self.depth,
        )
        return scanned(block(name="blocks"), x, rates, mask, angles)[0]
