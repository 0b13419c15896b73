"""Point clouds from files to views."""

import io
import time
import tracemalloc
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import plyfile
import pytest
from small import quick_compilation  # noqa: F401
from source_helpers import write_tar

from ssljax.config import build
from ssljax.data import BadSample, Folder, HostTransform, Loader, Points, Reader, Tar, inspect, train_batches
from ssljax.views import PerExample, PointView, point_contrast, strl

FIELDS = [("x", "f4"), ("y", "f4"), ("z", "f8"), ("nx", "f4"), ("quality", "i2"), ("red", "u1"), ("green", "u2")]
FORMS = {"ascii": {"text": True}, "little": {"byte_order": "<"}, "big": {"byte_order": ">"}}


def vertices(count: int = 50) -> np.ndarray:
    rng = np.random.default_rng(0)
    found = np.zeros(count, FIELDS)
    for name, kind in FIELDS:
        found[name] = rng.normal(size=count) if "f" in kind else rng.integers(0, 200, count)
    return found


def ply(found: np.ndarray, form: str = "little", before=(), after=()) -> bytes:
    elements = [*before, plyfile.PlyElement.describe(found, "vertex"), *after]
    file = io.BytesIO()
    plyfile.PlyData(elements, **FORMS[form], comments=["by a test"]).write(file)
    return file.getvalue()


def faces(count: int = 20) -> plyfile.PlyElement:
    found = np.zeros(count, [("vertex_indices", "i4", (3,)), ("flag", "u1")])
    return plyfile.PlyElement.describe(found, "face")


def cameras() -> plyfile.PlyElement:
    return plyfile.PlyElement.describe(np.ones(3, [("focus", "f8"), ("id", "u1")]), "camera")


@pytest.mark.parametrize("form", FORMS)
def test_ply_round_trips(form, tmp_path):
    given = vertices()
    data = ply(given, form, before=[cameras()], after=[faces()])
    (tmp_path / "a.ply").write_bytes(data)
    reader = Points(50, ("red", "nx", "green", "quality"))
    for value in (data, tmp_path / "a.ply"):
        found = reader(value, None)["points"]
        assert found.dtype == np.float32
        expected = np.stack([given[name] for name in ("x", "y", "z")], 1)
        np.testing.assert_allclose(found[:, :3], expected, rtol=1e-5)
        np.testing.assert_allclose(found[:, 3] * 255, given["red"], rtol=1e-5)
        np.testing.assert_allclose(found[:, 4], given["nx"], rtol=1e-5)
        np.testing.assert_allclose(found[:, 5] * 65535, given["green"], rtol=1e-5)
        np.testing.assert_allclose(found[:, 6], given["quality"])


def test_arrays_and_npy_files():
    cloud, file = np.random.default_rng(0).normal(size=(9, 5)), io.BytesIO()
    np.save(file, np.asfortranarray(cloud))
    for value in (cloud, file.getvalue()):
        np.testing.assert_allclose(Points(9, ("a", "b"))(value, None)["points"], cloud.astype(np.float32))
        assert Points(9)(value, None)["points"].shape == (9, 3)


def test_draws():
    cloud = np.arange(30.0).reshape(10, 3)
    rng = np.random.default_rng(0)
    draws = np.stack([Points(4)(cloud, rng)["points"][:, 0] / 3 for _ in range(2000)])
    assert all(len(set(draw)) == 4 for draw in draws)  # without replacement
    counts = np.bincount(draws.astype(int).ravel(), minlength=10)
    assert abs(counts - 800).max() < 120  # 5 standard deviations of about 22
    few = Points(25)(cloud, rng)["points"][:, 0] / 3
    assert set(few[:10]) == set(range(10))
    np.testing.assert_array_equal(Points(5)(cloud, None)["points"][:, 0] / 3, [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(Points(12)(cloud, None)["points"][:, 0] / 3, [*range(10), 0, 1])
    assert isinstance(build(Reader, {"type": "Points", "size": 4, "features": ["red"]}), Points)


def test_unit_sphere_and_odd_points():
    far = np.random.default_rng(0).normal(size=(100, 3)) + 5e6  # as in a projection of the earth
    reader = Points(100, unit_sphere=True)
    found = reader(far, None)["points"]
    assert abs(found.mean(0)).max() < 1e-6
    assert abs(np.linalg.norm(found, axis=1).max() - 1) < 1e-6
    np.testing.assert_allclose(
        found[1] - found[0], (far[1] - far[0]) / np.linalg.norm(far - far.mean(0), axis=1).max(), atol=1e-6
    )
    prepared = reader.prepare(far)
    assert reader.prepare(prepared) is prepared
    np.testing.assert_array_equal(reader(prepared, None)["points"], found)
    far[::2, 1] = np.nan
    assert np.isfinite(reader(far, np.random.default_rng(0))["points"]).all()
    np.testing.assert_array_equal(reader(np.ones((4, 3)), None)["points"], 0)


def header(*lines: str) -> bytes:
    return "\n".join(("ply", *lines, "end_header", "")).encode()


XYZ = ("property float x", "property float y", "property float z")
LITTLE, ASCII = "format binary_little_endian 1.0", "format ascii 1.0"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (header(LITTLE, "element vertex 1000000000", *XYZ) + bytes(1000), "over the limit"),
        (header(LITTLE, "element vertex 1000000", *XYZ) + bytes(1000), "truncated"),
        (header(ASCII, "element vertex 1000000", *XYZ) + b"1 2 3\n" * 100, "truncated"),
        (header(ASCII, "element vertex 3", *XYZ) + b"1 2 3\n" * 2 + b"\n" * 1000, "truncated"),
        (header(LITTLE, "element vertex -5", *XYZ), "-5 of an element"),
        (header(LITTLE, "element vertex x", *XYZ), "corrupt"),
        (header(LITTLE, "element vertex 0", *XYZ), "without a point"),
        (header(ASCII, "element vertex 0", *XYZ), "without a point"),
        (header(ASCII, "element vertex 2", *XYZ) + b"1 2 3\none two three\n", "corrupt"),
        (header(ASCII, "element vertex 2", *XYZ) + b"1 2 3\n4 5" + b"\n" * 9, "corrupt"),
        (header(ASCII, "element vertex 2", *XYZ) + b"1 2 3\n" + b" " * 10**6 + b"4 5 6\n", "more than 192 characters"),
        (header(ASCII, "element vertex 1", *XYZ) + b"1e999 2 3\n", "without a point"),
        (header(ASCII, "element vertex 1", *XYZ) + b"1e99 2 3\n", "32 bits"),
        (header(LITTLE, "element vertex 1", *XYZ[:2]) + bytes(8), "no 'z', only x, y"),
        (header(LITTLE, "element vertex 1", *XYZ, XYZ[0]) + bytes(16), "two properties of one name"),
        (header(LITTLE, "element vertex 1", "property list uchar int a", *XYZ) + bytes(99), "lists"),
        (header(LITTLE, "element f 1", "property list uchar int a", "element vertex 1", *XYZ), "come before"),
        (header(LITTLE, "element f 1000000000000", "property int a", "element vertex 1", *XYZ), "truncated|corrupt"),
        (header(ASCII, "element f 1000000000000", "element vertex 1", *XYZ) + b"1 2 3\n", "truncated"),
        (header(LITTLE, "element vertex 1", "property quad x"), "corrupt"),
        (header(LITTLE, *XYZ), "corrupt"),
        (header("element vertex 1", *XYZ), "no known format"),
        (header(LITTLE, "element face 1", "property int a") + bytes(4), "no element 'vertex'"),
        (header(LITTLE, *["comment"] * 1000), "more than 512 lines"),
        (b"ply\n" + b"x" * 10**6, "does not end"),
        (b"ply", "does not end"),
        (b"", "not a point cloud"),
        (b"solid cube", "not a point cloud"),
        ("a.ply", "or its path"),
        (np.zeros((3, 2)), r"expected numbers \[N, 3\]"),
        (np.zeros((3, 3), complex), "expected numbers"),
        (np.full((3, 3), np.nan), "without a point"),
    ],
)  # fmt: skip
def test_what_lies_is_refused(value, message):
    tracemalloc.start()
    with pytest.raises(BadSample, match=message):
        Points(4)(value, None)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("form", FORMS)
def test_truncated_files(form):
    whole = ply(vertices(20), form)
    for size in range(0, len(whole) - 60, 5):  # within the last line of a text, only numbers would be shorter
        with pytest.raises(BadSample):
            Points(4)(whole[:size], None)


def test_texts_are_read_quickly():
    cloud = np.random.default_rng(0).normal(size=(2**17, 3))
    lines = [f"{x:.4f} {y:.4f} {z:.4f}" for x, y, z in cloud]
    data = header(ASCII, f"element vertex {len(cloud)}", *XYZ) + "\n".join(lines).encode()
    started = time.process_time()
    found = Points(1024)(data, None)["points"]
    assert time.process_time() - started < 3
    np.testing.assert_allclose(found, cloud[np.arange(1024) * 128], atol=1e-4)


# --- from files to views --------------------------------------------------------------------------


def test_real_shapes_become_views(real_data, tmp_path):
    with np.load(real_data / "voxels" / "modelnet10_2class.npz") as archive:
        packed, labels, names = archive["voxels_packed"][::60], archive["labels"][::60], archive["class_names"]
    grids = np.unpackbits(packed).reshape(-1, 32, 32, 32)
    for i, (grid, label) in enumerate(zip(grids, labels, strict=True)):
        found = np.array(list(map(tuple, np.argwhere(grid))), [("x", "f4"), ("y", "f4"), ("z", "f4")])
        folder = tmp_path / "shapes" / str(names[label])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03}.ply").write_bytes(ply(found, list(FORMS)[i % 3]))
    source = Folder(str(tmp_path / "shapes"))
    assert set(source.classes) == set(map(str, names))
    members = {path.name: path.read_bytes() for path in sorted((tmp_path / "shapes").rglob("*.ply"))}
    tar = Tar(str(write_tar(tmp_path / "shapes.tar", members)))
    transform = HostTransform(readers={"points": Points(256, unit_sphere=True)})
    assert source[0]["key"].endswith(tar[0]["key"] + ".ply")
    np.testing.assert_array_equal(transform(tar[0], None)["points"], transform(source[0], None)["points"])
    batch = next(train_batches(source, transform, seed=0, batch_size=8, steps=1, loader=Loader(threads=0)))
    assert (batch["replaced"] == 0).all()
    for recipe in (strl(128), point_contrast(128)):
        seen = jax.jit(build(PerExample, {"views": recipe}))(jax.random.key(0), {"points": batch["points"]})
        assert seen["x1"].shape == seen["x2"].shape == (8, 128, 3)
        assert np.isfinite(seen["x1"]).all()
    found = inspect(source, str(tmp_path / "sheet.png"))
    assert not found["unreadable"]
    assert found["keys"]["points"].endswith(" points")


CLOUD = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)


def seen(view: PointView, draws: int = 200) -> np.ndarray:
    many = jax.jit(jax.vmap(lambda key: view(key, jnp.asarray(CLOUD))))
    return np.asarray(many(jax.random.split(jax.random.key(0), draws)))


def gram(x: np.ndarray) -> np.ndarray:
    return x @ x.swapaxes(-1, -2)


@pytest.mark.parametrize(("rotate", "axis"), [*product(["axis"], range(3)), ("each", 0), ("all", 0)])
def test_rotations_keep_distances_and_turn_normals(rotate, axis):
    found = seen(PointView(rotate=rotate, axis=axis, normals=3))
    place, normals = found[..., :3], found[..., 3:]
    np.testing.assert_allclose(gram(place), np.broadcast_to(gram(CLOUD[:, :3]), (200, 40, 40)), atol=1e-4)
    products = place @ normals.swapaxes(-1, -2)
    np.testing.assert_allclose(products, np.broadcast_to(CLOUD[:, :3] @ CLOUD[:, 3:].T, (200, 40, 40)), atol=1e-4)
    matrices = np.linalg.lstsq(CLOUD[:, :3], place.transpose(1, 0, 2).reshape(40, -1), rcond=None)[0]
    matrices = matrices.reshape(3, 200, 3).transpose(1, 2, 0)
    np.testing.assert_allclose(np.linalg.det(matrices), 1, atol=1e-4)
    if rotate == "axis":
        np.testing.assert_allclose(place[..., axis], np.broadcast_to(CLOUD[:, axis], (200, 40)), atol=1e-6)
    if rotate == "all":  # uniform: the mean of a rotation is 0, of its squared entries 1/3
        assert abs(matrices.mean(0)).max() < 0.2
        np.testing.assert_allclose((matrices**2).mean(0), 1 / 3, atol=0.1)


def test_scale_move_jitter_and_drop():
    norms = np.linalg.norm(seen(PointView(scale=(0.5, 2.0)))[..., :3], axis=-1) / np.linalg.norm(CLOUD[:, :3], axis=-1)
    assert np.ptp(norms, axis=1).max() < 1e-5
    assert (norms.min() >= 0.5 - 1e-6, norms.max() <= 2 + 1e-6) == (True, True)
    moved = seen(PointView(move=0.3)) - CLOUD
    assert np.ptp(moved, axis=1).max() < 1e-5
    assert 0.25 < abs(moved).max() <= 0.3 + 1e-5
    noise = (seen(PointView(jitter=0.1, jitter_limit=0.15)) - CLOUD)[..., :3]
    assert 0.07 < noise.std() < 0.1
    assert abs(noise).max() < 0.15 + 1e-5
    gone = (seen(PointView(drop=0.8)) == CLOUD[0]).all(-1)[:, 1:].mean(1)
    assert 0.3 < gone.mean() < 0.5  # uniform from 0 to 0.8
    subsets = seen(PointView(size=10))
    assert all(len(np.unique(subset, axis=0)) == 10 for subset in subsets)
    np.testing.assert_array_equal(PointView(size=10, rotate="all", jitter=1.0)(None, CLOUD), CLOUD[:10])
    with pytest.raises(ValueError, match="the host gives 40"):
        PointView(size=41)(None, CLOUD)
