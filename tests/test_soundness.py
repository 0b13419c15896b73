"""A bit that flips in one device's copy of the state is found, and its device and process are named."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from small import quick_compilation, simclr  # noqa: F401

from ssljax.run import Run
from ssljax.soundness import Soundness, StateError, describe, unequal_copies


@pytest.fixture(scope="module")
def placed():
    """Four replicas of two fsdp shards, with a state that has both split and whole leaves."""
    run = Run(simclr("mesh.replica=4", "mesh.fsdp=2", "mesh.min_size=64"), jax.devices())
    with jax.set_mesh(run.mesh):
        state = run.init()
        yield run, state, Soundness(run.state_shapes, run.state_shardings, run.mesh)


def flipped(array: jax.Array, device: int, bit: int) -> jax.Array:
    """The array with one bit changed in one device's copy only."""
    parts = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == device:
            bits = data.view(np.uint32).reshape(-1)
            bits[bits.size // 2] ^= np.uint32(1) << np.uint32(bit)
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def test_equal_copies_pass(placed):
    _, state, soundness = placed
    assert soundness.has_copies
    soundness.check_copies(state)
    soundness.check_finite(state)


@pytest.mark.parametrize("bit", [0, 13, 31])
@pytest.mark.parametrize("device", [0, 5])
@pytest.mark.parametrize("leaf", ["stem_conv", "stage1_block0/conv2"])
def test_a_flipped_bit_is_found_and_its_device_named(placed, leaf, device, bit):
    _, state, soundness = placed
    first, _, second = leaf.partition("/")
    holder = state.params["encoder"][first]
    holder = holder[second] if second else holder
    good = holder["kernel"]
    holder["kernel"] = flipped(good, device, bit)
    try:
        with pytest.raises(StateError) as caught:
            soundness.check_copies(state)
    finally:
        holder["kernel"] = good
    message = str(caught.value)
    assert f"process 0, device {device}: params/encoder/{leaf}/kernel" in message
    assert message.count("device ") == 1
    assert "That machine computes or stores wrongly" in message


def test_nan_in_a_state_is_named(placed):
    _, state, soundness = placed
    scale = state.params["encoder"]["stem_norm"]["scale"]
    state.params["encoder"]["stem_norm"]["scale"] = scale * np.nan
    try:
        with pytest.raises(StateError, match="not finite: params/encoder/stem_norm/scale"):
            soundness.check_finite(state)
    finally:
        state.params["encoder"]["stem_norm"]["scale"] = scale


def test_one_device_has_no_copies():
    run = Run(simclr(), jax.devices()[:1])
    assert not Soundness(run.state_shapes, run.state_shardings, run.mesh).has_copies


class Device(NamedTuple):
    id: int
    process_index: int


def mesh(processes: int) -> SimpleNamespace:
    devices = np.empty((processes, 1, 1), object)
    for i in range(processes):
        devices[i, 0, 0] = Device(i, i)
    return SimpleNamespace(
        devices=devices,
        shape={"replica": processes, "fsdp": 1, "tensor": 1},
        axis_names=("replica", "fsdp", "tensor"),
    )


def test_of_three_processes_the_odd_one_is_named():
    digests = np.zeros((3, 2, 2), np.uint32)
    digests[1, 0, 0] = 1
    wrong = unequal_copies(digests, [(), ()], mesh(3))
    assert "(process 1, device 1: a). That machine" in describe(wrong, ["a", "b"])


def test_of_two_processes_both_are_named():
    digests = np.zeros((2, 1, 2), np.uint32)
    digests[1, 0, 0] = 1
    text = describe(unequal_copies(digests, [()], mesh(2)), ["a"])
    assert "process 0, device 0: a; process 1, device 1: a" in text
    assert "One of these machines" in text
