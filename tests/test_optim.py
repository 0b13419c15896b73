import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax.optim import Optim, make_optimizer, parameter_rules

KEY = jax.random.key(0)
PARAMS = {
    "encoder": {
        "patch_embed": {"kernel": jnp.ones((4, 6))},
        "transformer": {
            "block_0": {"mlp": {"fc1": {"kernel": jax.random.normal(KEY, (6, 8)), "bias": jnp.ones(8)}}},
            "block_1": {"mlp": {"fc1": {"kernel": jax.random.normal(KEY, (6, 8)), "bias": jnp.ones(8)}}},
        },
    },
    "head": {"kernel": jax.random.normal(KEY, (8, 3)), "bias": jnp.ones(3)},
}
GRADS = jax.tree.map(lambda p: 0.1 * jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), PARAMS)


def step_twice(optim: Optim, steps=10, batch_size=256):
    optimizer = make_optimizer(optim, PARAMS, steps, batch_size)
    opt, params = optimizer.init(PARAMS), PARAMS
    for _ in range(2):
        updates, opt = optimizer.update(GRADS, opt, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    return params


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "lamb", "lion", "muon"])
def test_every_optimizer_descends(name):
    def loss(p):
        return sum(jnp.sum((leaf - 0.5) ** 2) for leaf in jax.tree.leaves(p))

    lr = {"lars": 0.3, "muon": 0.1}.get(name, 0.02)
    optimizer = make_optimizer(Optim(name=name, lr=lr, trust=0.1), PARAMS, 100, 256)

    def step(carry, _):
        params, opt = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = optimizer.update(grads, opt, params)
        return (jax.tree.map(lambda p, u: p + u, params, updates), opt), value

    _, values = jax.lax.scan(step, (PARAMS, optimizer.init(PARAMS)), None, length=100)
    assert values[-1] < 0.5 * values[0]


def test_lars_equals_the_written_step():
    """SimCLR's card: g += wd w; r = trust |w| / |g|; v = m v + lr r g; w -= v; biases neither decayed nor adapted."""
    got = step_twice(
        Optim(name="lars", lr=0.3, lr_rule="linear", weight_decay=1e-2, schedule="constant"), batch_size=512
    )

    def reference(w, g, adapt):
        w, g = np.asarray(w, np.float64), np.asarray(g, np.float64)
        v = 0
        for _ in range(2):
            d = g + 1e-2 * w if adapt else g
            r = 1e-3 * np.linalg.norm(w) / np.linalg.norm(d) if adapt else 1.0
            v = 0.9 * v + 0.6 * r * d
            w = w - v
        return w

    np.testing.assert_allclose(
        got["head"]["kernel"], reference(PARAMS["head"]["kernel"], GRADS["head"]["kernel"], True), rtol=1e-5
    )
    np.testing.assert_allclose(
        got["head"]["bias"], reference(PARAMS["head"]["bias"], GRADS["head"]["bias"], False), rtol=1e-5
    )


def test_adamw_decays_kernels_only():
    without, with_decay = step_twice(Optim(lr=0.1)), step_twice(Optim(lr=0.1, weight_decay=0.5))
    np.testing.assert_array_equal(without["head"]["bias"], with_decay["head"]["bias"])
    assert not np.allclose(without["head"]["kernel"], with_decay["head"]["kernel"])


def test_freeze_and_multipliers():
    got = step_twice(
        Optim(lr=0.1, schedule="constant", freeze=("^encoder/",), lr_multipliers=(("head/bias", 0.5), (".*", 1.0)))
    )
    full = step_twice(Optim(lr=0.1, schedule="constant"))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), got["encoder"], PARAMS["encoder"]))
    np.testing.assert_allclose(got["head"]["bias"] - 1, 0.5 * (full["head"]["bias"] - 1), rtol=1e-5)
    # Nothing is kept for frozen parameters.
    shapes = jax.eval_shape(make_optimizer(Optim(freeze=("^encoder/",)), PARAMS, 10, 256).init, PARAMS)
    assert sum(x.size for x in jax.tree.leaves(shapes)) < sum(x.size for x in jax.tree.leaves(PARAMS))
    with pytest.raises(ValueError, match="freezes every parameter"):
        make_optimizer(Optim(freeze=(".*",)), PARAMS, 10, 256)


def test_layer_decay_counts_from_the_top():
    m = parameter_rules(Optim(layer_decay=0.5), PARAMS).multiplier
    blocks = m["encoder"]["transformer"]
    assert m["head"]["kernel"] == 1.0
    assert blocks["block_1"]["mlp"]["fc1"]["kernel"] == 0.5
    assert blocks["block_0"]["mlp"]["fc1"]["kernel"] == 0.25
    assert m["encoder"]["patch_embed"]["kernel"] == 0.125


def test_layer_decay_of_scanned_blocks_is_the_same():
    stacked = {"encoder": {"transformer": {"blocks": {"mlp": {"fc1": {"kernel": jnp.ones((2, 6, 8))}}}}}}
    m = parameter_rules(Optim(layer_decay=0.5), stacked).multiplier
    np.testing.assert_allclose(m["encoder"]["transformer"]["blocks"]["mlp"]["fc1"]["kernel"].ravel(), [0.25, 0.5])


def test_schedules():
    lr = Optim(lr=1.0, warmup=10, lr_rule="linear", schedule="cosine").lr_schedule(110, 512)
    np.testing.assert_allclose([lr(0), lr(9), lr(10), lr(60), lr(110)], [0.2, 2.0, 2.0, 1.0, 0.0], atol=1e-6)
    assert Optim(lr=0.075, lr_rule="sqrt").peak_lr(4096) == pytest.approx(4.8)
    assert Optim(lr=0.3, lr_rule="linear").explain_lr(4096) == "peak learning rate 4.8 = 0.3 x 4096/256"
    rsqrt = Optim(lr=1.0, schedule="rsqrt", rsqrt_timescale=100).lr_schedule(1000, 1)
    np.testing.assert_allclose([rsqrt(0), rsqrt(300)], [1.0, 0.5], rtol=1e-6)
    decay = Optim(weight_decay=0.04, end_weight_decay=0.4).weight_decay_schedule(100)
    np.testing.assert_allclose([decay(0), decay(50), decay(100)], [0.04, 0.22, 0.4], rtol=1e-5)


def test_weight_decay_schedule_is_followed():
    optim = Optim(name="sgd", lr=1.0, momentum=0.0, schedule="constant", weight_decay=0.1, end_weight_decay=0.0)
    optimizer = make_optimizer(optim, PARAMS, 1, 256)
    opt, zero = optimizer.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
    first, opt = optimizer.update(zero, opt, PARAMS)
    second, _ = optimizer.update(zero, opt, PARAMS)
    np.testing.assert_allclose(first["head"]["kernel"], -0.1 * PARAMS["head"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(second["head"]["kernel"], 0.0, atol=1e-8)


def test_clip_bounds_the_global_norm():
    optimizer = make_optimizer(Optim(name="sgd", lr=1.0, momentum=0.0, schedule="constant", clip=0.25), PARAMS, 10, 256)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    assert np.sqrt(sum(float(jnp.sum(u**2)) for u in jax.tree.leaves(updates))) == pytest.approx(0.25, rel=1e-5)


def test_muon_makes_updates_orthogonal():
    optimizer = make_optimizer(Optim(name="muon", lr=1.0, schedule="constant", momentum=0.0), PARAMS, 10, 256)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    update = updates["encoder"]["transformer"]["block_0"]["mlp"]["fc1"]["kernel"]  # [6, 8]; the gradient has rank 2
    values = jnp.linalg.svd(update, compute_uv=False)
    assert values[0] / values[1] < 1.7
