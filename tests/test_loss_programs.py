"""What the compiled contrastive losses hold, send and compute, from XLA's own figures. No time is asserted."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from loss64 import make_mesh

from ssljax import losses
from ssljax.flops import matmul_flops
from ssljax.losses import sharded
from ssljax.mesh import BATCH

MIB = 2**20


def dense(image, text, scale):
    logits = scale * jnp.einsum("id,jd->ij", image, text)
    both = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)
    return jnp.mean(both / 2 - jnp.diag(logits))


def two_views(a, b, temperature):
    return losses.nt_xent(a, b, temperature=temperature)


def classes(a, b, temperature):
    ids = jnp.arange(len(a)) // 4
    return losses.sup_con(jnp.concatenate([a, b]), jnp.tile(ids, 2), temperature)


def pairwise(image, text, scale):
    return losses.sigmoid(image, text, scale, -10.0)


def distillation(image, text, scale):
    return losses.similarity_distillation(image, text, text, image, scale=scale)


def queue(query, key, temperature):
    return losses.info_nce(query, key, temperature, jax.lax.stop_gradient(jnp.tanh(query)))


FAMILY = {
    "clip_softmax": losses.clip_softmax,
    "info_nce": losses.info_nce,
    "nt_xent": two_views,
    "sup_con": classes,
    "sigmoid": pairwise,
    "similarity_distillation": distillation,
}


def step(loss, rows, width, shape=(1, 1, 1), dtype=jnp.float32):
    """Value and all gradients, compiled for a mesh with the rows of the towers split over it."""
    mesh = make_mesh(shape)
    by_rows, whole = NamedSharding(mesh, PartitionSpec(BATCH)), NamedSharding(mesh, PartitionSpec())
    tower = jax.ShapeDtypeStruct((rows, width), dtype, sharding=by_rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), out_shardings=(whole, (by_rows, by_rows, whole)))
    with jax.set_mesh(mesh):
        return gradient.lower(tower, tower, scalar).compile()


def temporary(program):
    return program.memory_analysis().temp_size_in_bytes / MIB


def test_memory_is_a_hundredth_of_the_dense_form():
    """65,536 x 512, float32, one device: at most 0.4 % of what the table and its passes take (49,153 MiB)."""
    ours, table = temporary(step(losses.clip_softmax, 65_536, 512)), temporary(step(dense, 65_536, 512))
    assert table > 40_000
    assert ours <= 0.004 * table


@pytest.mark.parametrize("name", FAMILY)
def test_memory_grows_with_the_rows(name):
    """From 16k to 262k rows of 512: temporary memory grows at most 16 times, as the rows do."""
    small, large = (temporary(step(FAMILY[name], rows, 512)) for rows in (16_384, 262_144))
    assert large <= 16.5 * small
    tower = 262_144 * 512 * 4 / MIB * (2 if name in ("nt_xent", "sup_con") else 1)
    assert large <= 4.1 * tower


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("limit", [2**30, 0])
def test_products(name, limit, monkeypatch):
    """FLOPs of value and gradients on 8 devices, all together: 8 B^2 D, 6 (2B)^2 D for rows against themselves."""
    monkeypatch.setattr(sharded, "GATHER_LIMIT", limit)
    b, d = 4096, 64
    tower, scale = jax.ShapeDtypeStruct((b, d), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    with jax.set_mesh(make_mesh((4, 2, 1))):
        flops = matmul_flops(jax.value_and_grad(FAMILY[name], argnums=(0, 1, 2)), tower, tower, scale)
    products = {"nt_xent": 6 * 4, "sup_con": 6 * 4, "similarity_distillation": 12}.get(name, 8)  # the teacher's: 2 + 2
    assert flops <= (products + 0.2) * b * b * d


@pytest.mark.parametrize("limit", [2**30, 0])
def test_memory_on_eight_devices(limit, monkeypatch):
    """Gathered, a device holds a whole tower and its gradient; in the ring a few blocks of 1/8."""
    monkeypatch.setattr(sharded, "GATHER_LIMIT", limit)
    tower = 65_536 * 512 * 4 / MIB
    assert temporary(step(losses.clip_softmax, 65_536, 512, (4, 2, 1))) <= (2.3 if limit else 1.2) * tower


def traffic(program):
    """Kind and size in bytes of all communication of more than one number per row."""
    text = program.as_text()
    found = re.findall(r"= (\S+\[[\d,]*\])\S* (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text)
    sizes = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
    result = []
    for shape, kind in found:
        dtype, *dims = re.findall(r"\w+", shape)
        if len(dims) > 1:
            result.append((kind, sizes[dtype] * int(jnp.prod(jnp.array([int(d) for d in dims])))))
    return sorted(result)


@pytest.mark.parametrize("name", FAMILY)
def test_one_gather_and_one_reduce_scatter(name):
    """On 8 devices, for a tower [512, 64]; a tower against itself needs the gather alone."""
    tower = 512 * 64 * 4
    expected = {
        "nt_xent": [("all-gather", 2 * tower)],
        "sup_con": [("all-gather", 2 * tower)],
        "similarity_distillation": [("all-gather", tower)] * 2 + [("reduce-scatter", tower // 8)],
    }.get(name, [("all-gather", tower), ("reduce-scatter", tower // 8)])
    got = traffic(step(FAMILY[name], 512, 64, (4, 2, 1)))
    if name == "sup_con":  # the test's own concatenation moves rows
        got = [item for item in got if item[0] == "all-gather"][:1]
    assert got == expected


def test_bfloat16_halves_the_gather():
    """Bytes of bfloat16 towers travel as such, also in a compiler that would rather multiply in float32."""
    got = traffic(step(losses.clip_softmax, 512, 64, (4, 2, 1), jnp.bfloat16))
    assert ("reduce-scatter", 512 * 64 * 4 // 8) in got
    assert [size for kind, size in got if kind == "all-gather"] in ([512 * 64 * 2], [512 * 64 * 4])


def test_the_ring_gathers_nothing(monkeypatch):
    monkeypatch.setattr(sharded, "GATHER_LIMIT", 0)
    kinds = {kind for kind, _ in traffic(step(losses.clip_softmax, 512, 64, (4, 2, 1)))}
    assert kinds == {"collective-permute"}


@pytest.mark.parametrize("name", [*FAMILY, "queue"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 1)])
def test_no_table_of_all_rows(name, shape, monkeypatch):
    """Tiles of 16 x 16 for 96 rows: the compiled gradient has no array of 96 x 96 (or of 12 x 96 on 8 devices)."""
    monkeypatch.setattr(sharded, "TILE", dict.fromkeys(sharded.TILE, 16))
    text = step(FAMILY.get(name, queue), 96, 8, shape).as_text()
    assert not re.search(r"\[(\d+,)*(96|192|12|24),(96|192)\]", text)
