"""Backbones and heads: published sizes, equal ways to run them, and what each option means."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax.models import Projector, Prototypes, ResNet, TextTransformer, Transformer, ViT
from ssljax.models.attention import axial_angles, resize_positions, rotate, sincos_positions

tiny_vit = partial(ViT, width=16, depth=1, heads=2, patch=4, image_size=16)
tiny_text = partial(TextTransformer, vocab_size=20, context_length=6, width=8, depth=1, heads=2)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def init(module, *args, **kwargs):
    """Parameters drawn wide, so that no test passes because a branch starts near zero."""
    variables = jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.3), leaf.dtype), variables)


@partial(jax.jit, static_argnums=0)
def run(module, variables, *args, **kwargs):
    return module.apply(variables, *args, **kwargs)


def count(module, *args):
    variables = jax.eval_shape(lambda key: module.init(key, *args), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def close(a, b, tolerance=1e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), a, b)


# ---- sizes


@pytest.mark.parametrize(
    ("depth", "published", "head"),  # torchvision's models, and their last layer
    [(18, 11_689_512, 513_000), (34, 21_797_672, 513_000), (50, 25_557_032, 2_049_000), (101, 44_549_160, 2_049_000),
     (152, 60_192_808, 2_049_000)],
)  # fmt: skip
def test_resnet_has_the_published_size(depth, published, head):
    model = ResNet(depth=depth)
    assert count(model, jnp.zeros((1, 64, 64, 3))) == published - head
    assert model.out_dim == head // 1000 - 1


def test_cifar_resnet_and_width():
    images = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(lambda: ResNet(depth=20, stem="cifar").init_with_output(jax.random.key(0), images)[0])
    assert (shapes["features"].shape, shapes["patches"].shape) == ((1, 64), (1, 8, 8, 64))
    # 269,722 with the paper's shortcuts without parameters; ours: 16 x 32 + 32 x 64 weights, 2 (32 + 64) of the norms
    assert count(ResNet(depth=20, stem="cifar"), images) == 269_722 - 650 + 2_560 + 192
    assert ResNet(depth=50, width=2).out_dim == 4096
    assert ResNet(blocks=(1, 1), channels=(8, 12), depth=10).out_dim == 12
    with pytest.raises(ValueError, match="no ResNet of depth 19"):
        _ = ResNet(depth=19).out_dim
    with pytest.raises(ValueError, match="one entry per stage"):
        _ = ResNet(depth=18, channels=(8, 12)).out_dim


def test_vit_and_clip_have_the_published_size():
    images = jnp.zeros((1, 224, 224, 3))
    assert count(ViT(size="B", patch=16), images) == 86_567_656 - 769_000  # less the classifier of 1,000
    assert count(ViT(size="L", patch=16), images) == 304_326_632 - 1_025_000
    clip = ViT(size="B", patch=32, projection=512, pre_norm=True, activation="quick_gelu", norm_eps=1e-5)
    vision, text = count(clip, images), count(TextTransformer(projection=512), jnp.zeros((1, 77), int))
    assert vision == 87_849_216
    assert vision + text + 1 == 151_277_313  # and the temperature
    scanned = replace(clip, scan=True, remat="dots")
    assert count(scanned, images) == vision


# ---- the stack


def test_scan_and_remat_change_nothing():
    plain = Transformer(depth=2, heads=2, layer_scale=0.1, activation="gelu_tanh")
    x = draw(2, 5, 8)
    mask = jnp.asarray([True, True, True, False, True])[None, None, None]
    angles = jnp.asarray(draw(1, 5, 2, seed=3))
    params = init(plain, x)["params"]
    stacked = {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), params["block_0"], params["block_1"])}
    assert jax.tree.structure(stacked) == jax.tree.structure(init(replace(plain, scan=True), x)["params"])

    def value_and_grads(module, params):
        def loss(params):
            return jnp.sum(module.apply({"params": params}, x, mask, angles) ** 2)

        return jax.jit(jax.value_and_grad(loss))(params)

    expected, expected_grads = value_and_grads(plain, params)
    value, grads = value_and_grads(replace(plain, remat="full"), params)
    close(value, expected)
    close(grads, expected_grads, 1e-4)
    value, grads = value_and_grads(replace(plain, scan=True, remat="dots"), stacked)
    close(value, expected)
    close(jax.tree.map(lambda leaf: leaf[1], grads["blocks"]), expected_grads["block_1"], 1e-4)
    scanned = run(replace(plain, scan=True), {"params": stacked}, x, mask, angles)
    close(scanned, run(plain, {"params": params}, x, mask, angles))


@pytest.mark.parametrize("scan", [False, True])
def test_drop_path_leaves_out_whole_branches_more_often_deeper(scan):
    """With blocks that add a constant to every state, the states count the branches that were kept."""
    stack = Transformer(depth=3, heads=1, drop_path=0.5, scan=scan)
    x = jnp.zeros((4000, 1, 2))
    params = jax.tree.map(jnp.zeros_like, init(stack, x))["params"]
    blocks = [params["blocks"]] if scan else [params[f"block_{i}"] for i in range(3)]
    for i, block in enumerate(blocks):
        gains = jnp.array([1.0, 10.0, 100.0]) if scan else 10.0**i
        block["mlp"]["fc2"]["bias"] = jnp.ones_like(block["mlp"]["fc2"]["bias"]) * (gains[:, None] if scan else gains)
    train = jax.jit(partial(stack.apply, train=True))
    out = np.asarray(train({"params": params}, x, rngs={"dropout": jax.random.key(0)}))[:, 0, 0]
    # rates 0, 1/4, 1/2: every example has 1, then 10 / 0.75 or nothing, then 100 / 0.5 or nothing
    second, third = np.mod(out - 1 + 1e-2, 200) > 5, out > 100
    expected = 1 + second * 10 / 0.75 + third * 100 / 0.5
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    assert abs(second.mean() - 0.75) < 0.03
    assert abs(third.mean() - 0.5) < 0.03
    np.testing.assert_allclose(run(stack, {"params": params}, x)[:, 0, 0], 111.0)  # not in evaluation


def test_bfloat16_computes_low_and_keeps_parameters_float32():
    images = draw(2, 16, 16, 3)
    cases = [
        (tiny_vit(dtype=jnp.bfloat16, pool="map", positions="rope", mask_token=True, registers=1), images),
        (tiny_text(dtype=jnp.bfloat16, projection=4), jnp.ones((2, 5), int)),
        (ResNet(depth=8, stem="cifar", dtype=jnp.bfloat16), images),
        (Projector(hidden=(8,), out_dim=4, dtype=jnp.bfloat16), draw(3, 5)),
        (Prototypes(7, dtype=jnp.bfloat16), draw(3, 5)),
    ]
    for module, inputs in cases:
        output, variables = jax.eval_shape(lambda m=module, i=inputs: m.init_with_output(jax.random.key(0), i))
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        low = [leaf.dtype for name, leaf in output.items() if name != "features"] if isinstance(output, dict) else []
        assert set(low) <= {jnp.dtype("bfloat16")}
        assert (output["features"] if isinstance(output, dict) else output).dtype == jnp.float32
    module = cases[0][0]
    params = init(module, images)
    exact = run(replace(module, dtype=None), params, images)["features"]
    rough = run(module, params, images)["features"]
    assert 0 < jnp.max(jnp.abs(rough - exact)) < 0.05 * jnp.max(jnp.abs(exact))


# ---- ViT


def test_vit_patches_are_in_reading_order():
    """Without positions, patches of equal pixels have equal states: only the one bright patch differs."""
    model = tiny_vit(positions="none", pool="mean", class_token=False, depth=1)
    images = np.zeros((1, 16, 24, 3), np.float32)
    images[0, 8:12, 4:8] = 1.0  # row 2, column 1 of the grid 4 x 6
    params = init(model, images)
    patches = run(model, params, images)["patches"]
    different = jnp.any(jnp.abs(patches[0] - patches[0, 0, 0]) > 1e-3, axis=-1)
    assert patches.shape == (1, 4, 6, 16)
    assert np.argwhere(different).tolist() == [[2, 1]]


@pytest.mark.parametrize("positions", ["learned", "sincos", "rope"])
def test_keeping_all_patches_in_another_order_changes_only_the_order(positions):
    model = tiny_vit(positions=positions, registers=2)
    images = draw(2, 16, 16, 3)
    params = init(model, images)
    order = np.stack([np.random.default_rng(i).permutation(16) for i in range(2)])
    everything = run(model, params, images)
    kept = run(model, params, images, keep=jnp.asarray(order))
    close(kept["features"], everything["features"], 1e-4)
    flat = np.asarray(everything["patches"]).reshape(2, 16, -1)
    close(kept["tokens"], np.take_along_axis(flat, order[..., None], axis=1), 1e-4)


def test_patches_left_out_or_masked_cannot_matter():
    model = tiny_vit(mask_token=True)
    images = draw(2, 16, 16, 3)
    params = init(model, images)
    order = np.stack([np.random.default_rng(i).permutation(16) for i in range(2)])
    patches = images.reshape(2, 4, 4, 4, 4, 3).copy()
    for row, hidden in enumerate(order[:, 8:]):
        patches[row, hidden // 4, :, hidden % 4] += 5.0
    changed = patches.reshape(images.shape)

    half = jnp.asarray(order[:, :8])
    kept = run(model, params, images, keep=half)
    assert kept["tokens"].shape == (2, 8, 16)
    close(run(model, params, changed, keep=half), kept, 1e-4)

    mask = jnp.zeros((2, 16), bool).at[jnp.arange(2)[:, None], order[:, 8:]].set(True)
    masked = run(model, params, images, mask=mask)
    close(run(model, params, changed, mask=mask), masked, 1e-4)
    assert jnp.max(jnp.abs(masked["features"] - kept["features"])) > 1e-2  # unlike those left out, they have a place
    both = run(model, params, images, keep=jnp.asarray(order), mask=mask)
    close(both["features"], masked["features"], 1e-4)


def test_learned_positions_are_interpolated():
    model = tiny_vit(image_size=16)
    images = draw(1, 24, 16, 3)
    params = init(model, images)
    assert params["params"]["positions"].shape == (17, 16)
    assert run(model, params, images)["patches"].shape == (1, 6, 4, 16)

    # the table of another grid is what a model of that size would have learned
    own = params["params"]["positions"]
    resized = jnp.concatenate([own[:1], resize_positions(own[1:], (4, 4), (6, 6))])
    large, square = tiny_vit(image_size=24), draw(1, 24, 24, 3)
    close(run(model, params, square), run(large, {"params": {**params["params"], "positions": resized}}, square))

    np.testing.assert_array_equal(resize_positions(own[1:], (4, 4), (4, 4)), own[1:])
    ramp = jnp.repeat(jnp.arange(4.0), 4)[:, None]  # linear in the row: so it stays where no edge is near
    inner = resize_positions(ramp, (4, 4), (8, 4)).reshape(8, 4)[3:5, 2]
    np.testing.assert_allclose(inner, [1.25, 1.75], atol=1e-6)


def test_fixed_positions_follow_their_formulas():
    table = sincos_positions((3, 5), 8)
    row, column, k = 2, 4, 1
    expected = [math.sin(column / 10000 ** (k / 2)), math.cos(column / 10000 ** (k / 2))]
    np.testing.assert_allclose([table[row * 5 + column, k], table[row * 5 + column, 2 + k]], expected, rtol=1e-6)
    np.testing.assert_allclose(table[row * 5 + column, 4], math.sin(row), rtol=1e-6)

    # rotary scores depend on differences of positions only, and halve nothing
    angles = axial_angles((4, 4), 8)
    query, key = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)

    def score(a, b):
        turned = [rotate(x, angles[None, i : i + 1]) for x, i in ((query, a), (key, b))]
        return jnp.sum(turned[0] * turned[1])

    np.testing.assert_allclose(score(0, 6), score(5, 11), rtol=1e-5)
    np.testing.assert_allclose(score(3, 3), jnp.sum(query * key), rtol=1e-5)
    assert abs(score(0, 6) - score(0, 9)) > 1e-3


def test_pools_and_their_errors():
    images = draw(2, 16, 16, 3)
    mean = tiny_vit(pool="mean")
    params = init(mean, images)
    outputs = run(mean, params, images)
    close(outputs["features"], outputs["patches"].mean(axis=(1, 2)))
    cls = run(tiny_vit(pool="cls"), params, images)
    close(cls["patches"], outputs["patches"])
    assert jnp.max(jnp.abs(cls["features"] - outputs["features"])) > 1e-2

    pooled = tiny_vit(pool="map", class_token=False, positions="none")
    params = init(pooled, images)
    shuffled = np.concatenate([images[:, 8:], images[:, :8]], axis=1)  # attention pooling is blind to order
    close(run(pooled, params, shuffled)["features"], run(pooled, params, images)["features"], 1e-4)

    for model, inputs, message in (
        (tiny_vit(class_token=False), images, "needs class_token"),
        (tiny_vit(), images[:, :14], "14 is not divisible by the patch size 4"),
        (tiny_vit(heads=3), images, "not divisible by 3 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda m=model, i=inputs: m.init(jax.random.key(0), i))
    with pytest.raises(ValueError, match="mask_token=True"):
        jax.eval_shape(lambda: tiny_vit().init(jax.random.key(0), images, mask=jnp.ones((2, 16), bool)))


# ---- text


def test_causal_text_does_not_look_ahead():
    model = tiny_text()
    tokens = jnp.asarray([[1, 4, 7, 19, 3, 2]])
    params = init(model, tokens)
    before, after = (run(model, params, t)["tokens"] for t in (tokens, tokens.at[0, 4].set(9)))
    close(before[:, :4], after[:, :4])
    assert jnp.max(jnp.abs(before[:, 4:] - after[:, 4:])) > 1e-2


def test_padding_is_invisible_to_the_bidirectional_form():
    model = tiny_text(causal=False, pool="mean")
    tokens = jnp.asarray([[5, 4, 7]])
    params = init(model, tokens)
    short, long = (run(model, params, t) for t in (tokens, jnp.pad(tokens, ((0, 0), (0, 3)))))
    close(short["features"], long["features"])
    close(short["tokens"], long["tokens"][:, :3])
    changed = run(model, params, tokens.at[0, 2].set(9))["tokens"]
    assert jnp.max(jnp.abs(changed[:, 0] - short["tokens"][:, 0])) > 1e-2  # it does look ahead
    assert jnp.all(jnp.isfinite(run(model, params, jnp.zeros((1, 4), int))["features"]))
    unmasked = run(replace(model, pad_id=None), params, jnp.pad(tokens, ((0, 0), (0, 3))))["features"]
    assert jnp.max(jnp.abs(unmasked - long["features"])) > 1e-3


def test_text_pools():
    tokens = jnp.asarray([[1, 19, 7, 0], [1, 4, 19, 0]])
    params = init(tiny_text(), tokens)
    states = run(tiny_text(), params, tokens)["tokens"]
    for pool, expected in (
        ("argmax", states[jnp.arange(2), jnp.array([1, 2])]),
        ("eos", states[jnp.arange(2), jnp.array([2, 2])]),
        ("last", states[:, -1]),
        ("cls", states[:, 0]),
        ("mean", states[:, :3].mean(axis=1)),
    ):
        rows = tokens.at[1, 2].set(7) if pool == "eos" else tokens
        outputs = run(tiny_text(pool=pool, eos_id=7), params, rows)
        if pool == "eos":
            expected = outputs["tokens"][:, 2]
        close(outputs["features"], expected)
    with pytest.raises(ValueError, match="needs eos_id"):
        run(tiny_text(pool="eos"), params, tokens)
    with pytest.raises(ValueError, match="7 tokens do not fit the context of 6"):
        run(tiny_text(), params, jnp.ones((1, 7), int))


def test_clip_initialisation():
    """[code of openai/CLIP] the deeper the stack, the smaller what each block adds."""
    params = jax.jit(tiny_text(width=128, depth=2, heads=2, projection=64).init)(
        jax.random.key(0), jnp.ones((1, 4), int)
    )
    params = params["params"]
    block = params["transformer"]["block_1"]
    for leaf, std in (
        (params["token_embed"]["embedding"], 0.02),
        (params["positions"], 0.01),
        (params["projection"]["kernel"], 128**-0.5),
        (block["attn"]["query"]["kernel"], 128**-0.5),
        (block["attn"]["out"]["kernel"], 128**-0.5 / 2),
        (block["mlp"]["fc1"]["kernel"], 256**-0.5),
        (block["mlp"]["fc2"]["kernel"], 128**-0.5 / 2),
    ):
        np.testing.assert_allclose(leaf.std(), std, rtol=0.1)


# ---- ResNet and heads


def test_resnet_statistics():
    model = ResNet(depth=10, blocks=(1, 1), channels=(4, 6), stem="cifar")
    images = draw(4, 8, 8, 3) + 2.0
    variables = jax.jit(model.init)(jax.random.key(0), images)
    outputs, updates = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, images)
    close(outputs["features"], outputs["patches"].mean(axis=(1, 2)))
    kernel = np.asarray(variables["params"]["stem_conv"]["kernel"])
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    stem = sum(padded[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3))
    close(updates["batch_stats"]["stem_norm"]["mean"], 0.1 * stem.mean(axis=(0, 1, 2)), 1e-4)
    close(updates["batch_stats"]["stem_norm"]["var"], 0.9 + 0.1 * stem.var(axis=(0, 1, 2)), 1e-4)
    for block in ("stage0_block0", "stage1_block0"):  # blocks start as their shortcut
        assert not variables["params"][block]["norm2"]["scale"].any()
    # in evaluation the batch does not matter
    swapped = run(model, variables, np.concatenate([images[:1], images[:3] * 2]))["features"]
    close(run(model, variables, images)["features"][:1], swapped[:1], 1e-4)


def test_projector_is_simclrs_head():
    head = Projector(hidden=(6,), out_dim=4, kernel_init_std=0.01)
    x = draw(32, 5)
    params = init(head, x)["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "fc1": {"kernel": (5, 6)},
        "norm1": {"scale": (6,), "bias": (6,)},
        "fc2": {"kernel": (6, 4)},
        "norm2": {"scale": (4,)},
    }
    variables = {**jax.jit(head.init)(jax.random.key(0), x), "params": params}
    out, _ = jax.jit(partial(head.apply, train=True, mutable=["batch_stats"]))(variables, x)

    def norm(h):
        return (h - h.mean(axis=0)) / np.sqrt(h.var(axis=0) + 1e-5)

    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    hidden = np.maximum(norm(x @ p["fc1"]["kernel"]) * p["norm1"]["scale"] + p["norm1"]["bias"], 0)
    close(out, norm(hidden @ p["fc2"]["kernel"]) * p["norm2"]["scale"], 1e-4)
    std = jax.jit(Projector(hidden=(256,), kernel_init_std=0.01).init)(jax.random.key(0), x)["params"]["fc2"][
        "kernel"
    ].std()
    np.testing.assert_allclose(std, 0.01, rtol=0.05)


def test_projector_without_norms_and_prototypes():
    head = Projector(hidden=(6,), out_dim=3, norm="none", last_norm="none", last_bias=True, activation="gelu")
    x = draw(2, 4, 5)
    params = init(head, x)
    p = params["params"]
    hidden = jax.nn.gelu(x @ p["fc1"]["kernel"] + p["fc1"]["bias"], approximate=False)
    close(head.apply(params, x), hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"])

    prototypes = Prototypes(7)
    params = init(prototypes, x)
    kernel = np.asarray(params["params"]["kernel"], np.float64)
    expected = (x / np.linalg.norm(x, axis=-1, keepdims=True)) @ (kernel / np.linalg.norm(kernel, axis=0))
    close(prototypes.apply(params, x), expected)
    grads = jax.grad(lambda x: prototypes.apply(params, x).sum())(jnp.zeros((1, 5)))
    assert jnp.all(jnp.isfinite(grads))
