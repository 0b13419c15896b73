"""Memory of batches is used again, and never while anyone can see it."""

import jax
import numpy as np
import pytest

from ssljax.data.buffers import Buffers, opened

SHAPE = (4, 256, 512)
KINDS = {"label": ((4,), np.dtype(np.int16)), "x": (SHAPE, np.dtype(np.float32)), "none": ((0, 3), np.dtype(float))}
both = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])


def filled(buffers, value):
    _, batch = buffers.take()
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == KINDS
    batch["x"][...] = value + np.arange(4)[:, None, None]
    return batch


def address(batch):
    return batch["x"].ctypes.data


@both
def test_memory_comes_again_when_it_was_let_go(shared):
    buffers = Buffers(KINDS, shared)
    first = filled(buffers, 0)
    place = address(first)
    second = filled(buffers, 10)
    assert address(second) != place
    np.testing.assert_array_equal(first["x"][:, 0, 0], np.arange(4))
    del first
    assert address(filled(buffers, 20)) == place
    buffers.close()
    np.testing.assert_array_equal(second["x"][:, 0, 0], np.arange(10, 14))


@both
@pytest.mark.parametrize(
    "hold",
    [
        lambda x: x[1:2, 3],
        lambda x: x.reshape(-1)[::7].T,
        memoryview,
        jax.device_put,
        lambda x: jax.device_put(x[:2]),
        lambda x: np.from_dlpack(jax.device_put(x)),
        lambda x: (part for part in [x]),
    ],
    ids=["view", "views of views", "memoryview", "jax", "part of it in jax", "by dlpack", "closure"],
)
def test_whoever_holds_a_part_keeps_the_whole(hold, shared):
    buffers = Buffers(KINDS, shared)
    batch = filled(buffers, 0)
    held, before = hold(batch["x"]), None
    if not hasattr(held, "__next__"):
        before = np.array(held)
    place = address(batch)
    del batch
    others = [filled(buffers, 100 * i) for i in range(1, 4)]
    if isinstance(held, jax.Array):
        assert held.unsafe_buffer_pointer() in range(place, place + 2**21)  # shared, not copied
    assert place not in map(address, others)
    if before is not None:
        np.testing.assert_array_equal(np.array(held), before)


def test_another_process_opens_it_by_name():
    buffers = Buffers(KINDS, shared=True)
    name, batch = buffers.take()
    other = opened(name, KINDS)
    other["x"][...], other["label"][...] = 7, 8
    assert (batch["x"] == 7).all()
    assert (batch["label"] == 8).all()
    assert address(other) != address(batch)
    buffers.close()
    with pytest.raises(FileNotFoundError):
        opened(name, KINDS)
