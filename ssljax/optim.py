"""Optimisers from a config: optax chains, schedules, and rules over parameter names."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from ssljax.rules import assign, leaf_name, names

Rules = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Optim:
    """What to minimise with.

    The learning rate at step t is `lr * rule * shape(t) * multiplier(name)`, where `rule` scales with the batch
    (`lr_rule`), and shape(t) is a linear warm-up and then the schedule. Weight decay is decoupled for adamw, lamb,
    lion and muon (times the learning rate), and part of the gradient for sgd and lars, as in their papers.
    """

    name: Literal["adamw", "sgd", "lars", "lamb", "lion", "muon"] = "adamw"
    lr: float = 1e-3
    lr_rule: Literal["none", "linear", "sqrt"] = "none"  # lr as it stands, lr * B / 256, lr * sqrt(B)
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    warmup: int = 0  # steps
    end_lr: float = 0.0  # where cosine and linear end, as a share of the peak
    rsqrt_timescale: int = 10_000  # steps; rsqrt: sqrt(timescale / (timescale + t))
    weight_decay: float = 0.0
    end_weight_decay: float | None = None  # a cosine from weight_decay to this
    decay: Rules = ((r"kernel$", 1.0), (r".*", 0.0))  # which parameters decay (0 or 1); LARS also adapts just these
    lr_multipliers: Rules = ((r".*", 1.0),)
    freeze: tuple[str, ...] = ()  # patterns of parameters that stay as they are
    layer_decay: float | None = None  # multiplier layer_decay^(depth - layer) for the blocks of a transformer
    clip: float | None = None  # largest global gradient norm
    momentum: float = 0.9  # sgd, lars, muon
    nesterov: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    trust: float = 1e-3  # LARS' trust coefficient
    ema: float | None = None  # decay of a moving average of the parameters, used for evaluation

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate after warm-up for a global batch of `batch_size`."""
        return self.lr * {"none": 1.0, "linear": batch_size / 256, "sqrt": math.sqrt(batch_size)}[self.lr_rule]

    def explain_lr(self, batch_size: int) -> str:
        """The learning-rate rule in words, for the log."""
        rule = {"none": "", "linear": f" x {batch_size}/256", "sqrt": f" x sqrt({batch_size})"}[self.lr_rule]
        return f"peak learning rate {self.peak_lr(batch_size):.3g} = {self.lr:g}{rule}"

    def lr_schedule(self, steps: int, batch_size: int) -> optax.Schedule:
        """Learning rate as a function of the step."""
        peak, rest = self.peak_lr(batch_size), max(steps - self.warmup, 1)
        after: optax.Schedule
        match self.schedule:
            case "cosine":
                after = optax.cosine_decay_schedule(peak, rest, alpha=self.end_lr)
            case "linear":
                after = optax.linear_schedule(peak, peak * self.end_lr, rest)
            case "rsqrt":
                after = lambda t: peak * jnp.sqrt(self.rsqrt_timescale / (self.rsqrt_timescale + t))  # noqa: E731
            case "constant":
                after = optax.constant_schedule(peak)
        if not self.warmup:
            return after
        # The first step already moves: lr(t) = peak * (t + 1) / warmup.
        warmup = optax.linear_schedule(peak / self.warmup, peak, max(self.warmup - 1, 1))
        return optax.join_schedules([warmup, after], [self.warmup])

    def weight_decay_schedule(self, steps: int) -> optax.Schedule:
        """Weight decay as a function of the step."""
        start, end = self.weight_decay, self.end_weight_decay
        if end is None:
            return optax.constant_schedule(start)
        return lambda t: end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(t / steps, 1.0)))


@dataclass(frozen=True)
class ParameterRules:
    """The values of all name rules for one parameter tree."""

    decays: Any  # bool
    multiplier: Any  # float, or an array [depth, 1, ...] for scanned blocks under layer decay
    frozen: Any  # bool


def parameter_rules(optim: Optim, params: Any) -> ParameterRules:
    """Evaluates the name rules on a tree of parameters (or shapes); every parameter must be covered."""
    decays = jax.tree.map(bool, assign(params, optim.decay, "weight-decay"))
    multiplier = assign(params, optim.lr_multipliers, "learning-rate")
    if optim.layer_decay is not None:
        multiplier = jax.tree.map(lambda m, d: m * d, multiplier, _layer_decay(params, optim.layer_decay))
    frozen = assign(params, (*((pattern, True) for pattern in optim.freeze), (r".*", False)), "freeze")
    if all(jax.tree.leaves(frozen)):
        raise ValueError(f"freeze={optim.freeze} freezes every parameter; nothing is left to train")
    return ParameterRules(decays, multiplier, frozen)


def make_optimizer(optim: Optim, params: Any, steps: int, batch_size: int) -> optax.GradientTransformation:
    """The optax chain of a config for a tree of parameters (or shapes)."""
    rules = parameter_rules(optim, params)
    lr = optim.lr_schedule(steps, batch_size)
    decay = optax.add_decayed_weights(optim.weight_decay_schedule(steps), mask=rules.decays)
    multiply = optax.stateless(lambda updates, _: _multiply(updates, rules.multiplier))
    follow_lr = optax.scale_by_learning_rate(lr)
    match optim.name:
        case "adamw":
            chain = [
                optax.scale_by_adam(optim.b1, optim.b2, optim.eps, nesterov=optim.nesterov),
                decay,
                multiply,
                follow_lr,
            ]
        case "lion":
            chain = [optax.scale_by_lion(optim.b1, optim.b2), decay, multiply, follow_lr]
        case "lamb":
            chain = [
                optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
                decay,
                optax.scale_by_trust_ratio(),
                multiply,
                follow_lr,
            ]
        case "muon":
            # Its chain ends in scale(-learning_rate); ours follows, hence the sign.
            muon = contrib.muon(
                1.0,
                beta=optim.momentum,
                adam_b1=optim.b1,
                adam_b2=optim.b2,
                muon_weight_dimension_numbers=_muon_dimensions,
            )
            chain = [muon, optax.scale(-1.0), decay, multiply, follow_lr]
        case "sgd":
            chain = [decay, optax.trace(optim.momentum, optim.nesterov), multiply, follow_lr]
        case "lars":
            # The learning rate sits inside the momentum buffer (You et al. 2017, and SimCLR's code).
            adapt = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=optim.trust), rules.decays)
            chain = [decay, adapt, multiply, follow_lr, optax.trace(optim.momentum, optim.nesterov)]
    if optim.clip is not None:
        chain = [optax.clip_by_global_norm(optim.clip), *chain]
    optimizer = optax.chain(*chain)
    if any(jax.tree.leaves(rules.frozen)):
        labels = jax.tree.map(lambda frozen: "frozen" if frozen else "trained", rules.frozen)
        optimizer = optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
    return optimizer


def _multiply(updates: Any, multiplier: Any) -> Any:
    # Frozen parameters arrive as MaskedNode.
    masked = lambda u: isinstance(u, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda u, m: u if masked(u) else u * m, updates, multiplier, is_leaf=masked)


def _layer_decay(params: Any, rate: float) -> Any:
    """rate^(depth - layer): embeddings are layer 0, block i is layer i + 1, whatever follows is at full rate.

    (BEiT, Bao et al. 2021.) Each tower counts its own depth, a tower being whatever precedes the blocks in the name.
    """
    block = re.compile(r"^(.*?)block_(\d+)/")
    scanned = re.compile(r"^(.*?)blocks/")
    depth: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(path)
        if m := block.match(name):
            depth[m[1]] = max(depth.get(m[1], 0), int(m[2]) + 1)
        elif m := scanned.match(name):
            depth[m[1]] = leaf.shape[0]
    if not depth:
        raise ValueError("layer_decay needs transformer blocks named block_<i> or blocks; this model has none")

    def multiplier(name: str, leaf: Any) -> Any:
        if m := block.match(name):
            return rate ** (depth[m[1]] - int(m[2]))
        if m := scanned.match(name):
            layers = rate ** (depth[m[1]] - jnp.arange(depth[m[1]], dtype=jnp.float32))
            return layers.reshape(-1, *[1] * (len(leaf.shape) - 1))
        if re.search(r"(patch_embed|pos_embed|position|cls|registers|token_embed|mask_token)", name):
            tower = max((t for t in depth if name.startswith(t.removesuffix("transformer/"))), key=len, default=None)
            return 1.0 if tower is None else rate ** (depth[tower] + 1)
        return 1.0

    return jax.tree.map(multiplier, names(params), params)


def _muon_dimensions(params: Any) -> Any:
    """Which axes of each kernel are rows and columns of Muon's matrix; None (use Adam) for everything else."""
    dims = contrib.MuonDimensionNumbers

    def of(name: str, leaf: Any) -> Any:
        n = len(leaf.shape)
        if not name.endswith("kernel") or n < 2:
            return None
        if re.search(r"attn/(query|key|value)/", name):
            return dims((n - 3,), (n - 2, n - 1))
        if "attn/out/" in name:
            return dims((n - 3, n - 2), (n - 1,))
        if "blocks/" in name or n == 2:
            return dims((n - 2,), (n - 1,))
        return dims(tuple(range(n - 1)), (n - 1,))  # convolution

    return jax.tree.map(of, names(params), params)
