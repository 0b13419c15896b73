"""Volumes from files to views: crops, orientation, spacing, windows; what is damaged is refused."""

import gzip
import io
import itertools
import tracemalloc
from pathlib import Path

import jax
import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from small import quick_compilation  # noqa: F401

from ssljax.config import build, resolve
from ssljax.data import BadSample, Folder, HostTransform, Loader, Reader, Volume, inspect, train_batches
from ssljax.data.scans import open_volume
from ssljax.views import PerExample, VolumeView, swin_unetr

WINDOW = (-1000.0, 3000.0)
OBLIQUE = np.array([[0, -1.5, 0.1, 3], [2, 0, 0, 4], [0, 0.1, -3, 5], [0, 0, 0, 1.0]])  # axes swapped and mirrored


def voxels(shape=(20, 24, 28), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 3000, shape).astype(np.int16)


def nifti(array: np.ndarray, affine=OBLIQUE, kind=nibabel.Nifti1Image) -> bytes:
    return kind(array, affine).to_bytes()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=array.dtype.hasobject)
    return file.getvalue()


def canonical(data: bytes, kind=nibabel.Nifti1Image) -> np.ndarray:
    return nibabel.as_closest_canonical(kind.from_bytes(data)).get_fdata()


FORMS = {"nii": nifti, "nii.gz": lambda array: gzip.compress(nifti(array)), "npy": npy,
         "fortran.npy": lambda array: npy(np.asfortranarray(array)), "npy.gz": lambda array: gzip.compress(npy(array)),
         "nii2": lambda array: nifti(array, kind=nibabel.Nifti2Image)}  # fmt: skip


@pytest.mark.parametrize("as_path", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(20, 24, 28), (20, 24, 28, 3)])
def test_a_box_is_a_slice_of_the_whole(tmp_path, form, shape, as_path):
    array, value = voxels(shape), FORMS[form](voxels(shape))
    whole = canonical(nifti(array)) if "nii" in form else array
    whole = whole.reshape(*whole.shape[:3], -1)
    if as_path:
        (tmp_path / "a").write_bytes(value)
        value = tmp_path / "a"
    with open_volume(value, whole.shape[3]) as scan:
        assert scan.shape == whole.shape[:3]
        for start, stop in (((0, 0, 0), scan.shape), ((3, 5, 7), (4, 19, 20)), ((19, 0, 2), (20, 1, 28))):
            start, stop = np.minimum(start, np.array(scan.shape) - 1), np.minimum(stop, scan.shape)
            inside = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            np.testing.assert_array_equal(scan.box(start, stop), whole[inside])


@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_orientation_is_that_of_nibabel(order, signs):
    affine = np.eye(4)
    affine[:3, :3] = np.diag(np.array(signs) * (1.5, 2.0, 0.5))[list(order)]
    data = nifti(voxels((4, 5, 6)), affine)
    with open_volume(data) as scan:
        np.testing.assert_array_equal(scan.box((0, 0, 0), scan.shape)[..., 0], canonical(data))
        turned = nibabel.as_closest_canonical(nibabel.Nifti1Image.from_bytes(data))
        np.testing.assert_allclose(scan.spacing, turned.header.get_zooms())


def test_slope_and_intercept():
    image = nibabel.Nifti1Image(voxels(), np.eye(4))
    image.header.set_slope_inter(0.5, -100)
    data = image.to_bytes()  # nibabel keeps the intensities: it stores others
    theirs = np.clip((nibabel.Nifti1Image.from_bytes(data).get_fdata() + 1000) / 4000, 0, 1)
    ours = Volume((20, 24, 28), window=WINDOW, dtype="float32")(data, None)["volume"][..., 0]
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for slope in (np.nan, np.inf, 0.0):  # means none, to nibabel as well
        damaged = bytearray(nifti(voxels(), np.eye(4)))
        damaged[112:116] = np.float32(slope).tobytes()
        with open_volume(bytes(damaged)) as scan:
            assert scan.scale == (1, 0)


def test_spacing_is_linear_interpolation():
    affine = np.diag([2.0, 1.5, 3.0, 1])
    data, reader = nifti(voxels(), affine), Volume((40, 36, 84), window=WINDOW, dtype="float32", spacing=(1, 1, 1))
    unit = (voxels() + 1000) / 4000
    expected = ndimage.zoom(unit, (2, 1.5, 3), order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(reader(data, None)["volume"][..., 0], expected, atol=1e-5)


def test_spacing_averages_what_it_skips():
    """Pillow's reduction by its triangle is the same along two axes."""
    plane = np.random.default_rng(0).random((32, 48), np.float32)
    data = nifti(np.repeat(plane[:, :, None], 4, 2), np.eye(4))
    ours = Volume((16, 16, 4), window=(0, 1), dtype="float32", spacing=(2, 3, 1))(data, None)["volume"][..., 0]
    theirs = np.asarray(Image.fromarray(plane).resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(ours, np.repeat(theirs[:, :, None], 4, 2), atol=1e-5)


@pytest.mark.parametrize("spacing", [None, (1.0, 2.5, 0.7)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_random_crops_lie_in_the_whole_and_come_from_the_cache_alike(spacing, dtype):
    data, reader = nifti(voxels()), Volume((12, 8, 30), 3, spacing=spacing, window=WINDOW, dtype=dtype)
    crops = reader(data, np.random.default_rng(1))["volume"]
    assert crops.shape == (3, 12, 8, 30, 1)
    assert crops.dtype == reader.blank()["volume"].dtype == dtype
    assert reader.blank()["volume"].shape == crops.shape
    prepared = reader.prepare(data)
    assert reader.prepare(prepared) is prepared
    cached = reader(prepared, np.random.default_rng(1))["volume"]
    np.testing.assert_allclose(crops.astype(float), cached, atol={"uint8": 1, "uint16": 1, "float32": 1e-6}[dtype])
    assert len(np.unique(crops, axis=0)) == 3
    assert isinstance(reader, Reader)


def test_places_are_uniform():
    array = np.arange(6, dtype=np.uint8).reshape(6, 1, 1) * np.ones((6, 5, 4), np.uint8)
    reader, rng = Volume((4, 5, 4)), np.random.default_rng(0)
    first = [int(reader(array, rng)["volume"][0, 0, 0, 0]) for _ in range(600)]
    counts = np.bincount(first, minlength=3)
    assert len(counts) == 3
    assert counts.min() > 150
    assert int(reader(array, None)["volume"][0, 0, 0, 0]) == 1


def test_small_volumes_lie_in_the_middle_of_zeros():
    crop = Volume((6, 4, 2))(np.full((2, 4, 8), 9, np.uint8), np.random.default_rng(0))["volume"][..., 0]
    expected = np.zeros((6, 4, 2), np.uint8)
    expected[2:4] = 9
    np.testing.assert_array_equal(crop, expected)


def test_windows():
    whole = Volume((2, 2, 2))
    eight = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    np.testing.assert_array_equal(whole(eight, None)["volume"][..., 0], eight)  # as they are
    np.testing.assert_array_equal(np.unique(whole(eight > 3, None)["volume"]), [0, 255])
    odd = np.array([np.nan, -np.inf, np.inf, 0, 1, 2, 3, 4]).reshape(2, 2, 2)
    found = Volume((2, 2, 2), window=(0, 4), dtype="float32")(odd, None)["volume"].ravel()
    np.testing.assert_allclose(found, [0, 0, 1, 0, 0.25, 0.5, 0.75, 1])
    for constant in (0, 7.0, np.nan, -1e30):
        np.testing.assert_array_equal(whole(np.full((2, 2, 2), constant), None)["volume"], 0)
    large = np.random.default_rng(0).normal(100, 20, (64, 64, 64)).astype(np.float32)
    with open_volume(large) as scan:  # 65,536 of 262,144 voxels
        np.testing.assert_allclose(scan.window(), np.percentile(large, (0.5, 99.5)), atol=1.5)


def test_wrong_settings():
    for wrong in ({"count": 0}, {"window": (1, 1)}, {"spacing": (1, 0, 1)}, {"channels": 0}, {"size": (0, 1, 1)}):
        with pytest.raises(ValueError, match=r"must be|millimetres"):
            Volume(**{"size": (4, 4, 4), **wrong})
    reader = build(Reader, {"type": "Volume", "size": (4, 4, 4), "window": [0, 1]})
    assert reader == Volume((4, 4, 4), window=(0, 1))
    assert build(Reader, resolve(reader)) == reader
    views = build(PerExample, {"views": swin_unetr(8)})
    assert build(PerExample, resolve(views)).views == views.views


# --- from real files to views ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_volumes(real_data, tmp_path_factory) -> Path:
    """The real volumes as files: a third each in .npy, .nii and .nii.gz."""
    folder = tmp_path_factory.mktemp("volumes")
    with np.load(real_data / "medical" / "volumes.npz") as archive:
        for i, name in enumerate(archive.files):
            if i % 3 == 0:
                np.save(folder / f"{name}.npy", archive[name])
            else:
                image = nibabel.Nifti1Image(archive[name], np.diag([1.5, 1.5, 1.5, 1]))
                nibabel.save(image, folder / f"{name}.nii{'.gz' if i % 3 == 2 else ''}")
    return folder


def test_real_volumes_become_views(real_volumes, tmp_path):
    source = Folder(str(real_volumes))
    views = build(PerExample, {"views": swin_unetr(24)})
    batches = train_batches(source, HostTransform(readers={"volume": Volume((32, 32, 32), 2)}), seed=0, batch_size=11,
                            steps=2, loader=Loader(threads=0))  # fmt: skip
    batch = next(batches)
    assert batch["volume"].shape == (11, 2, 32, 32, 32, 1)
    assert batch["volume"].dtype == np.uint8
    assert (batch["replaced"] == 0).all()
    assert (batch["volume"].std((1, 2, 3, 4, 5)) > 3).mean() > 0.5  # tissue, not air only
    seen = jax.jit(views)(jax.random.key(0), {"volume": batch["volume"]})
    assert seen["x1"].shape == seen["x2"].shape == (11, 24, 24, 24, 1)
    assert float(abs(seen["x1"] - seen["x2"]).mean()) > 0.01
    found = inspect(source, str(tmp_path / "sheet.png"))
    assert not found["unreadable"]
    assert "52 .. 128 voxels deep" in found["keys"]["volume"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 500


# --- views ----------------------------------------------------------------------------------------


def seen(view: VolumeView, x: np.ndarray, draws: int = 64) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(lambda key: view(key, x)))(jax.random.split(jax.random.key(0), draws)))


GRID = np.random.default_rng(0).integers(0, 256, (6, 6, 4, 1)).astype(np.uint8)


def test_flips_and_turns_are_all_there_are():
    some = {x.tobytes() for x in seen(VolumeView(flip=(0.5, 0.5, 0.5)), GRID)}
    unit = GRID / np.float32(255)
    flips = [np.flip(unit, axes) for k in range(4) for axes in itertools.combinations(range(3), k)]
    assert some == {np.ascontiguousarray(x).tobytes() for x in flips}
    turns = seen(VolumeView(turn=0.75), GRID, 400)
    counts = [sum(np.array_equal(x, np.rot90(unit, k)) for x in turns) for k in range(4)]
    assert sum(counts) == 400
    assert min(counts) > 70


def test_crops_cutout_intensity_and_noise():
    unit = GRID / np.float32(255)
    views = VolumeView(size=(3, 4, 4))
    places = {x.tobytes() for x in seen(views, unit)}
    assert places <= {np.ascontiguousarray(unit[i : i + 3, j : j + 4]).tobytes() for i in range(4) for j in range(3)}
    assert len(places) == 12
    np.testing.assert_array_equal(views(None, unit), unit[1:4, 1:5])
    holes = (seen(VolumeView(cutout=1 / 8), np.ones((8, 8, 4, 1), np.float32)) == 0).sum((1, 2, 3, 4))
    np.testing.assert_array_equal(holes, 4 * 4 * 2)
    changed = seen(VolumeView(scale=0.2, shift=0.1), unit, 500)
    factor, offset = np.polynomial.polynomial.polyfit(unit.ravel(), changed.reshape(500, -1).T, 1)[::-1]
    assert abs(factor - 1).max() < 0.2 + 1e-5
    assert abs(offset).max() < 0.1 + 1e-5
    assert 0.1 < factor.std() < 0.13  # 0.4 / sqrt(12)
    noise = (seen(VolumeView(noise=0.3), unit, 500) - unit).std((1, 2, 3, 4))
    assert 0.12 < noise.mean() < 0.18
    assert len({x.tobytes() for x in seen(VolumeView(size=(3, 4, 4), crop=1), np.stack([GRID * 0, GRID]))}) == 12


def test_blur_is_that_of_scipy():
    x = np.random.default_rng(0).random((12, 10, 9, 2), np.float32)
    ours = seen(VolumeView(blur=1.0, blur_sigma=(1.0, 1.0)), x, 1)[0]
    theirs = ndimage.gaussian_filter(x, 1.0, mode="mirror", radius=3, axes=(0, 1, 2))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_evaluation_normalises_only():
    view = VolumeView(flip=(1, 1, 1), turn=1, noise=1, mean=(0.5,), std=(0.25,))
    np.testing.assert_allclose(view(None, GRID.astype(np.uint16) * 257), (GRID / 255 - 0.5) / 0.25, atol=1e-5)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_truncated_files(form):
    whole = FORMS[form](voxels((8, 9, 10)))
    reader = Volume((8, 9, 10))
    reader(whole, None)
    for size in [*range(0, 400, 7), *np.linspace(400, len(whole) - 40, 30).astype(int)]:
        with pytest.raises(BadSample):
            reader(whole[:size], None)


def changed(data: bytes, at: int, value) -> bytes:
    return data[:at] + value.tobytes() + data[at + value.nbytes :]


SOUND = nifti(voxels((8, 9, 10)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (changed(SOUND, 42, np.int16([32767, 32767, 32767])), "truncated"),
        (changed(SOUND, 42, np.int16([-8, 9, 10])), "expected three sides above 0"),
        (changed(SOUND, 42, np.int16([0, 9, 10])), "expected three sides above 0"),
        (changed(SOUND, 40, np.int16([5, 8, 9, 5, 2, 2])), "at most one more axis"),
        (changed(SOUND, 40, np.int16([9])), "corrupt|not a volume|expected"),
        (changed(SOUND, 70, np.int16([1])), "corrupt|at most 64 bits"),  # one bit a voxel
        (changed(SOUND, 70, np.int16([128])), "integers or floats"),  # RGB
        (changed(SOUND, 70, np.int16([1792])), "integers or floats"),  # complex
        (changed(SOUND, 108, np.float32([1e30])), "truncated|corrupt"),
        (changed(SOUND, 108, np.float32([np.nan])), "corrupt"),
        (changed(SOUND, 108, np.float32([-4])), "within the header"),
        (changed(SOUND, 280, np.full(12, np.nan, np.float32)), "corrupt"),
        (changed(SOUND, 280, np.zeros(12, np.float32)), "corrupt"),
        (changed(SOUND, 344, np.frombuffer(b"ni1\0", np.uint8)), "a file of their own"),
        (npy(np.array([[[object()]]])), "pickled objects"),
        (npy(voxels((3, 4))), "expected .D, H, W."),
        (npy(voxels((3, 0, 4))), "expected .D, H, W."),
        (npy(np.array([[["a"]]])), "integers or floats"),
        (npy(voxels((4, 4, 4, 2))), "has 2 channels"),
        (b"", "0 bytes"),
        (b"GIF89a" + bytes(1000), "not a volume"),
        ("scan.nii", "expected the bytes of a file, or its path"),
        (None, "expected the bytes"),
        (np.array([[[None]]]), "integers or floats"),
        (gzip.compress(b"")[:-4], "gzip"),
        (gzip.compress(b"hello"), "not a volume"),
    ],
)  # fmt: skip
def test_what_lies_is_refused(value, message):
    with pytest.raises(BadSample, match=message):
        Volume((4, 4, 4))(value, None)


def test_spacing_needs_voxels_of_a_size():
    with pytest.raises(BadSample, match="how large its voxels are"):
        Volume((4, 4, 4), spacing=(1, 1, 1))(voxels(), None)
    tiny = nifti(voxels((8, 9, 10)), np.diag([1e-8, 1e-8, 1e-8, 1]))
    assert Volume((4, 4, 4), spacing=(1, 1, 1))(tiny, None)["volume"].shape == (4, 4, 4, 1)
    huge = nifti(voxels((8, 9, 10)), np.diag([1e9, 1e9, 1e9, 1]))
    assert Volume((4, 4, 4), spacing=(1, 1, 1))(huge, None)["volume"].shape == (4, 4, 4, 1)
    with pytest.raises(BadSample, match="over the limit"):
        Volume((4, 4, 4), spacing=(1, 1, 1)).prepare(huge)


def test_bombs_cost_nothing(tmp_path):
    bomb = gzip.compress(changed(SOUND, 42, np.int16([2000, 2000, 2000]))[:352] + bytes(2**28), 9)
    sparse = tmp_path / "sparse.nii"
    sparse.write_bytes(changed(SOUND, 42, np.int16([5000, 5000, 5000]))[:352])
    with open(sparse, "r+b") as file:
        file.truncate(352 + 2 * 5000**3)
    tracemalloc.start()
    with pytest.raises(BadSample, match="over the limit"):
        Volume((64, 64, 64))(bomb, None)
    with pytest.raises(BadSample, match="over the limit"):
        Volume((64, 64, 64)).prepare(sparse)
    Volume((16, 16, 16))(sparse, np.random.default_rng(0))
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
