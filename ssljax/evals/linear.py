"""Linear probing of frozen features: many learning rates at once, the best chosen on held-out training rows."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ssljax.evals.chunks import map_chunks, place
from ssljax.evals.classification import accuracies, check_labelled, label_rank

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
NESTEROV = optax.trace(decay=0.9, nesterov=True)

Heads = dict[str, Array]  # kernel [heads, d, classes] and bias [heads, classes]
State = tuple[Heads, optax.OptState]  # with their momentum


def linear_probe(
    train_x: Float[np.ndarray | Array, "n d"],
    train_y: Int[np.ndarray | Array, " n"],
    test_x: Float[np.ndarray | Array, "m d"],
    test_y: Int[np.ndarray | Array, " m"],
    *,
    classes: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 50,
    batch_size: int = 256,
    seed: int = 0,
    chunk: int = 1024,
) -> dict[str, float]:
    """Accuracy of a softmax layer trained on frozen features.

    Every feature is standardised by its mean and variance over the training set (the affine-free batch normalisation
    of MAE's probe: He et al., 2022, app. A.1), so one range of learning rates serves features of any scale. One
    zero-initialised head per learning rate is trained on the same batches: SGD with Nesterov momentum 0.9, cosine
    decay to zero, no weight decay. The head that does best on a tenth of the training rows, kept out of the training,
    is the one that is tested (as in DINOv2's sweep, but chosen without the test set).

    Returns `linear_top1`, from five classes on `linear_top5`, and `linear_lr`, the learning rate chosen.
    """
    check_labelled("linear probe, training set", train_x, train_y, classes)
    check_labelled("linear probe, test set", test_x, test_y, classes)
    if len(train_x) < 2:
        raise ValueError("linear probe: needs at least 2 training rows, one of them to choose the learning rate")
    train_x, train_y = np.asarray(jax.device_get(train_x)), np.asarray(jax.device_get(train_y))
    rng = np.random.default_rng(seed)
    held_out, fit = np.split(rng.permutation(len(train_x)), [max(1, len(train_x) // 10)])
    batch_size = min(batch_size, len(fit))
    steps = len(fit) // batch_size  # of an epoch; the rows left over differ from epoch to epoch

    x, y, rates = place((train_x, train_y.astype(np.int32), np.asarray(learning_rates, np.float32)))
    scaling = _scaling(x)
    heads = place(
        {
            "kernel": np.zeros((len(rates), x.shape[1], classes), np.float32),
            "bias": np.zeros((len(rates), classes), np.float32),
        }
    )
    momentum = jax.jit(NESTEROV.init)(heads)
    decay = (0.5 + 0.5 * np.cos(np.pi * np.arange(epochs * steps) / (epochs * steps))).astype(np.float32)
    for epoch in range(epochs):
        order = rng.permutation(fit)[: steps * batch_size].reshape(steps, batch_size)
        order = place(order.astype(np.int32), axis=1)
        factors = place(decay[epoch * steps : (epoch + 1) * steps])
        heads, momentum = _epoch(heads, momentum, x, y, scaling, rates, order, factors)

    ranks = partial(map_chunks, lambda x, y: _ranks(heads, scaling, x, y), chunk=chunk)
    best = int(np.argmax(np.mean(ranks(train_x[held_out], train_y[held_out]) == 0, axis=0)))
    return {**accuracies("linear", ranks(test_x, test_y)[:, best], classes), "linear_lr": float(learning_rates[best])}


@jax.jit
def _scaling(x: Float[Array, "n d"]) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Mean and 1 / standard deviation of each feature; one that (nearly) never varies is not blown up."""
    x = x.astype(jnp.float32)
    mean, variance = jnp.mean(x, axis=0), jnp.var(x, axis=0)
    return mean, jax.lax.rsqrt(variance + 1e-6 * jnp.mean(variance) + jnp.finfo(jnp.float32).tiny)


def _logits(heads: Heads, scaling: tuple[Array, Array], x: Float[Array, "b d"]) -> Float[Array, "b heads classes"]:
    x = (x.astype(jnp.float32) - scaling[0]) * scaling[1]
    return jnp.einsum("bd,hdc->bhc", x, heads["kernel"]) + heads["bias"]


@partial(jax.jit, donate_argnums=(0, 1))
def _epoch(
    heads: Heads,
    momentum: optax.OptState,
    x: Float[Array, "n d"],
    y: Int[Array, " n"],
    scaling: tuple[Array, Array],
    rates: Float[Array, " heads"],
    order: Int[Array, "steps b"],
    decay: Float[Array, " steps"],
) -> State:
    """One pass over the batches x[order], at learning rates `rates * decay`."""

    def loss(heads: Heads, rows: Int[Array, " b"]) -> Float[Array, ""]:
        logits = _logits(heads, scaling, x[rows])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows][:, None])
        return jnp.sum(jnp.mean(each, axis=0))  # heads share no parameter: the gradient of the sum is each one's own

    def step(carry: State, now: tuple[Array, Array]) -> tuple[State, None]:
        (heads, momentum), (rows, decay) = carry, now
        updates, momentum = NESTEROV.update(jax.grad(loss)(heads, rows), momentum)
        by_head = {"kernel": rates[:, None, None], "bias": rates[:, None]}
        return (jax.tree.map(lambda w, u, rate: w - decay * rate * u, heads, updates, by_head), momentum), None

    return jax.lax.scan(step, (heads, momentum), (order, decay))[0]


@jax.jit
def _ranks(heads: Heads, scaling: tuple[Array, Array], x: Array, y: Array) -> Int[Array, "b heads"]:
    logits = _logits(heads, scaling, x)
    return label_rank(logits, jnp.broadcast_to(y[:, None], logits.shape[:2]))
