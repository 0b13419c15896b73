"""`deterministic`: the same bits on 1, 2, 4 and 8 devices, of the same gradient."""

import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import clip, quick_compilation, simclr, simclr_config  # noqa: F401

from ssljax.config import ConfigError, experiment
from ssljax.methods import SimCLR
from ssljax.rules import leaf_name
from ssljax.run import Run
from ssljax.shards import in_shards
from ssljax.views import View, Views

VIT = "{'type': 'ViT', 'image_size': 8, 'patch': 4, 'width': 16, 'depth': 1, 'heads': 2}"
CLIP_VIT = "{'type': 'ViT', 'image_size': 16, 'patch': 8, 'width': 16, 'depth': 1, 'heads': 2, 'projection': 16}"
MARK = 99  # the label of a record that spoils its batch
BATCH = "batch_size=32"
CROP = View(8, flip=0.5)  # more than this compiles for seconds


@dataclass(frozen=True)
class Spoiled(SimCLR):
    """A marked record makes the loss NaN."""

    def loss(self, params, state, batch, ctx):
        loss, more = super().loss(params, state, batch, ctx)
        return loss * jnp.where(jnp.any(batch["label"] == MARK), jnp.nan, 1.0), more


@dataclass(frozen=True)
class Bright(SimCLR):
    """The loss looks at pictures itself."""

    def loss(self, params, state, batch, ctx):
        loss, more = super().loss(params, state, batch, ctx)
        return loss + batch["x1"].mean(), more


def with_views(e, **views):
    return replace(e, data=replace(e.data, views=Views(views)))


def of_class(method, e):
    return replace(e, method=method(e.method.encoder, e.method.projector))


def vit(*overrides):
    e = simclr(BATCH, f"method.encoder={VIT}", *overrides)
    return of_class(Spoiled, with_views(e, x1=e.data.views.views["x1"], x2=CROP))


def resnet(*overrides):
    return with_views(
        simclr(BATCH, "method.encoder.blocks=(1,)", "method.encoder.channels=(8,)", *overrides), x1=CROP, x2=CROP
    )


def towers(*overrides):
    return clip(BATCH, f"method.image={CLIP_VIT}", *overrides)


def initial(e):
    run = Run(e, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        return jax.device_get(run.init())


def bits(e, devices, state):
    """All that four steps leave: of each array its bytes, by name. The third batch holds a marked record."""
    run = Run(e, jax.devices()[:devices])
    with jax.set_mesh(run.mesh):
        state, step, batches = jax.device_put(state, run.state_shardings), run.compile_step(), run.batches(0)
        seen = []
        for i in range(4):
            rows = next(batches)
            if i == 2 and "label" in rows:
                rows["label"] = np.where(np.arange(len(rows["label"])) == 5, MARK, rows["label"])
            state, metrics, notes = step(state, run.place(rows))
            seen.append((metrics, notes))
        batches.close()
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get((state, seen)))
    # A NaN is a NaN: its sign, which says nothing, differs.
    whole = {leaf_name(path): np.where(np.isnan(x), np.nan, x).tobytes() for path, x in leaves}
    return whole, int(state.step), step.as_text()


@pytest.mark.parametrize(
    ("make", "overrides", "taken", "devices"),
    [(vit, ("micro_batches=2",), 3, (1, 8)), (resnet, (), 4, (1, 2, 4, 8)), (towers, (), 4, (1, 8))],
)
def test_same_bits_on_any_number_of_devices(make, overrides, taken, devices):
    """Parameters, optimiser, batch statistics, losses, gradient norms, embeddings. One step of the ViT is refused."""
    e = make("deterministic=16", *overrides)
    state = initial(e)
    found = [bits(e, n, state) for n in devices]
    first, steps, _ = found[0]
    assert steps == taken
    for others, _, program in found:
        assert [name for name in first if others[name] != first[name]] == []
        assert not re.search(r"= \(?(f|bf)\d+\S* all-reduce", program)


def gradient(e, devices, state):
    """Of the first batch, as `Run.step` takes it."""
    run = Run(e, jax.devices()[:devices])
    of = in_shards(run.gradient, e.deterministic) if e.deterministic else run.gradient
    with jax.set_mesh(run.mesh):
        batches = run.batches(0)
        _, found = jax.jit(of)(jax.device_put(state, run.state_shardings), run.place(next(batches)))
        batches.close()
    return jax.device_get(found)


def test_gradient_is_the_ordinary_one():
    """Up to rounding, of networks without batch normalisation. Ordinary ones differ with the devices."""
    plain = "method.projector.norm='none'", "method.projector.last_norm='none'"
    state = initial(vit(*plain))
    ordinary = gradient(vit(*plain), 1, state)
    for other in (gradient(vit(*plain), 8, state), gradient(vit("deterministic=16", *plain), 8, state)):
        error = optax.tree.norm(optax.tree.sub(other, ordinary))
        assert 0 < error <= 4e-6 * optax.tree.norm(ordinary)


def test_pictures_only_through_networks():
    run = Run(of_class(Bright, simclr(BATCH, "deterministic=4")), jax.devices()[:2])
    with (
        jax.set_mesh(run.mesh),
        pytest.raises(ValueError, match=r"deterministic: the loss depends on pictures in a way"),
    ):
        jax.eval_shape(run.step, run.state_shapes, run.batch_shapes)


@pytest.mark.parametrize(
    ("overrides", "devices", "message"),
    [
        (("mesh.fsdp=2", "deterministic=8"), 4, "deterministic=8 needs whole parameters .* set mesh.fsdp=1"),
        (("batch_size=48", "deterministic=16"), 3, r"needs 1, 2, 4, 8, \.\.\. devices, not 3"),
        (("deterministic=4",), 4, r"is for at most 2 device\(s\), .* for 4 set deterministic=8 or more"),
        (("batch_size=40", "deterministic=16"), 1, "40 is not divisible by the 16 logical shards; use 32 or 48"),
        (("deterministic=16", "micro_batches=4"), 1, "32 is not divisible by the 16 .* times 4 micro-batches; use 64"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, devices, message):
    with pytest.raises(ValueError, match=message):
        Run(simclr(BATCH, *overrides), jax.devices()[:devices])


@dataclass(frozen=True)
class OnePiece(SimCLR):
    supports_micro_batches = False


def test_refused_configs():
    with pytest.raises(ConfigError, match=r"deterministic must be 0 \(off\) or 2, 4, 8, .* not 6"):
        simclr("deterministic=6")
    config = simclr_config("deterministic=8").to_dict()
    config["method"] = config["method"] | {"type": OnePiece}
    with pytest.raises(ConfigError, match=r"deterministic=8: OnePiece encodes its batch in one piece"):
        experiment(config)
