"""Pictures of any number of channels: TIFF against tifffile and Pillow, arrays, fitting, views of six channels."""

import io
import struct
import tracemalloc
import zlib

import jax
import numpy as np
import pytest
import tifffile
from PIL import Image
from small import quick_compilation  # noqa: F401

from ssljax.config import build, resolve
from ssljax.data import (
    Arrays,
    BadSample,
    Bands,
    Folder,
    HostTransform,
    Loader,
    Reader,
    inspect,
    previews,
    train_batches,
)
from ssljax.data.pictures import fit
from ssljax.data.tiff import Tiff
from ssljax.views import View, Views

BASE = np.random.default_rng(0).integers(0, 60_000, (50, 70, 5)).astype(np.uint16)
LIMIT = 10**8


def tiff(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **{"photometric": "minisblack", **options})
    return file.getvalue()


WRITTEN = [
    {},
    {"compression": "zlib"},
    {"tile": (16, 32)},
    {"rowsperstrip": 7},
    {"bigtiff": True},
    {"byteorder": ">"},
    {"byteorder": ">", "compression": "zlib", "tile": (32, 16)},
]


def read(data: bytes) -> np.ndarray:
    found = Tiff(data, LIMIT)
    assert found.height, found.width == (50, 70)
    return found.read(range(found.channels))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("options", WRITTEN, ids=str)
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "f4", "f8"])
def test_what_tifffile_writes(dtype, options, planar):
    array = BASE.astype(dtype)
    data = tiff(array if planar == "contig" else np.moveaxis(array, -1, 0), planarconfig=planar, **options)
    np.testing.assert_array_equal(read(data), array)
    np.testing.assert_array_equal(Tiff(data, LIMIT).read((3, 0, 3)), array[..., [3, 0, 3]])


@pytest.mark.parametrize("options", [{}, {"imagej": True}, {"ome": True}, {"compression": "zlib", "predictor": 2}])
def test_pages_are_channels(options):
    pages = np.moveaxis(BASE, -1, 0)
    options = {"photometric": None} | options if "imagej" in options else options
    np.testing.assert_array_equal(read(tiff(pages, **options)), BASE)


def test_reduced_copies_and_other_pages_do_not_count():
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(BASE[..., 0], photometric="minisblack")
        writer.write(BASE[::2, ::2, 0], photometric="minisblack", subfiletype=1)
        writer.write(BASE[:20, :20, 0], photometric="minisblack")
        writer.write(BASE[..., 1], photometric="minisblack")
    np.testing.assert_array_equal(read(file.getvalue()), BASE[..., :2])


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
@pytest.mark.parametrize("predictor", [1, 2, 3])
def test_what_pillow_writes(compression, predictor):
    array = BASE[..., 0].astype(np.float32) if predictor == 3 else BASE[..., :3].astype(np.uint8)
    file = io.BytesIO()
    tags = {317: predictor} if compression != "packbits" else {}
    Image.fromarray(array).save(file, "TIFF", compression=compression, tiffinfo=tags)
    np.testing.assert_array_equal(read(file.getvalue()), array.reshape(50, 70, -1))


# --- to squares -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_every_channel_is_fitted_as_pictures_are(count):
    array = np.random.default_rng(0).integers(0, 256, (40, 60, count)).astype(np.uint8)
    found = Bands(16, tuple(range(count)))(array, None)["image"]
    for i in range(count):
        np.testing.assert_array_equal(found[..., i], fit(np.repeat(array[..., i : i + 1], 3, -1), 16)[..., 0])
    assert found.flags.c_contiguous
    assert Bands(16, tuple(range(count))).blank()["image"].shape == found.shape
    enlarged = Bands(80, tuple(range(count)), dtype="float32")(array, None)["image"]
    assert (enlarged.dtype, enlarged.shape) == (np.float32, (80, 80, count))
    assert 0 <= enlarged.min() < enlarged.max() <= 1


def test_windows_layouts_and_the_cache():
    reader = Bands(50, (4, 1), window=((0, 30_000), (30_000, 60_000)), dtype="float32", layout="HWC")
    expected = np.clip(BASE[:, 10:60, [4, 1]] / 30_000 - [0, 1], 0, 1)
    for value in (BASE, tiff(BASE, planarconfig="contig")):
        np.testing.assert_allclose(reader(value, None)["image"], expected, atol=1e-6)
    prepared = reader.prepare(BASE)
    assert reader.prepare(prepared) is prepared
    np.testing.assert_array_equal(reader(prepared, None)["image"], prepared.array)
    first = Bands(50, (4, 1), ((0.0, 60_000.0),))
    np.testing.assert_array_equal(first(np.moveaxis(BASE, -1, 0), None)["image"], first(BASE, None)["image"])
    odd = np.where(BASE > 30_000, np.nan, BASE)
    assert np.isfinite(Bands(50, (0,), dtype="float32")(odd, None)["image"]).all()
    spread = Bands(50, (0,))(BASE, None)["image"]  # percentiles
    assert (spread.min(), spread.max()) == (0, 255)
    for wrong in ({"channels": ()}, {"size": 0}, {"window": ((3, 3),)}, {"window": ((0, 1),) * 3}):
        with pytest.raises(ValueError, match="Bands"):
            Bands(**{"size": 4, "channels": (0, 1), **wrong})
    config = {"type": "Bands", "size": 4, "channels": [0, 1], "window": [[0, 1], [0.0, 2]]}
    bands = build(Reader, config)
    assert bands == Bands(4, (0, 1), ((0.0, 1.0), (0.0, 2.0)))
    assert build(Reader, resolve(bands)) == bands


def test_views_of_six_channels():
    batch = {"image": np.random.default_rng(0).integers(0, 256, (3, 20, 24, 6)).astype(np.uint8)}
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    plain = Views({"x": View(20, crop="center", fraction=1.0)})(None, batch)["x"]
    normal = Views({"x": View(20, crop="center", fraction=1.0, mean=mean, std=std)})(None, batch)["x"]
    np.testing.assert_allclose(normal, (plain - np.array(mean)) / np.array(std), rtol=1e-4, atol=1e-5)
    random = Views({"x": View(16, flip=0.5, blur=0.5, solarize=0.5, mean=mean, std=std, count=2)})
    assert jax.jit(random)(jax.random.key(0), batch)["x"].shape == (3, 2, 16, 16, 6)
    for refused in ({"jitter": 0.5}, {"grayscale": 0.5}):
        with pytest.raises(ValueError, match="need 3 channels, got 6"):
            Views({"x": View(16, **refused)})(jax.random.key(0), batch)
    with pytest.raises(ValueError, match="have 3 channels, the images 6"):
        Views({"x": View(16, mean=(1, 2, 3))})(jax.random.key(0), batch)


def test_real_pictures_become_views(real_data, tmp_path):
    with np.load(real_data / "satellite" / "landsat7_olinda.npz") as archive:
        bands = archive["bands"]
    with np.load(real_data / "microscopy" / "multichannel.npz") as archive:
        fields = [archive[name] for name in archive.files]
    (tmp_path / "tiles").mkdir()
    for i in range(6):
        tile = bands[:, 50 * i : 50 * i + 100, 40 * i : 40 * i + 100]
        (tmp_path / "tiles" / f"{i}.tif").write_bytes(tiff(tile, planarconfig="separate", compression="zlib"))
    source = Folder(str(tmp_path / "tiles"))
    transform = HostTransform(readers={"image": Bands(64, tuple(range(6)))})
    batch = next(train_batches(source, transform, seed=0, batch_size=6, steps=1, loader=Loader(threads=0)))
    assert (batch["replaced"] == 0).all()
    first = batch["image"][batch["index"].tolist().index(0)]
    np.testing.assert_array_equal(first[..., 2], fit(np.repeat(bands[2, :100, :100, None], 3, -1), 64)[..., 0])
    views = Views({"x1": View(32, flip=0.5), "x2": View(32, blur=0.5)})
    assert jax.jit(views)(jax.random.key(0), {"image": batch["image"]})["x1"].shape == (6, 32, 32, 6)
    cells = Arrays({"image": fields})
    sample = HostTransform(readers={"image": Bands(128, (0, 1))})(cells[0], None)["image"]
    assert sample.shape == (128, 128, 2)
    for shown in (source, cells):
        assert not inspect(shown, str(tmp_path / "sheet.png"))["unreadable"]


def test_false_colours(caplog):
    pages = np.moveaxis(BASE, -1, 0)
    for value in (tiff(BASE, planarconfig="contig"), tiff(pages), pages, BASE, tiff(BASE[..., 0].astype(np.int32))):
        shown = previews.image(value)
        assert (shown.shape, shown.dtype) == ((50, 70, 3), np.uint8)
        assert np.ptp(shown) > 200
    plain = BASE[..., :3].astype(np.uint8)
    np.testing.assert_array_equal(previews.image(tiff(plain, photometric="rgb")), plain)
    magenta = previews.image(np.moveaxis(BASE[..., :2], -1, 0))
    np.testing.assert_array_equal(magenta[..., 0], magenta[..., 2])
    with pytest.raises(BadSample):
        previews.image(b"II*\0")
    assert not caplog.text


# --- bad input ------------------------------------------------------------------------------------


def handmade(changes: dict[int, tuple[int, int, int] | None], pixels: bytes = bytes(16), after: int = 0) -> bytes:
    """A grey picture of 4 x 4; `changes`: tag -> (type, count, value), or None to leave it out."""
    tags = {256: (4, 1, 4), 257: (4, 1, 4), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8),
            277: (3, 1, 1), 278: (4, 1, 4), 279: (4, 1, len(pixels)), **changes}  # fmt: skip
    entries = [struct.pack("<HHII", tag, *entry) for tag, entry in sorted(tags.items()) if entry is not None]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", after)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


BOMB = zlib.compress(bytes(2**26), 9)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (handmade({256: (4, 1, 2**31 - 1), 257: (4, 1, 2**31 - 1), 278: (4, 1, 2**31 - 1)}), "over the limit"),
        (handmade({256: (4, 1, 2**31)}), "corrupt"),
        (handmade({256: (4, 1, 0)}), "corrupt"),
        (handmade({257: None}), "corrupt"),
        (handmade({257: (2, 1, 4)}), "corrupt"),  # as text
        (handmade({270: (4, 1, 4), 273: (2, 4, 8)}), "0 starts"),
        (handmade({277: (3, 1, 0)}), "corrupt"),
        (handmade({277: (3, 1, 60_000)}), "truncated"),
        (handmade({278: (4, 1, 0)}), "corrupt"),
        (handmade({278: (4, 1, 1)}), "1 starts and 1 sizes of 4 strips"),
        (handmade({273: (4, 1, 2**31)}), "truncated"),
        (handmade({273: (4, 10**6, 8)}), "beyond its end"),
        (handmade({273: (4, 2**32 - 1, 8)}), "beyond its end"),
        (handmade({279: (4, 1, 2**32 - 1)}), "overlap"),
        (handmade({258: (3, 1, 1)}), "1 bits a sample"),
        (handmade({258: (3, 1, 12)}), "12 bits a sample"),
        (handmade({339: (3, 1, 6)}), "formats"),
        (handmade({339: (3, 1, 3)}), "8 bits a sample"),
        (handmade({317: (3, 1, 3)}), "predictor 3"),
        (handmade({317: (3, 1, 9)}), "predictor 9"),
        *((handmade({259: (3, 1, kind)}), f"compression {kind}") for kind in (2, 4, 6, 7, 34712, 34925, 50000)),
        (handmade({259: (3, 1, 8)}, b"junk"), "corrupt TIFF"),
        (handmade({259: (3, 1, 5)}, b"junk" * 9), "corrupt|truncated"),
        (handmade({259: (3, 1, 8)}, zlib.compress(bytes(15))), "truncated TIFF: block 0 has 15 of 16"),
        (handmade({259: (3, 1, 8), 256: (4, 1, 2**14), 257: (4, 1, 2**14), 278: (4, 1, 2**14)}, BOMB), "over"),
        (handmade({322: (4, 1, 2**20), 323: (4, 1, 2**20), 324: (4, 1, 8), 325: (4, 1, 16)}), "over the limit"),
        (handmade({}, after=24), "round in a circle"),
        (handmade({254: (4, 1, 1)}), "without a picture"),
        (b"II*\0" + struct.pack("<IH", 8, 65_535), "more than 4,096 tags"),
        (b"II*\0", "truncated"),
        (b"II\x07\0" + bytes(30), "version 7"),
        (b"", "0 bytes|not a TIFF"),
        (b"\x89PNG\r\n", "not a TIFF"),
        (np.zeros((2, 2, 2, 2)), "expected a TIFF"),
        (np.zeros((4, 0)), "expected a TIFF"),
        (np.full((4, 4), "a"), "integers or floats"),
        ("a.tif", "expected a TIFF"),
        (np.zeros((9, 9), np.uint8), "no channel 1"),
    ],
)  # fmt: skip
def test_what_lies_is_refused(data, message):
    tracemalloc.start()
    with pytest.raises(BadSample, match=message):
        Bands(4, (0, 1) if "channel 1" in message else (0,))(data, None)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_deflated_bomb_ends_where_the_picture_does():
    data = handmade({259: (3, 1, 8)}, BOMB)
    tracemalloc.start()
    np.testing.assert_array_equal(Tiff(data, LIMIT).read([0]), 0)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (16, 16)}, {"bigtiff": True}])
def test_truncated_files(options):
    whole = tiff(BASE, planarconfig="contig", **options)
    for size in [*range(0, 300, 7), *np.linspace(300, len(whole) - 16, 25).astype(int)]:
        with pytest.raises(BadSample):
            Bands(8, (0, 4))(whole[:size], None)
