"""Views against closed forms in float64, colorsys, OpenCV and Pillow; their randomness against what they promise."""

import colorsys
import itertools
from dataclasses import replace

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from ssljax.views import View, Views, byol, clip, evaluation, mae, moco_v2, multi_crop, ops, simclr

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
GRAY = np.array([0.2989, 0.587, 0.114])
resize_crop = jax.jit(ops.resize_crop, static_argnums=(2, 3))


def pictures(batch, height, width, channels=3):
    return RNG.integers(0, 256, (batch, height, width, channels)).astype(np.uint8)


def unit_pictures(batch, height, width):
    """Floats in [0, 1] with the cases hue is sensitive to: greys, black, white, two equal channels, pure colours."""
    x = RNG.random((batch, height, width, 3)).astype(np.float32)
    x[:, 0, :6] = [[0, 0, 0], [1, 1, 1], [0.3, 0.3, 0.3], [0.7, 0.7, 0.2], [1, 0, 0], [0.2, 0.9, 0.9]]
    return x


def make(recipe):
    return Views({name: View(**view) for name, view in recipe.items()})


def run(views, batch):
    return jax.jit(views)(KEY, batch)


def ref_brightness(x, factor):
    return np.clip(factor * x, 0, 1)


def ref_contrast(x, factor):
    return np.clip(factor * x + (1 - factor) * (x @ GRAY).mean(), 0, 1)


def ref_saturation(x, factor):
    return np.clip(factor * x + (1 - factor) * (x @ GRAY)[..., None], 0, 1)


def ref_hue(x, shift):
    def rotate(pixel):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((h + shift) % 1, s, v)

    return np.array([rotate(pixel) for pixel in x.reshape(-1, 3)]).reshape(x.shape)


REFERENCES = (ref_brightness, ref_contrast, ref_saturation, ref_hue)  # at ops.BRIGHTNESS, CONTRAST, SATURATION, HUE


def pillow_crop(image, box, size, interpolation):
    """Crop, then resize each channel in Pillow's float mode (antialiased); in [0, 1]."""
    top, left, height, width = (int(v) for v in box)
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    crop = image[top : top + height, left : left + width].astype(np.float32)
    channels = [Image.fromarray(crop[..., c]).resize((size, size), method) for c in range(image.shape[-1])]
    return np.clip(np.stack([np.asarray(channel) for channel in channels], -1) / 255, 0, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_crop_is_pillows_crop_then_resize(interpolation):
    images = pictures(2, 40, 53)
    boxes = np.array(  # shrunk, enlarged, one axis each, whole image, a single pixel
        [
            [[0, 0, 40, 53], [3, 5, 7, 9], [10, 1, 30, 12], [1, 2, 16, 16]],
            [[5, 6, 33, 47], [39, 52, 1, 1], [0, 40, 5, 13], [7, 0, 32, 32]],
        ],
        np.float32,
    )
    crops = resize_crop(images, boxes, 16, interpolation)
    expected = [
        [pillow_crop(image, box, 16, interpolation) for box in row] for image, row in zip(images, boxes, strict=True)
    ]
    np.testing.assert_allclose(crops, expected, atol=2e-6)


def test_resize_to_the_same_size_changes_nothing():
    images = pictures(2, 12, 12)
    whole = np.array([[[0, 0, 12, 12]]] * 2, np.float32)
    for interpolation in ("bilinear", "bicubic"):
        np.testing.assert_allclose(resize_crop(images, whole, 12, interpolation)[:, 0], images / 255, atol=1e-7)


def torchvision_box(rng, height, width, scale, ratio):
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1])))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    raise AssertionError("the sizes of this test leave room for a box")


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"), [(64, 64, (0.08, 1.0), (3 / 4, 4 / 3)), (48, 80, (0.05, 0.4), (0.5, 1.0))]
)
def test_random_boxes_are_distributed_as_torchvisions(height, width, scale, ratio):
    n = 10_000
    boxes = np.asarray(ops.random_boxes(jax.random.uniform(KEY, (n, 22)), height, width, scale, ratio), np.float64)
    assert (boxes == np.round(boxes)).all()
    top, left, h, w = boxes.T
    assert top.min() == left.min() == 0  # inside the image, and its borders are reached
    assert (top + h).max() == height
    assert (left + w).max() == width
    half = 0.5 + 1e-3  # sides are rounded to pixels
    assert ((h + half) * (w + half) >= scale[0] * height * width).all()
    assert ((h - half) * (w - half) <= scale[1] * height * width).all()
    assert ((w + half) / (h - half) >= ratio[0]).all()
    assert ((w - half) / (h + half) <= ratio[1]).all()

    expected = np.array([torchvision_box(RNG, height, width, scale, ratio) for _ in range(n)])
    for power in (1, 2):
        a, b = boxes**power, expected.astype(float) ** power
        assert (abs(a.mean(0) - b.mean(0)) < 5 * np.sqrt((a.var(0) + b.var(0)) / n)).all()


@pytest.mark.parametrize(
    ("height", "width", "box"), [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (100, 110, (0, 0, 100, 110))]
)
def test_random_box_that_never_fits_is_central(height, width, box):
    # An area above the image's fits nowhere; torchvision then takes the largest central box of an allowed aspect.
    boxes = ops.random_boxes(jax.random.uniform(KEY, (3, 22)), height, width, (2.0, 2.0), (3 / 4, 4 / 3))
    np.testing.assert_array_equal(boxes, [box] * 3)


def test_center_box_is_the_largest_square_times_the_fraction():
    assert ops.center_box(256, 256, 0.875) == (16, 16, 224, 224)
    assert ops.center_box(100, 60, 1.0) == (20, 0, 60, 60)
    assert ops.center_box(1, 5, 0.1) == (0, 2, 1, 1)


@pytest.mark.parametrize(
    ("ours", "reference", "grid"),
    [
        (ops.adjust_brightness, ref_brightness, (0.0, 0.2, 1.0, 1.8)),
        (ops.adjust_contrast, ref_contrast, (0.0, 0.2, 1.0, 1.8)),
        (ops.adjust_saturation, ref_saturation, (0.0, 0.2, 1.0, 1.8)),
        (ops.adjust_hue, ref_hue, (-0.5, -0.2, -0.01, 0.0, 0.1, 1 / 3, 0.5)),
    ],
)
def test_adjustment_is_its_closed_form(ours, reference, grid):
    x = unit_pictures(len(grid), 9, 8)
    expected = [reference(row.astype(np.float64), value) for row, value in zip(x, grid, strict=True)]
    np.testing.assert_allclose(jax.jit(ours)(x, np.float32(grid)), expected, atol=1e-6)


@pytest.mark.parametrize("with_hue", [True, False])
def test_color_jitter_in_every_order(with_hue):
    orders = np.array(list(itertools.permutations(range(4))) * 2)
    n = len(orders)
    x = unit_pictures(n, 7, 6)
    factors = RNG.uniform(0.2, 1.8, (n, 4)).astype(np.float32)
    factors[:, ops.HUE] = RNG.uniform(-0.4, 0.4, n)
    hue = factors[:, ops.HUE] if with_hue else None
    jittered = jax.jit(ops.color_jitter)(x, orders, *factors.T[:3], hue)
    for row, order, factor, result in zip(x.astype(float), orders, factors.astype(float), jittered, strict=True):
        for operation in order:
            if with_hue or operation != ops.HUE:
                row = REFERENCES[operation](row, factor[operation])
        np.testing.assert_allclose(result, row, atol=5e-6)


def test_grayscale_solarize_normalize_and_flip():
    x = unit_pictures(2, 5, 6)
    x[0, 1, 1] = 0.5
    gray = np.repeat((x.astype(np.float64) @ GRAY)[..., None], 3, -1)
    np.testing.assert_allclose(ops.grayscale(jnp.asarray(x)), gray, atol=1e-6)
    np.testing.assert_allclose(ops.solarize(jnp.asarray(x)), np.where(x < 0.5, x, 1 - x), atol=1e-7)
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.6, 0.7])
    np.testing.assert_allclose(ops.normalize(jnp.asarray(x), tuple(mean), tuple(std)), (x - mean) / std, atol=1e-6)
    np.testing.assert_array_equal(ops.hflip(jnp.asarray(x)), np.flip(x, 2))


@pytest.mark.parametrize("radius", [1, 4, 8])
def test_blur_is_opencvs(radius):
    sigmas = np.array([0.1, 0.5, 1.0, 2.0, 7.0], np.float32)
    x = unit_pictures(len(sigmas), 9, 21)  # radius 8 reflects the whole height
    taps = 2 * radius + 1
    expected = [
        cv2.GaussianBlur(row.astype(np.float64), (taps, taps), float(sigma), borderType=cv2.BORDER_REFLECT_101)
        for row, sigma in zip(x, sigmas, strict=True)
    ]
    np.testing.assert_allclose(jax.jit(ops.gaussian_blur, static_argnums=2)(x, sigmas, radius), expected, atol=2e-6)


def test_blur_kernel_is_a_tenth_of_the_image_and_odd():
    assert [2 * ops.blur_radius(size) + 1 for size in (8, 32, 64, 96, 224)] == [3, 3, 7, 9, 23]
    with pytest.raises(ValueError, match="more than 5 pixels"):
        ops.gaussian_blur(jnp.zeros((1, 5, 9, 3)), jnp.ones(1), 5)


# ------------------------------------------------------------------------------------------------------------ views

# Between them, every operation, and more than one draw.
SMALL = {"x1": simclr(8)["x1"], "x2": byol(8)["x2"], "local": {"size": 6, "count": 2, "flip": 0.5}}


@pytest.fixture(scope="module")
def small_views():
    return jax.jit(make(SMALL))


def test_views_are_deterministic_and_every_row_view_draw_and_key_differs(small_views):
    batch = {"image": np.repeat(pictures(1, 16, 16), 8, 0)}
    first, again, other = small_views(KEY, batch), small_views(KEY, batch), small_views(jax.random.key(1), batch)
    for name in SMALL:
        np.testing.assert_array_equal(first[name], again[name])
        rows = np.asarray(first[name]).reshape(8 * View(**SMALL[name]).count, -1)
        for a, b in itertools.combinations(rows, 2):
            assert abs(a - b).max() > 0.01
        assert (abs(np.asarray(first[name] - other[name])).reshape(8, -1).max(1) > 0.01).all()


def test_a_row_does_not_depend_on_other_rows(small_views):
    images = pictures(8, 16, 16)
    changed = np.concatenate([pictures(3, 16, 16), images[3:4], pictures(4, 16, 16)])
    first, second = small_views(KEY, {"image": images}), small_views(KEY, {"image": changed})
    for name in SMALL:
        np.testing.assert_array_equal(first[name][3], second[name][3])
        assert abs(first[name][2] - second[name][2]).max() > 0.01


def test_views_do_not_depend_on_the_mesh(small_views):
    images = pictures(8, 16, 16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    compiled = small_views.lower(KEY, {"image": sharded}).compile()
    single, parallel = small_views(KEY, {"image": images}), compiled(KEY, {"image": sharded})
    for name in SMALL:
        assert parallel[name].sharding.spec[0] == "data"
        np.testing.assert_allclose(parallel[name], single[name], atol=5e-6)
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()


def test_other_keys_pass_and_the_source_is_dropped():
    batch = {"image": pictures(4, 9, 9), "label": np.arange(4), "text": np.zeros((4, 7), np.int32)}
    view = View(9, crop="none")
    out = Views({"x1": view})(None, batch)
    assert sorted(out) == ["label", "text", "x1"]
    assert out["label"] is batch["label"]
    assert sorted(Views({"image": view})(None, batch)) == ["image", "label", "text"]
    renamed = {"photo": batch["image"], "image": batch["label"]}
    assert sorted(Views({"x1": view}, image="photo")(None, renamed)) == ["image", "x1"]


def test_evaluation_needs_no_key_and_is_pillows_center_crop():
    images = pictures(3, 32, 40)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    out = jax.jit(make(evaluation(12, mean=mean, std=std)))(None, {"image": images})["image"]
    expected = [pillow_crop(image, (2, 6, 28, 28), 12, "bicubic") for image in images]
    np.testing.assert_allclose(out, (np.array(expected) - mean) / std, atol=2e-5)
    with pytest.raises(ValueError, match="'x1' is random"):
        make(simclr(8))(None, {"image": images})


def test_probabilities_of_one_and_zero():
    images = pictures(4, 20, 20)
    x = images.astype(np.float64) / 255
    for field, expected in (
        ("flip", np.flip(x, 2)),
        ("solarize", np.where(x < 0.5, x, 1 - x)),
        ("grayscale", np.repeat((x @ GRAY)[..., None], 3, -1)),
    ):
        view = replace(View(20, crop="none"), **{field: 1.0})
        np.testing.assert_allclose(run(Views({"x": view}), {"image": images})["x"], expected, atol=1e-6)
    np.testing.assert_allclose(Views({"x": View(20, crop="none")})(None, {"image": images})["x"], x, atol=1e-6)
    blurred = run(Views({"x": View(20, crop="none", blur=1.0, blur_sigma=(1.5, 1.5))}), {"image": images})["x"]
    expected = [cv2.GaussianBlur(row, (3, 3), 1.5, borderType=cv2.BORDER_REFLECT_101) for row in x]
    np.testing.assert_allclose(blurred, expected, atol=1e-5)


def test_jitter_factors_and_probability():
    # Brightness alone on a grey picture shows each row's factor; the probability shows in the rows left alone.
    images = np.full((2000, 2, 2, 3), 100, np.uint8)
    view = View(2, crop="none", jitter=0.7, brightness=0.5)
    out = run(Views({"x": view}), {"image": images})["x"]
    factors = np.asarray(out[:, 0, 0, 0] / (100 / 255), np.float64)
    left_alone = abs(factors - 1) < 1e-6
    assert abs(left_alone.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 2000)
    drawn = np.sort(factors[~left_alone])
    assert 0.5 - 1e-6 <= drawn[0] <= drawn[-1] <= 1.5 + 1e-6
    uniform = 0.5 + (np.arange(len(drawn)) + 0.5) / len(drawn)  # Kolmogorov-Smirnov, p < 1e-5
    assert abs(drawn - uniform).max() < 2.5 / np.sqrt(len(drawn))


def test_switching_an_operation_off_leaves_the_other_draws():
    batch = {"image": pictures(6, 16, 16)}
    with_flip = run(Views({"x": View(8, flip=1.0)}), batch)["x"]
    without = run(Views({"x": View(8)}), batch)["x"]
    np.testing.assert_allclose(with_flip, np.flip(without, 2), atol=1e-7)


def test_views_differ_by_name_but_not_by_the_order_of_their_dict():
    batch = {"image": pictures(16, 8, 8)}
    view = View(8, crop="none", flip=0.5)
    first, second = Views({"a": view, "b": view}), Views({"b": view, "a": view})
    assert hash(first) == hash(second)
    out = run(first, batch)
    np.testing.assert_allclose(out["b"], second(KEY, batch)["b"], atol=1e-6)  # not `run`: jit takes them for the same
    assert abs(out["a"] - out["b"]).max() > 0.01  # the same recipe, but other draws


def test_host_crops_run_only_what_follows_the_crop():
    images = pictures(6, 8, 8)
    view = View(8, flip=0.5, grayscale=0.5, mean=(0.5, 0.4, 0.3))
    device = Views({"x": replace(view, crop="none")})
    host = Views({"x": view}, host="crop")
    np.testing.assert_array_equal(run(host, {"x": images})["x"], run(device, {"image": images})["x"])
    assert device.host_crops is None
    assert host.host_crops == host.views

    local = Views({"x": View(8, count=3)}, host="crop")
    crops = RNG.integers(0, 256, (2, 3, 8, 8, 3)).astype(np.uint8)
    np.testing.assert_allclose(local(None, {"x": crops})["x"], crops / 255, atol=1e-7)
    with pytest.raises(ValueError, match=r"\[b, 3, 8, 8, c\], got \[6, 8, 8, 3\]"):
        local(None, {"x": images})


def test_draws_of_one_image_are_cut_from_that_image():
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.full((1, 10, 10, 3), 60, np.uint8)
    out = run(Views({"x": View(5, count=3)}), {"image": images})["x"]
    np.testing.assert_allclose(out, np.broadcast_to(images[:, None, :5, :5] / 255, out.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (simclr(32, strength=0.5, blur=False), {"x1", "x2"}),
        (moco_v2(32), {"query", "key"}),
        (byol(32), {"x1", "x2"}),
        (mae(32), {"image"}),
        (clip(32), {"image"}),
        (multi_crop(), {"global1", "global2", "local"}),
        (multi_crop(local_count=0), {"global1", "global2"}),
        (evaluation(32), {"image"}),
    ],
)
def test_recipes_build(recipe, names):
    batch = jax.ShapeDtypeStruct((4, 40, 48, 3), jnp.uint8)
    views = make(recipe)
    out = jax.eval_shape(views, KEY, {"image": batch})
    assert set(out) == names
    for name, view in views.views.items():
        draws = (view.count,) if view.count > 1 else ()
        assert out[name].shape == (4, *draws, view.size, view.size, 3)
        assert out[name].dtype == jnp.float32


def test_one_channel():
    images = pictures(3, 10, 10, channels=1)
    out = run(Views({"x": View(10, crop="none", flip=1.0, mean=(0.5,), std=(0.25,))}), {"image": images})["x"]
    np.testing.assert_allclose(out, (np.flip(images, 2) / 255 - 0.5) / 0.25, atol=1e-6)
    with pytest.raises(ValueError, match="need 3 channels, got 1"):
        run(Views({"x": View(10, jitter=0.8)}), {"image": images})
    with pytest.raises(ValueError, match="have 3 channels, the images 1"):
        run(Views({"x": View(10, mean=(0.1, 0.2, 0.3))}), {"image": images})


def test_errors_say_what_to_do():
    images = pictures(2, 10, 12)
    with pytest.raises(TypeError, match="must be uint8"):
        Views({"x": View(8)})(KEY, {"image": images / 255})
    with pytest.raises(KeyError, match=r"no 'image', only \['photo'\]"):
        Views({"x": View(8)})(KEY, {"photo": images})
    with pytest.raises(ValueError, match="8 x 8 pixels, got 10 x 12; use crop='center'"):
        Views({"x": View(8, crop="none")})(KEY, {"image": images})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip", 1.5),
        ("brightness", -0.1),
        ("hue", 0.6),
        ("scale", (0.5, 0.1)),
        ("scale", (0.5, 2.0)),
        ("blur_sigma", (0.0, 2.0)),
        ("fraction", 0.0),
        ("count", 0),
        ("mean", (0.5,)),
    ],
)
def test_impossible_fields_raise(field, value):
    with pytest.raises(ValueError, match=field):
        replace(View(8), **{field: value})
