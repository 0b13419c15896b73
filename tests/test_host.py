"""Decoding and cropping on the host, against Pillow, OpenCV, closed forms and real photographs."""

import io
import itertools
import resource
import struct
import tarfile
import zlib
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from ssljax.data.errors import BadSample
from ssljax.data.host import HostTransform
from ssljax.data.pictures import Opened, crop_box, decode, fit
from ssljax.views import View, Views, byol, moco_v2, multi_crop, simclr


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    """A smooth colour picture without symmetry."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.stack([y / height * 255, x / width * 255, (x * y) / (height * width) * 255], -1).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, form, **options)
    return file.getvalue()


def members(path: Path, count: int, every: int = 1) -> dict[str, bytes]:
    """The first `count` files of a tar, taking one in `every`."""
    files = {}
    with tarfile.open(path) as tar:
        for member in itertools.islice(tar, 0, count * every, every):
            file = tar.extractfile(member)
            assert file is not None
            files[member.name] = file.read()
    return files


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_are_exact(form):
    np.testing.assert_array_equal(decode(encoded(picture(), form, lossless=True)), picture())


def test_jpeg_agrees_with_pillow():
    data = encoded(picture(), "JPEG", quality=95)
    np.testing.assert_allclose(decode(data).astype(int), np.asarray(Image.open(io.BytesIO(data))), atol=2)


def test_real_photographs_agree_with_pillow(real_data):
    for name, data in members(real_data / "caltech101" / "train.tar", 30, every=50).items():
        theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert np.abs(decode(data).astype(int) - theirs).mean() < 1, name


def test_real_palette_and_transparent_pngs(real_data):
    (rgba,) = members(real_data / "nlvr" / "images.tar", 1).values()
    (palette,) = members(real_data / "emoji" / "style_flat.tar", 1).values()
    for data, mode in ((rgba, "RGBA"), (palette, "P")):
        theirs = Image.open(io.BytesIO(data))
        assert theirs.mode == mode
        layer = theirs.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        expected = np.asarray(Image.alpha_composite(white, layer).convert("RGB")).astype(int)
        np.testing.assert_allclose(decode(data).astype(int), expected, atol=1)


def test_cifar_images(real_data):
    with np.load(real_data / "cifar10" / "test.npz") as archive:
        jpeg, offsets = archive["jpeg"], archive["offsets"]
    for i in range(20):
        data = jpeg[offsets[i] : offsets[i + 1]].tobytes()
        theirs = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))[..., ::-1]
        assert decode(data).shape == (32, 32, 3)
        np.testing.assert_allclose(decode(data).astype(int), theirs, atol=3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "GIF"])
def test_grey_becomes_three_equal_channels(form):
    image = decode(encoded(picture()[..., 0], form))
    assert image.shape == (40, 60, 3)
    assert (np.ptp(image, axis=-1) == 0).all()
    np.testing.assert_allclose(image[..., 0].astype(int), picture()[..., 0], atol=3)


def test_transparency_lies_on_white():
    rgba = np.dstack([picture(), np.repeat(np.array([[0, 128, 255]], np.uint8), 20, 1).repeat(40, 0)])
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    for given in (rgba, encoded(rgba, "PNG"), encoded(rgba, "WEBP", lossless=True, exact=True), encoded(rgba, "TIFF")):
        np.testing.assert_allclose(decode(given), expected, atol=0.51)
    grey_alpha = encoded(Image.fromarray(rgba).convert("LA"), "PNG")
    assert (decode(grey_alpha)[:, :20] == 255).all()


def test_transparent_palette_lies_on_white():
    image = Image.fromarray((np.arange(16, dtype=np.uint8).reshape(4, 4) % 4), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    for form in ("PNG", "GIF"):
        decoded = decode(encoded(image, form, transparency=1))
        assert decoded[0, :3].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


def test_first_frame_of_an_animation():
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for form in ("GIF", "WEBP"):
        data = encoded(first, form, save_all=True, append_images=[second], lossless=True)
        assert decode(data)[4, 4].tolist() == pytest.approx([255, 0, 0], abs=1)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(form):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.repeat(np.round(ramp / 257)[..., None], 3, -1)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(ramp), form)), expected)
    colour = np.dstack([ramp, ramp[::-1], ramp.T])
    ok, data = cv2.imencode("." + form.lower(), colour[..., ::-1])
    assert ok
    np.testing.assert_allclose(decode(data.tobytes()), np.round(colour / 257), atol=1)


def test_cmyk_jpegs():
    photo = Image.fromarray(picture())
    data = encoded(photo.convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_allclose(decode(data).astype(int), picture(), atol=8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("JPEG", "PNG", "WEBP", "TIFF"):
        data = encoded(picture(), form, exif=exif, lossless=True, quality=95)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert decode(data).shape == expected.shape
        np.testing.assert_allclose(decode(data).astype(int), expected, atol=2)


def test_broken_exif_does_not_cost_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), "JPEG", exif=exif)
    at = data.index(b"Exif\0\0") + 6
    assert decode(data[:at] + b"\xff" * 8 + data[at + 8 :]).shape == (40, 60, 3)


# --- arrays ---------------------------------------------------------------------------------------


def test_arrays():
    image = picture()
    np.testing.assert_array_equal(decode(image), image)
    np.testing.assert_array_equal(decode(image[..., 0]), decode(image[..., :1]))
    np.testing.assert_array_equal(decode(image[..., 0])[..., 2], image[..., 0])
    np.testing.assert_array_equal(decode(image.astype(np.uint16) * 257), image)
    np.testing.assert_array_equal(decode(image.astype(np.float64) / 255), image)
    np.testing.assert_array_equal(decode(image[..., 0] > 100)[..., 0], np.where(image[..., 0] > 100, 255, 0))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.full((4, 4, 3), np.nan, np.float32), r"\[0, 1\]"),
        (np.full((4, 4, 3), 200.0, np.float32), r"\[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
        (np.zeros((3,), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
    ],
)
def test_arrays_that_are_no_pictures(array, reason):
    with pytest.raises(BadSample, match=reason):
        decode(array)


# --- bytes that are no pictures -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"<html>404</html>", r"not an image \(starts with b'<html>40'"),
        (b"RIFF\0\0\0\0WAVEfmt ", "WAVE"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "not an image"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"GIF89a", "GIF"),
        (b"BM", "BMP"),
        (b"II*\0", "TIFF"),
    ],
)
def test_bytes_that_are_no_pictures(data, reason):
    with pytest.raises(BadSample, match=reason):
        decode(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files(form, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(noise, form)
    with pytest.raises(BadSample) as caught:
        decode(data[: int(len(data) * share)])
    if form in ("JPEG", "PNG") and share > 0.1:
        assert str(caught.value) == f"truncated {form}"


def test_truncated_real_photographs(real_data):
    for name, data in members(real_data / "caltech101" / "train.tar", 10, every=150).items():
        assert decode(data).size, name
        with pytest.raises(BadSample, match="truncated JPEG"):
            decode(data[: len(data) // 2])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_corruption_never_raises_anything_else(form):
    rng = np.random.default_rng(1)
    data = np.frombuffer(encoded(picture(), form), np.uint8)
    refused = 0
    for _ in range(150):
        damaged = data.copy()
        at = rng.integers(4, min(len(data), 400), 4)
        damaged[at] = rng.integers(0, 256, 4)
        try:
            assert decode(damaged.tobytes(), max_pixels=100_000).dtype == np.uint8
        except BadSample:
            refused += 1
    assert refused > 0 or form == "BMP"


def bomb(form: str, side: int = 12_000) -> bytes:
    """A header that announces side x side pixels, in as few bytes as the format allows."""
    if form == "PNG":

        def chunk(kind, body):
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        pixels = zlib.compress(bytes(3 * 12_001 * 50), 9)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    if form == "WEBP":
        return b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + 2 * (side - 1).to_bytes(3, "little") + bytes(8)
    small = bytearray(encoded(picture(), form))
    if form == "JPEG":
        at = small.index(b"\xff\xc0")
        small[at + 5 : at + 9] = struct.pack(">HH", side, side)
    elif form == "BMP":
        small[18:26] = struct.pack("<ii", side, side)
    elif form == "GIF":
        small[6:10] = struct.pack("<HH", side, side)
    else:
        small = bytearray(encoded(Image.new("1", (side, side)), "TIFF", compression="group4"))
    return bytes(small)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_bombs_are_refused_by_their_header(form):
    data = bomb(form)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadSample, match="12000x12000 pixels is over the limit of 64,000,000"):
        decode(data)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 16 * 1024, f"{grown} KiB: the pixels (at least 144 MB) were decoded"


def test_the_limit_is_a_choice():
    data = encoded(picture(40, 60), "PNG")
    assert decode(data, max_pixels=2400).shape == (40, 60, 3)
    with pytest.raises(BadSample, match="60x40 pixels is over the limit of 2,399"):
        decode(data, max_pixels=2399)


# --- crops ----------------------------------------------------------------------------------------


def test_fit_shrinks_by_averaging():
    image = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    means = image[:, 32:96].reshape(16, 4, 16, 4, 3).mean((1, 3))
    np.testing.assert_allclose(fit(image, 16), means, atol=0.51)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (37, 91), (224, 224)])
def test_fit_gives_the_size(shape):
    image = fit(np.full((*shape, 3), 77, np.uint8), 24)
    assert image.shape == (24, 24, 3)
    assert (image == 77).all()


def test_fit_enlarges_smoothly():
    ramp = np.repeat(np.arange(0, 256, 16, dtype=np.uint8)[None, :, None], 16, 0).repeat(3, 2)
    row = fit(ramp, 64)[32, 8:-8, 0].astype(int)
    assert (np.diff(row) >= 0).all()
    assert np.abs(row - ((np.arange(8, 56) + 0.5) / 4 - 0.5) * 16).max() <= 1


def test_fit_keeps_the_centre():
    image = np.zeros((50, 90, 3), np.uint8)
    image[:, 20:70] = 255
    assert (fit(image, 50) == 255).all()


def test_crop_boxes_follow_their_distribution():
    """Area uniform and ratio log-uniform (Kolmogorov-Smirnov at 1e-4), where every box fits; always inside."""
    rng = np.random.default_rng(0)
    count, height, width, scale, ratio = 4000, 3000, 3000, (0.1, 0.4), (0.5, 2.0)
    boxes = np.array([crop_box(height, width, rng, scale, ratio) for _ in range(count)])
    top, left, h, w = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    area = (h * w / (height * width) - scale[0]) / (scale[1] - scale[0])
    shape = (np.log(w / h) - np.log(ratio[0])) / np.log(ratio[1] / ratio[0])
    for values in (area, shape, top / (height - h), left / (width - w)):
        distance = np.abs(np.sort(values) - (np.arange(count) + 0.5) / count).max()
        assert distance < 2.2 / np.sqrt(count)


def test_crop_box_falls_back_to_the_centre():
    rng = np.random.default_rng(0)
    assert crop_box(10, 1000, rng, (1.0, 1.0), (3 / 4, 4 / 3)) == (0, 493, 10, 13)
    assert crop_box(1000, 10, rng, (1.0, 1.0), (3 / 4, 4 / 3)) == (493, 0, 13, 10)
    assert crop_box(1, 1, rng, (0.08, 1.0), (3 / 4, 4 / 3)) == (0, 0, 1, 1)


def test_random_resized_crop_shows_its_box():
    """On a picture whose colour is its own coordinate, the crop's corners tell where it was cut."""
    y, x = np.mgrid[:256, :256]
    image = np.dstack([y, x, np.zeros_like(y)]).astype(np.uint8)
    for seed in range(20):
        top, left, h, w = crop_box(256, 256, np.random.default_rng(seed), (0.2, 1.0), (3 / 4, 4 / 3))
        transform = HostTransform(crops={"x": View(32, scale=(0.2, 1.0))})
        crop = transform({"image": image}, np.random.default_rng(seed))["x"].astype(float)
        centre = crop[15:17, 15:17].mean((0, 1))
        np.testing.assert_allclose(centre[:2], [top + (h - 1) / 2, left + (w - 1) / 2], atol=1.5)


# --- the transform --------------------------------------------------------------------------------


def letters(text: str) -> np.ndarray:
    return np.array([len(text), ord(text[0])], np.int32)


def test_device_mode():
    record = {"image": encoded(picture(), "PNG"), "label": 3, "key": "a.png", "text": "a caption"}
    sample = HostTransform(size=24)(record, np.random.default_rng(0))
    assert sample.keys() == {"image", "label"}
    np.testing.assert_array_equal(sample["image"], fit(picture(), 24))
    assert sample["label"].dtype == np.int32
    assert sample["label"] == 3
    native = HostTransform()(record, None)
    np.testing.assert_array_equal(native["image"], picture())


def test_host_mode_cuts_every_view():
    crops = {"x1": View(16), "small": View(8, count=5), "middle": View(20, "center", fraction=0.5)}
    transform = HostTransform(crops={**crops, "whole": View(10, "none")})
    record = {"image": encoded(picture(), "PNG")}
    sample = transform(record, np.random.default_rng(0))
    assert {name: value.shape for name, value in sample.items()} == {
        "x1": (16, 16, 3),
        "small": (5, 8, 8, 3),
        "middle": (20, 20, 3),
        "whole": (10, 10, 3),
    }
    np.testing.assert_array_equal(sample["middle"], picture()[10:30, 20:40])  # half of the shorter side
    np.testing.assert_array_equal(sample["whole"], fit(picture(), 10))
    assert len({crop.tobytes() for crop in sample["small"]}) == 5
    again = transform(record, np.random.default_rng(0))
    other = transform(record, np.random.default_rng(1))
    np.testing.assert_array_equal(sample["x1"], again["x1"])
    assert (sample["x1"] != other["x1"]).any()
    np.testing.assert_array_equal(transform(record, None)["x1"], fit(picture(), 16))


def both(views: dict[str, View], record: dict, seed: int) -> tuple[dict, dict]:
    """The finished views, their pixels changed by the host and by the device; [0, 1] unless they are normalised."""
    outputs = []
    for host in ("augment", "crop"):
        plan = Views(views, host=host)
        transform = HostTransform(crops=plan.host_crops, augment=host == "augment")
        sample = transform(record, np.random.default_rng(seed))
        batch = {name: jnp.asarray(x)[None] for name, x in sample.items()}
        outputs.append({name: np.asarray(x)[0] for name, x in jax.jit(plan)(None, batch).items()})
    return outputs[0], outputs[1]


PIXELS = {"flip": {"flip": 1.0}, "brightness": {"jitter": 1.0, "brightness": 0.8},
          "contrast": {"jitter": 1.0, "contrast": 0.8}, "saturation": {"jitter": 1.0, "saturation": 0.8},
          "hue": {"jitter": 1.0, "hue": 0.5}, "grayscale": {"grayscale": 1.0},
          "blur": {"blur": 1.0}, "solarize": {"solarize": 1.0}}  # fmt: skip
MOST = 2 / 255


@pytest.mark.parametrize("name", PIXELS)
def test_host_and_device_change_pixels_alike(name):
    for seed in range(6):
        host, device = both({"x": View(48, **PIXELS[name])}, {"image": picture(96, 128)}, seed)
        np.testing.assert_allclose(host["x"], device["x"], atol=1 / 255)


@pytest.mark.parametrize("recipe", [simclr(64), byol(64), moco_v2(64), multi_crop(64, 40, 3)])
def test_host_and_device_finish_recipes_alike(recipe):
    """Whichever does it: the same draws, the same pictures."""
    views = {name: View(**{**view, "mean": (0.0,) * 3, "std": (1.0,) * 3}) for name, view in recipe.items()}
    for seed in range(8):
        host, device = both(views, {"image": encoded(picture(160, 200), "JPEG")}, seed)
        assert host.keys() == device.keys() == views.keys()
        for name in views:
            np.testing.assert_allclose(host[name], device[name], atol=MOST)


def test_large_jpegs_are_decoded_smaller():
    """Every view is that of the whole picture, to half a pixel of the smaller one: at most 4 grey levels here."""
    y, x = np.mgrid[:600, :800].astype(np.float64)
    smooth = np.dstack([127 + 100 * np.sin(x / 60), 127 + 100 * np.cos(y / 50), 255 * x / 800]).astype(np.uint8)
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        jpeg = encoded(smooth, "JPEG", quality=95, exif=exif)
        whole = decode(jpeg)
        for shrink in (2, 4, 8):
            small = Opened(jpeg).decode(shrink)
            assert small.shape == (whole.shape[0] // shrink, whole.shape[1] // shrink, 3)
        views = {"x": View(32, scale=(0.3, 1.0)), "y": View(48, scale=(0.3, 1.0), count=2)}
        for transform in (HostTransform(crops=views), HostTransform(size=64)):
            for seed in range(5):
                small = transform({"image": jpeg}, np.random.default_rng(seed))
                large = transform({"image": whole}, np.random.default_rng(seed))
                for name in small:
                    difference = np.abs(small[name].astype(float) - large[name])
                    assert difference.mean() < 4


def test_captions():
    transform = HostTransform(tokenizer=letters)
    record = {"text": ("one", "three", "eleven")}
    assert transform(record, None)["text"].tolist() == [3, ord("o")]
    drawn = {int(transform(record, np.random.default_rng(i))["text"][0]) for i in range(40)}
    assert drawn == {3, 5, 6}
    assert transform({"text": "plain"}, np.random.default_rng(0))["text"].tolist() == [5, ord("p")]
    with pytest.raises(BadSample, match="no caption"):
        transform({"text": ()}, None)
    assert transform({"image": picture()}, None).keys() == {"image"}  # labelled pictures of a zero-shot evaluation


def test_kept_arrays():
    record = {"image": picture(), "mask": np.ones((4, 4), bool), "score": 0.5, "key": "a"}
    sample = HostTransform(size=8, keep=("mask", "score"))(record, None)
    assert sample["mask"].dtype == bool
    assert sample["score"] == 0.5
    for name, reason in {
        "key": r"'key' is 'a' \(str\)",
        "absent": r"needs 'absent', but this record has \['image',",
    }.items():
        with pytest.raises(BadSample, match=reason):
            HostTransform(keep=(name,))(record, None)


def test_prepare_changes_nothing_when_done_twice():
    record = {"image": encoded(picture(), "PNG"), "label": 1}
    views = {"small": {"x": View(16)}, "large": {"x": View(30)}}  # of which the first may be decoded smaller
    transforms = [HostTransform(crops=each, augment=augment) for each in views.values() for augment in (False, True)]
    for transform in (HostTransform(size=24), HostTransform(), *transforms):
        once = transform(record, np.random.default_rng(3))
        twice = transform(transform.prepare(transform.prepare(record)), np.random.default_rng(3))
        assert once.keys() == twice.keys()
        for name in once:
            np.testing.assert_array_equal(once[name], twice[name])


def test_size_and_crops_exclude_each_other():
    with pytest.raises(ValueError, match="set one of them"):
        HostTransform(size=8, crops={"x": View(8)})


def test_strict_jpeg_is_what_refuses_half_a_photograph():
    """The reason for `strict`: without it libjpeg-turbo returns a picture whose lower half is grey."""
    data = encoded(picture(200, 300), "JPEG")
    half = data[: len(data) // 2]
    assert simplejpeg.decode_jpeg(half, strict=False).shape == (200, 300, 3)
    with pytest.raises(BadSample, match="truncated JPEG"):
        decode(half)
