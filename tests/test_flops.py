"""FLOPs by hand: layers, scans, attention, convolutions, per-device code, and the CLIP of the paper."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from ssljax.flops import matmul_flops
from ssljax.mesh import Mesh
from ssljax.models import TextTransformer, ViT


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_dense_layer_and_its_gradient():
    dense = lambda x, w: jnp.sum(jnp.tanh(x @ w))  # noqa: E731
    assert matmul_flops(dense, f32(7, 5), f32(5, 3)) == 2 * 7 * 5 * 3
    assert matmul_flops(jax.grad(dense, (0, 1)), f32(7, 5), f32(5, 3)) == 3 * 2 * 7 * 5 * 3
    assert matmul_flops(dense, f32(7, 5), f32(5, 3), passes=lambda equation: 6) == 6 * 2 * 7 * 5 * 3


@pytest.mark.parametrize(("remat", "times"), [(False, 3), (True, 4)])
def test_a_scanned_mlp(remat, times):
    def loss(x, weights):
        def layer(x, w):
            return jnp.sin(x @ w), None

        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)[0].sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    assert matmul_flops(gradient, f32(8, 16), f32(12, 16, 16)) == times * 12 * 2 * 8 * 16 * 16


def test_loops_and_branches():
    square = lambda _, x: x @ x  # noqa: E731
    fixed = lambda x: jax.lax.while_loop(lambda s: s[0] < 7, lambda s: (s[0] + 1, s[1] @ s[1]), (2, x))  # noqa: E731
    unknown = lambda x, n: jax.lax.fori_loop(0, n, square, x)  # noqa: E731
    branch = lambda x, p: jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x, x)  # noqa: E731
    one = 2 * 3**3
    assert matmul_flops(lambda x: jax.lax.fori_loop(0, 5, square, x), f32(3, 3)) == 5 * one
    assert matmul_flops(fixed, f32(3, 3)) == 5 * one
    assert matmul_flops(unknown, f32(3, 3), jax.ShapeDtypeStruct((), jnp.int32)) == one
    assert matmul_flops(branch, f32(3, 3), jax.ShapeDtypeStruct((), jnp.bool)) == 2 * one


def test_attention_forward_and_backward():
    b, n, heads, d = 2, 10, 3, 4
    attend = lambda q, k, v: jax.nn.dot_product_attention(q, k, v).sum()  # noqa: E731
    forward = 2 * (2 * b * heads * n * n * d)
    assert matmul_flops(attend, *[f32(b, n, heads, d)] * 3) == forward
    assert matmul_flops(jax.grad(attend, (0, 1, 2)), *[f32(b, n, heads, d)] * 3) == 3 * forward


def test_convolutions():
    def conv(x, w, stride=1, padding="VALID", groups=1):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=dims, feature_group_count=groups
        )

    x, w = f32(2, 9, 9, 4), f32(3, 3, 4, 6)
    forward = 2 * 2 * 7 * 7 * 9 * 4 * 6
    assert matmul_flops(conv, x, w) == forward
    assert matmul_flops(lambda x, w: conv(x, w, groups=2), x, f32(3, 3, 2, 6)) == forward / 2
    # "SAME": 9 outputs a side, of which the outer two each miss one of three taps.
    assert matmul_flops(lambda x, w: conv(x, w, padding="SAME"), x, w) == 2 * 2 * (9 * 3 - 2) ** 2 * 4 * 6
    # Strided: 4 outputs a side. Both gradients make exactly the products of the forward pass, transposed.
    strided = lambda x, w: conv(x, w, stride=2)  # noqa: E731
    gradients = jax.grad(lambda x, w: jnp.sin(strided(x, w)).sum(), (0, 1))
    assert matmul_flops(strided, x, w) == 2 * 2 * 4 * 4 * 9 * 4 * 6
    assert matmul_flops(gradients, x, w) == 3 * matmul_flops(strided, x, w)


def test_shard_map_counts_every_device():
    mesh = Mesh(replica=4, fsdp=2).create()

    def per_device(x, w):
        return jax.lax.psum(x @ w, "fsdp")  # rows over replica; each device multiplies with all of its w

    specs = PartitionSpec("replica", "fsdp"), PartitionSpec("fsdp")
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(per_device, in_specs=specs, out_specs=PartitionSpec("replica"))
        assert matmul_flops(mapped, f32(8, 6), f32(6, 5)) == 2 * 8 * 6 * 5


def transformer(rows: int, n: int, width: int, depth: int) -> int:
    """Forward: four projections and the MLP (12 width^2 a token), and the two products of attention."""
    return depth * 2 * rows * (12 * n * width**2 + 2 * n * n * width)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_paper_s_clip_vit_b32(remat):
    """Forward 1, backward 2, and under rematerialisation the blocks' forward once more, up to the MLP's last layer."""
    image = ViT(size="B", patch=32, pre_norm=True, projection=512, scan=True, remat=remat)
    text = TextTransformer(projection=512, scan=True, remat=remat)
    pixels, tokens = f32(3, 224, 224, 3), jax.ShapeDtypeStruct((3, 77), jnp.int32)
    params = jax.eval_shape(
        lambda x, t: (image.init(jax.random.key(0), x), text.init(jax.random.key(1), t)), pixels, tokens
    )

    def embed(params, pixels, tokens):
        return sum(f["features"].sum() for f in (image.apply(params[0], pixels), text.apply(params[1], tokens)))

    blocks = transformer(3, 50, 768, 12) + transformer(3, 77, 512, 12)
    patches, heads = 2 * 3 * 49 * (32 * 32 * 3) * 768, 2 * 3 * (768 + 512) * 512
    assert matmul_flops(embed, params, pixels, tokens) == blocks + patches + heads
    again = blocks - 12 * 2 * 3 * 4 * (50 * 768**2 + 77 * 512**2) if remat == "full" else 0
    gradient = matmul_flops(jax.grad(embed), params, pixels, tokens)
    assert gradient == 3 * blocks + again + 2 * patches + 3 * heads  # no gradient of the pixels
