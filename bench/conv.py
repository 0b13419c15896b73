"""What our convolution gains over XLA's own, forward and backward: `JAX_PLATFORMS=cpu python -m bench.conv`.

The two (and PyTorch's, where installed) run in turn; the table gives medians in ms and the ratios to ours.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from unittest.mock import patch

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssljax.models import ResNet, conv, resnet

# batch, side, channels in, channels out, kernel, stride
CONVOLUTIONS = [
    (64, 32, 64, 64, 3, 1),
    (64, 16, 128, 128, 3, 1),
    (64, 32, 64, 128, 3, 2),
    (16, 56, 64, 64, 3, 1),
    (16, 56, 256, 64, 1, 1),
    (16, 56, 256, 512, 1, 2),
    (16, 224, 3, 64, 7, 2),
    (128, 32, 16, 16, 3, 1),
]
Step = Callable[[], object]


def interleaved(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Median milliseconds of every step, run in turn after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def jitted(function: Callable, *args: object) -> Step:
    compiled = jax.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def torch_convolution(x: np.ndarray, kernel: np.ndarray, grad: np.ndarray, stride: int) -> Step | None:
    try:
        import torch
    except ImportError:
        return None
    side = [torch.from_numpy(a).to(memory_format=torch.channels_last) for a in (x.transpose(0, 3, 1, 2), kernel)]
    inputs = [a.requires_grad_() for a in side]
    upstream = torch.from_numpy(grad.transpose(0, 3, 1, 2))

    def step() -> object:
        y = torch.nn.functional.conv2d(*inputs, stride=stride, padding=kernel.shape[-1] // 2)
        return torch.autograd.grad(y, inputs, upstream)

    return step


def convolution(batch: int, side: int, channels: int, features: int, size: int, stride: int) -> dict[str, Step]:
    """Value and both gradients of one convolution."""
    rng = np.random.default_rng(0)
    padding = (size // 2, size // 2), (size // 2, size // 2)
    x = rng.normal(size=(batch, side, side, channels)).astype(np.float32)
    kernel = rng.normal(size=(size, size, channels, features)).astype(np.float32)
    out = (side - 1) // stride + 1
    grad = rng.normal(size=(batch, out, out, features)).astype(np.float32)

    def ours(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> object:
        y, vjp = jax.vjp(lambda x, kernel: conv(x, kernel, (stride, stride), padding), x, kernel)
        return y, vjp(grad)

    def xla(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> object:
        plain = partial(
            jax.lax.conv_general_dilated,
            window_strides=(stride, stride),
            padding=padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y, vjp = jax.vjp(plain, x, kernel)
        return y, vjp(grad)

    steps = {"ours": jitted(ours, x, kernel, grad), "xla": jitted(xla, x, kernel, grad)}
    theirs = torch_convolution(x, kernel.transpose(3, 2, 0, 1).copy(), grad, stride)
    return steps if theirs is None else {**steps, "torch": theirs}


def network(depth: int, batch: int) -> dict[str, Step]:
    """Value and gradient of a ResNet on 32 x 32 images."""
    images = np.random.default_rng(0).normal(size=(batch, 32, 32, 3)).astype(np.float32)
    model = ResNet(depth=depth, stem="cifar")
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def loss(params: dict, images: jax.Array) -> jax.Array:
        outputs, _ = model.apply({**variables, "params": params}, images, True, mutable=["batch_stats"])
        return jnp.mean(outputs["features"] ** 2)

    steps = {"ours": jitted(jax.value_and_grad(loss), variables["params"], images)}
    with patch.object(resnet, "Conv", nn.Conv):
        # a new function, or jit would return the program traced before
        xla = jax.value_and_grad(lambda params, images: loss(params, images))
        return {**steps, "xla": jitted(xla, variables["params"], images)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rows = {f"conv {b}x{s}x{s}x{c} -> {f}, {k}x{k}/{t}": partial(convolution, b, s, c, f, k, t)
            for b, s, c, f, k, t in CONVOLUTIONS}  # fmt: skip
    rows["ResNet-18 step, 32 x 32x32"] = partial(network, 18, 32)
    rows["ResNet-20 step, 64 x 32x32"] = partial(network, 20, 64)
    print(f"{jax.default_backend()}, forward + backward, median of {repeats}")
    print(f"{'':36}{'ours ms':>10}{'XLA ms':>10}{'torch ms':>10}{'XLA/ours':>10}{'torch/ours':>11}")
    for name, build in rows.items():
        times = interleaved(build(), repeats)
        ours, xla, torch = times["ours"], times["xla"], times.get("torch", float("nan"))
        print(f"{name:36}{ours:10.1f}{xla:10.1f}{torch:10.1f}{xla / ours:10.2f}{torch / ours:11.2f}", flush=True)


if __name__ == "__main__":
    main()
