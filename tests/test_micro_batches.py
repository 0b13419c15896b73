"""`micro_batches`: encoding in parts gives the full batch's loss and gradient, in less memory."""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from small import clip, quick_compilation, simclr, simclr_config  # noqa: F401

from ssljax.config import ConfigError, experiment
from ssljax.mesh import global_batch
from ssljax.method import Context, forward, init_net
from ssljax.run import Run
from ssljax.train import train

VIT = "{'type': 'ViT', 'image_size': 8, 'patch': 4, 'width': 16, 'depth': 2, 'heads': 2}"
NO_NORM = "method.projector.norm='none'", "method.projector.last_norm='none'"
EXPERIMENTS = {  # without batch normalisation
    "simclr": lambda *more: simclr("batch_size=32", f"method.encoder={VIT}", *NO_NORM, *more),
    "clip": lambda *more: clip("batch_size=32", *more),
}


def loss_and_gradient(e, devices):
    """Of the first batch, at the initial parameters, as `Run.step` takes them."""
    run = Run(e, jax.devices()[:devices])

    def of(params, state, batch):
        ctx = Context(jax.random.key(1), state.step, jnp.float32(0), e.micro_batches)
        return e.method.loss(params, state.method, e.data.views(jax.random.key(0), batch), ctx)[0]

    with jax.set_mesh(run.mesh):
        batches, state = run.batches(0), run.init()
        batch = global_batch(next(batches), e.batch_size, run.mesh)
        batches.close()
        return jax.jit(jax.value_and_grad(of))(state.params, state, batch)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_gradient_of_the_full_batch(name, devices):
    whole_loss, whole = loss_and_gradient(EXPERIMENTS[name](), devices)
    for parts in (2, 8):
        loss, parted = loss_and_gradient(EXPERIMENTS[name](f"micro_batches={parts}"), devices)
        np.testing.assert_allclose(loss, whole_loss, rtol=1e-6)
        error = jax.tree.map(jnp.subtract, parted, whole)
        # SimCLR's network amplifies rounding: one device and four differ by 1.6e-6 as well.
        assert optax.tree.norm(error) <= {"clip": 1e-6, "simclr": 4e-6}[name] * optax.tree.norm(whole)


def test_less_memory():
    """Eight parts of a network whose activations dominate take less than half of the temporary memory."""
    wide = "method.image.depth=8", "batch_size=256"

    def temporary(*more):
        run = Run(clip(*wide, *more), jax.devices()[:1])
        with jax.set_mesh(run.mesh):
            return run.compile_step().memory_analysis().temp_size_in_bytes

    assert temporary("micro_batches=8") < 0.5 * temporary()


def test_rows_stay_on_their_devices():
    """Cutting into parts moves no rows between devices: the same kinds of communication as without."""
    kinds = []
    for parts in (1, 4):
        run = Run(EXPERIMENTS["clip"](f"micro_batches={parts}"), jax.devices()[:8])
        with jax.set_mesh(run.mesh):
            text = run.compile_step().as_text()
        kinds.append(set(re.findall(r" (all-to-all|collective-permute)(?:-start)?\(", text)))
    assert kinds[1] <= kinds[0]


class Dropped(nn.Module):
    """A layer with dropout and batch normalisation."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(3)(x))
        return {"features": nn.Dropout(0.5, deterministic=not train)(x)}


def test_statistics_keys_and_order():
    """Rows come back in their order, parts differ in dropout, running averages are means over parts."""
    module, x = Dropped(), jax.random.normal(jax.random.key(0), (12, 5))
    net = init_net(module, jax.random.key(1), x, train=True)
    parts, stats = forward(module, net["params"], net["stats"], x, key=jax.random.key(2), micro_batches=3)
    for c, key in enumerate(jax.random.split(jax.random.key(2), 3)):
        part, _ = forward(module, net["params"], net["stats"], x[c::3], key=key)
        np.testing.assert_allclose(parts["features"][c::3], part["features"], rtol=1e-5, atol=1e-6)
    means = [forward(module, net["params"], net["stats"], x[c::3], key=jax.random.key(3))[1] for c in range(3)]
    want = jax.tree.map(lambda *x: np.mean(x, axis=0), *means)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats, want)


def test_training_says_what_changes(tmp_path, capsys):
    """A network with batch normalisation trains, and the run says that it sees parts."""
    train(simclr("steps=2", "micro_batches=2", "checkpoint.every=0"), tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "encoding 2 micro-batches of 8, one loss over all 16 rows" in said
    assert "batch normalisation of the encoders sees 8 rows at a time" in said


@dataclass(frozen=True)
class OnePiece:
    """A method that does not know of micro-batches."""

    def init(self, key, batch):
        return {"w": jnp.ones(3)}, {}

    def loss(self, params, state, batch, ctx):
        return params["w"].sum(), (state, {})

    def update(self, params, state, ctx):
        return params, state

    def features(self, params, state, batch):
        return {}


def test_refused_where_it_would_do_nothing():
    config = simclr_config("micro_batches=2").to_dict()
    config["method"] = {"type": OnePiece}
    with pytest.raises(ConfigError, match=r"micro_batches=2: OnePiece encodes its batch in one piece"):
        experiment(config)


def test_parts_must_divide():
    e = simclr("micro_batches=3")
    with pytest.raises(
        ValueError, match=r"16 is not divisible by the 4 data shards .* times 3 micro-batches; use 12 or"
    ):
        Run(e, jax.devices()[:4])
