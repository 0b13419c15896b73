"""Views against torchvision on the same parameters: on the device and on the host, live or from its frozen answers."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torchvision_views
from torchvision_views import FIXTURE, FULL, GRID, SIZE, photographs

from ssljax.bounded import read_npz
from ssljax.data.pixels import change_pixels
from ssljax.views import View, byol, moco_v2, multi_crop, ops, simclr

installed = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
CASES = [(operation, i) for operation, grid in GRID.items() for i in range(len(grid))]
MOST, MEAN = 2 / 255, 0.5 / 255


def ours(operation: str, images: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    """Of uint8 [b, h, w, 3]; float32 in [0, 1]."""
    x, many = jnp.asarray(images, jnp.float32) / 255, len(images)

    def rows(value):
        return jnp.full(many, value, jnp.float32)

    if operation == "resize_crop":
        boxes = jnp.broadcast_to(jnp.asarray(p["box"], jnp.float32), (many, 1, 4))
        return np.asarray(ops.resize_crop(jnp.asarray(images), boxes, p["size"], p["interpolation"])[:, 0])
    if operation == "blur":
        return np.asarray(ops.gaussian_blur(x, rows(p["sigma"]), p["radius"]))
    if operation in ("grayscale", "hflip", "solarize"):
        return np.asarray(getattr(ops, operation)(x, **p))
    return np.asarray(getattr(ops, f"adjust_{operation}")(x, *map(rows, p.values())))


def assert_close(found, expected, most: float = MOST, mean: float = MEAN):
    difference = np.abs(found - expected)
    assert difference.max() <= most
    assert difference.mean() <= mean


@pytest.mark.parametrize(("operation", "i"), CASES)
def test_every_operation_is_torchvisions(operation, i):
    """Its float32 kernels, so nothing is rounded on their side: far below the limit."""
    frozen = read_npz(FIXTURE)[f"{operation}/{i}"] / FULL
    found = ours(operation, photographs(*SIZE), GRID[operation][i])
    np.testing.assert_allclose(found, frozen, atol=3e-5)
    assert_close(found, frozen)


@installed
def test_the_frozen_answers_are_those_of_this_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision_views, "FIXTURE", tmp_path / "new.npz")
    torchvision_views.write()
    new, old = read_npz(tmp_path / "new.npz"), read_npz(FIXTURE)
    assert new.keys() == old.keys()
    for name in new:
        np.testing.assert_allclose(new[name] / FULL, old[name] / FULL, atol=2e-5)


@installed
@pytest.mark.parametrize(("operation", "i"), CASES)
def test_every_operation_is_torchvisions_on_uint8(operation, i):
    """As its users run it: on whole photographs of 8 bits. Its colour kernels cut off what lies behind the point, which
    is half a grey level on average; its bicubic resizing rounds and clips between the two directions, which is up to
    six levels from its own float32."""
    images = photographs(427, 640)
    p = GRID[operation][i]
    if operation == "resize_crop":
        p = p | {"box": tuple(26 * side for side in p["box"])}
    expected = [torchvision_views.answer(operation, image, p).astype(np.float64) / 255 for image in images]
    cut_off = 0.0 if operation in ("resize_crop", "blur", "solarize", "hflip") else 0.5 / 255
    most = 8 / 255 if p.get("interpolation") == "bicubic" else MOST
    assert_close(ours(operation, images, p), np.stack(expected), most, MEAN + cut_off)


RECIPES = {"simclr": simclr(64), "byol": byol(64), "moco_v2": moco_v2(64), "multi_crop": multi_crop(64, 32, 2)}


@installed
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("where", ["device", "host"])
def test_whole_recipes_are_torchvisions(recipe, where):
    """The same draws through torchvision's functions, one after the other."""
    for fields in RECIPES[recipe].values():
        view = View(**{**fields, "mean": (0.0,) * 3, "std": (1.0,) * 3})
        uniforms = np.random.default_rng(0).random((12, view.numbers), np.float32)
        images = np.concatenate([photographs(427, 640)[:, i : i + view.size, :: 640 // view.size] for i in range(6)])
        images = np.ascontiguousarray(images[:, : view.size, : view.size])
        changes = view.changes(uniforms)
        if where == "device":
            x = jnp.asarray(images, jnp.float32) / 255
            found = np.asarray(jax.jit(view.augment)(uniforms, x))
        else:
            each = map(type(changes)._make, zip(*changes, strict=True))
            finished = [change_pixels(image, do, view.blur_radius) for image, do in zip(images, each, strict=True)]
            found = np.stack(finished) / 255
        for row, image in enumerate(images):
            do = type(changes)._make(column[row] for column in changes)
            assert_close(found[row], in_torchvision(view, image.astype(np.float32) / 255, do))


def in_torchvision(view: View, x: np.ndarray, do: Any) -> np.ndarray:
    """What a view does to the pixels of one crop, float32 in [0, 1]."""

    def apply(operation, x, **parameters):
        return torchvision_views.answer(operation, x, parameters)

    adjust = {
        ops.BRIGHTNESS: lambda x: apply("brightness", x, factor=float(do.brightness)),
        ops.CONTRAST: lambda x: apply("contrast", x, factor=float(do.contrast)),
        ops.SATURATION: lambda x: apply("saturation", x, factor=float(do.saturation)),
        ops.HUE: lambda x: apply("hue", x, shift=float(do.hue)),
    }
    if do.flip:
        x = apply("hflip", x)
    for number in do.order if do.jitter else ():
        x = adjust[int(number)](x)
    if do.grayscale:
        x = apply("grayscale", x)
    if do.blur:
        x = apply("blur", x, sigma=float(do.sigma), radius=view.blur_radius)
    return apply("solarize", x, threshold=0.5) if do.solarize else x
