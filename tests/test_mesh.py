import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ssljax.mesh import Mesh, check_batch_size, global_batch, process_rows, shardings


@pytest.mark.parametrize(
    ("config", "sizes"),
    [(Mesh(), (8, 1, 1)), (Mesh(fsdp=4), (2, 4, 1)), (Mesh(replica=1, fsdp=-1, tensor=2), (1, 4, 2))],
)
def test_the_rest_of_the_devices(config, sizes):
    assert tuple(config.create().shape.values()) == sizes


def test_sizes_must_fill_the_devices():
    with pytest.raises(ValueError, match=r"does not fill 8 device"):
        Mesh(replica=3).create()
    with pytest.raises(ValueError, match="at most one is -1"):
        Mesh(replica=-1, fsdp=-1).create()


def test_parameters_and_moments_lie_together():
    mesh = Mesh(replica=1, fsdp=4, tensor=2).create()
    block = {
        "attn": {"query": {"kernel": (64, 4, 16), "bias": (4, 16)}, "out": {"kernel": (4, 16, 64), "bias": (64,)}},
        "mlp": {"fc1": {"kernel": (64, 256), "bias": (256,)}, "fc2": {"kernel": (256, 64)}},
    }
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), block, is_leaf=lambda x: isinstance(x, tuple))
    specs = jax.tree.map(lambda s: s.spec, shardings({"params": params, "opt": ({"mu": params},)}, mesh, 1024))
    assert specs["params"] == specs["opt"][0]["mu"]
    assert specs["params"] == {
        "attn": {
            "query": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")},
            "out": {"kernel": P("tensor", None, "fsdp"), "bias": P()},
        },
        "mlp": {"fc1": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}, "fc2": {"kernel": P("tensor", "fsdp")}},
    }


def test_scanned_stacks_keep_their_rules():
    mesh = Mesh(replica=1, fsdp=4, tensor=2).create()
    params = {"blocks": {"attn": {"query": {"kernel": jax.ShapeDtypeStruct((12, 64, 4, 16), np.float32)}}}}
    assert shardings(params, mesh, 1024)["blocks"]["attn"]["query"]["kernel"].spec == P(None, "fsdp", "tensor")


def test_what_does_not_divide_is_replicated():
    mesh = Mesh(replica=1, fsdp=8).create()
    tree = {"odd": jax.ShapeDtypeStruct((4099, 7), np.float32), "small": jax.ShapeDtypeStruct((8, 8), np.float32)}
    assert {k: s.spec for k, s in shardings(tree, mesh, 1024).items()} == {"odd": P(), "small": P()}


def test_batch_size_message_names_sizes_that_work():
    mesh = Mesh().create()
    with pytest.raises(
        ValueError, match=r"batch size 500 is not divisible by the 8 data shards of the mesh; use 496 or 504"
    ):
        check_batch_size(500, mesh)


def test_global_batch_keeps_rows_in_order():
    mesh = Mesh(replica=2, fsdp=2, tensor=2).create()
    np.testing.assert_array_equal(process_rows(16, mesh), np.arange(16))
    rows = np.arange(32, dtype=np.float32).reshape(16, 2)
    placed = global_batch({"x": rows}, 16, mesh)["x"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(4, 2)}
