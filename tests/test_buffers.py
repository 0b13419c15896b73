"""Memory of batches is used again, and never while anyone can see it."""

import pickle
import threading

import jax
import numpy as np
import pytest

from ssljax.data.buffers import Buffers

SHAPE = (256, 512)  # float32: 512 KiB


def filled(buffers, value, count=4):
    batch = buffers.arrays({"x": ((count, *SHAPE), np.dtype(np.float32)), "label": ((count,), np.dtype(np.int32))})
    batch["x"][...] = value + np.arange(count)[:, None, None]
    return batch


def address(batch):
    return batch["x"].ctypes.data


def test_an_array_comes_again_when_it_was_let_go():
    buffers = Buffers()
    first = filled(buffers, 0)
    place = address(first)
    second = filled(buffers, 10)
    assert address(second) != place
    np.testing.assert_array_equal(first["x"][:, 0, 0], np.arange(4))
    del first
    assert address(filled(buffers, 20)) == place
    np.testing.assert_array_equal(second["x"][:, 0, 0], np.arange(10, 14))


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
def test_whoever_holds_a_part_keeps_the_whole(hold):
    buffers = Buffers()
    batch = filled(buffers, 0)
    held, before = hold(batch["x"]), None
    if not hasattr(held, "__next__"):
        before = np.array(held)
    place = address(batch)
    del batch
    others = [filled(buffers, 100 * i) for i in range(1, 4)]
    where = place
    if isinstance(held, jax.Array):
        where = held.unsafe_buffer_pointer()
    elif isinstance(held, np.ndarray):
        where = held.ctypes.data
    if where not in range(place, place + 2**21):
        return  # jax has made a copy, as it does of memory that is not aligned
    assert place not in map(address, others)
    if before is not None:
        np.testing.assert_array_equal(np.array(held), before)


def test_threads_never_share_one():
    buffers, wrong = Buffers(), []

    def work(number):
        for i in range(60):
            batch = filled(buffers, 1_000 * number + i)
            if not (batch["x"][:, ::64, ::64] == (1_000 * number + i + np.arange(4))[:, None, None]).all():
                wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(map(len, buffers._arrays.values())) <= 8  # a thread lets its batch go when it has the next


def test_small_arrays_and_other_shapes():
    buffers = Buffers()
    batch = buffers.arrays({"x": ((2, 3), np.dtype(int)), "y": ((2, *SHAPE), np.dtype(float))})
    assert batch["x"].shape == (2, 3)
    assert batch["y"].shape == (2, *SHAPE)
    assert filled(pickle.loads(pickle.dumps(buffers)), 0)["x"].shape == (4, *SHAPE)
