"""Vision transformer (Dosovitskiy et al., 2021) as MAE, DINO, CLIP and SigLIP use it."""

from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from ssljax.models.attention import Attention, Initializer, axial_angles, resize_positions, sincos_positions
from ssljax.models.transformer import MLP, Activation, Init, Remat, Transformer


class Shape(NamedTuple):
    width: int
    depth: int
    heads: int
    mlp_dim: int


SIZES = {
    "Ti": Shape(192, 12, 3, 768),
    "S": Shape(384, 12, 6, 1536),
    "B": Shape(768, 12, 12, 3072),
    "L": Shape(1024, 24, 16, 4096),
    "H": Shape(1280, 32, 16, 5120),
    "g": Shape(1408, 40, 16, 6144),  # Zhai et al., 2022
    "g2": Shape(1536, 40, 24, 6144),  # DINOv2's width, depth and heads
}


class AttentionPool(nn.Module):
    """Pooling by one learned query (SigLIP's "MAP" head): y = attn(probe, x), then y + mlp(norm(y))."""

    heads: int
    mlp_dim: int
    activation: Activation = "gelu"
    norm_eps: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]))
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, x.shape[-1]))
        y = Attention(self.heads, self.dtype, name="attn")(probe, context=x)
        mlp = MLP(self.mlp_dim, self.activation, self.dtype, name="mlp")
        return (y + mlp(nn.LayerNorm(self.norm_eps, self.dtype, name="norm")(y)))[:, 0]


class ViT(nn.Module):
    """Encoder of images of any size divisible by `patch`.

    Learned positions belong to the grid of `image_size` and are interpolated for others (`resize_positions`);
    sine-cosine and rotary ones are computed for the grid at hand. Register tokens (Darcet et al., 2024) follow the
    class token and have no position.
    """

    size: Literal["Ti", "S", "B", "L", "H", "g", "g2"] = "B"
    patch: int = 16
    image_size: int = 224
    pool: Literal["cls", "mean", "map"] = "cls"
    class_token: bool = True
    registers: int = 0
    positions: Literal["learned", "sincos", "rope", "none"] = "learned"
    mask_token: bool = False
    projection: int | None = None  # width of a last linear layer without bias, on the features only (CLIP)
    pre_norm: bool = False  # CLIP: a norm before the blocks, and no bias in the patch embedding
    activation: Activation = "gelu"
    layer_scale: float | None = None
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    kernel_init: Init = "xavier"
    width: int | None = None  # this and the next three replace what `size` says
    depth: int | None = None
    heads: int | None = None
    mlp_dim: int | None = None  # None with a `width` of your own: four times the width
    remat: Remat = "none"
    scan: bool = False
    dtype: Any = None

    @property
    def shape(self) -> Shape:
        width, depth, heads, mlp_dim = SIZES[self.size]
        mlp_dim = mlp_dim if self.width is None else 4 * self.width
        return Shape(self.width or width, self.depth or depth, self.heads or heads, self.mlp_dim or mlp_dim)

    @property
    def out_dim(self) -> int:
        """Width of the features."""
        return self.projection or self.shape.width

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        train: bool = False,
        keep: Int[Array, "b n"] | None = None,
        mask: Bool[Array, "b patches"] | None = None,
    ) -> dict[str, Array]:
        """Encodes images, or only some of their patches (numbered row by row).

        `keep` holds the indices of the patches to encode, in the order of the result (MAE). `mask` is True for patches
        whose embedding the mask token replaces (SimMIM, iBOT).

        Returns "features" float32 [b, out_dim] and the normalised last states of the patches: "patches"
        [b, h / patch, w / patch, width], or "tokens" [b, n, width] with `keep`.
        """
        shape = self.shape
        self._check(images, mask)
        grid = images.shape[1] // self.patch, images.shape[2] // self.patch

        def kept(x: Array) -> Array:
            """Of an array [b or 1, patches, ...], the rows of the patches kept."""
            if keep is None:
                return x
            x = jnp.broadcast_to(x, (keep.shape[0], *x.shape[1:]))
            return jnp.take_along_axis(x, keep.reshape(*keep.shape, *(1,) * (x.ndim - 2)), axis=1)

        patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=self.patch, q=self.patch)
        embed_init = nn.initializers.xavier_uniform() if self.kernel_init == "xavier" else nn.initializers.normal(0.02)
        embed = nn.Dense(shape.width, not self.pre_norm, self.dtype, kernel_init=embed_init, name="patch_embed")
        x = embed(kept(patches))
        if self.mask_token:
            token = self.param("mask_token", nn.initializers.normal(0.02), (shape.width,)).astype(x.dtype)
            x = x if mask is None else jnp.where(kept(mask)[..., None], token, x)

        table_init = nn.initializers.normal(shape.width**-0.5 if self.kernel_init == "clip" else 0.02)
        table = self._position_table(grid, table_init)
        if table is not None:
            x = x + kept(table[None, int(self.class_token) :]).astype(x.dtype)
        prefix = []
        if self.class_token:
            token = self.param("class_token", table_init, (1, shape.width))
            prefix.append(token if table is None else token + table[:1])
        if self.registers:
            prefix.append(self.param("registers", nn.initializers.normal(0.02), (self.registers, shape.width)))
        start = sum(len(tokens) for tokens in prefix)
        if prefix:
            tokens = jnp.concatenate(prefix).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(tokens, (len(x), *tokens.shape)), x], axis=1)
        angles = None
        if self.positions == "rope":
            turns = kept(jnp.asarray(axial_angles(grid, shape.width // shape.heads))[None])
            angles = jnp.pad(turns, ((0, 0), (start, 0), (0, 0)))  # angle 0 leaves the prefix as it is

        norm = partial(nn.LayerNorm, self.norm_eps, self.dtype)
        x = norm(name="pre_norm")(x) if self.pre_norm else x
        x = Transformer(
            depth=shape.depth,
            heads=shape.heads,
            mlp_dim=shape.mlp_dim,
            activation=self.activation,
            drop_path=self.drop_path,
            layer_scale=self.layer_scale,
            norm_eps=self.norm_eps,
            kernel_init=self.kernel_init,
            remat=self.remat,
            scan=self.scan,
            dtype=self.dtype,
            name="transformer",
        )(x, angles=angles, train=train)
        x = norm(name="norm")(x)
        tokens = x[:, start:]
        features = self._pool(x, tokens)
        if self.projection:
            init = nn.initializers.normal(shape.width**-0.5)
            features = nn.Dense(self.projection, False, self.dtype, kernel_init=init, name="projection")(features)
        result = {"features": features.astype(jnp.float32)}
        if keep is None:
            return {**result, "patches": rearrange(tokens, "b (h w) d -> b h w d", h=grid[0])}
        return {**result, "tokens": tokens}

    def _position_table(self, grid: tuple[int, int], init: Initializer) -> Array | None:
        """[class_token + patches, width], the class token's first; None without absolute positions."""
        extra, width = int(self.class_token), self.shape.width
        if self.positions == "sincos":
            return jnp.pad(sincos_positions(grid, width), ((extra, 0), (0, 0)))
        if self.positions != "learned":
            return None
        side = self.image_size // self.patch
        table = self.param("positions", init, (extra + side**2, width))
        return jnp.concatenate([table[:extra], resize_positions(table[extra:], (side, side), grid)])

    def _pool(self, x: Array, tokens: Array) -> Array:
        if self.pool == "cls":
            return x[:, 0]
        if self.pool == "mean":
            return jnp.mean(tokens, axis=1, dtype=jnp.float32)
        shape = self.shape
        return AttentionPool(
            shape.heads, shape.mlp_dim, self.activation, self.norm_eps, self.dtype, name="attention_pool"
        )(x)

    def _check(self, images: Array, mask: Array | None) -> None:
        if self.pool == "cls" and not self.class_token:
            raise ValueError('ViT: pool="cls" needs class_token=True; without one use pool="mean" or "map"')
        if mask is not None and not self.mask_token:
            raise ValueError("ViT: a mask was given but there is no token to put in its place; set mask_token=True")
        for side in (self.image_size, *images.shape[1:3]):
            if side % self.patch:
                raise ValueError(f"ViT: image side {side} is not divisible by the patch size {self.patch}")
