"""Collectives and memory traffic read from HLO: on snippets by hand, and on programs compiled for eight CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ssljax.hlo import Collective, Program
from ssljax.mesh import Mesh

SUM = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def module(body: str, before: str = "", partitions: int = 8) -> Program:
    return Program(
        f"HloModule m, is_scheduled=true, num_partitions={partitions}\n{before}\n"
        f"ENTRY %main (x: f32[4,16]) -> f32[4,16] {{\n{body}\n}}\n"
    )


def groups_of(text: str, partitions: int = 8) -> list[list[int]]:
    line = f"  ROOT %g = f32[32,16]{{1,0}} all-gather(%x), channel_id=1, {text}, dimensions={{0}}"
    program = module(f"  %x = f32[4,16]{{1,0}} parameter(0)\n{line}", partitions=partitions)
    return program.collectives[0].groups.tolist()


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_groups(text, groups):
    assert groups_of(text) == groups


def test_bytes_and_axes():
    """Eight devices as replica 2 x fsdp 4."""
    rows = np.arange(8).reshape(2, 4)
    mesh = {"replica": 2, "fsdp": 4, "tensor": 1}
    assert Collective("all-reduce", 1000, rows, 3).sent == 3 * 2 * 3 / 4 * 1000
    assert Collective("all-gather", 1000, rows, 1).sent == 750
    assert Collective("collective-permute", 1000, np.array([[0, 1], [1, 0]]), 2).sent == 2000
    assert Collective("all-gather", 1, rows, 1).axes(mesh) == ("fsdp",)
    assert Collective("all-gather", 1, rows.T, 1).axes(mesh) == ("replica",)
    assert Collective("all-gather", 1, rows.reshape(1, 8), 1).axes(mesh) == ("replica", "fsdp")
    assert Collective("all-reduce", 1, np.arange(8)[:, None], 1).axes(mesh) == ()


def test_asynchronous_halves_count_once():
    program = module(
        """  %x = f32[4,16]{1,0} parameter(0)
  %start = (f32[4,16]{1,0}, f32[32,16]{1,0}) all-gather-start(%x), replica_groups={}, dimensions={0}
  %done = f32[32,16]{1,0} all-gather-done(%start)
  %moving = (f32[4,16]{1,0}, f32[4,16]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  ROOT %moved = f32[4,16]{1,0} collective-permute-done(%moving)"""
    )
    assert [(c.kind, c.size, c.count) for c in program.collectives] == [
        ("all-gather", 32 * 16 * 4, 1),
        ("collective-permute", 4 * 16 * 4, 1),
    ]


LOOP = """
%body (s: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
  %s = (s32[]{:T(128)}, f32[4,16]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[4,16]{1,0:T(8,128)S(1)} get-tuple-element(%s), index=1
  %y = f32[4,16]{1,0:T(8,128)S(1)} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %r = (s32[], /*index=1*/f32[4,16]{1,0:T(8,128)S(1)}) tuple(%next, %y)
}

%condition (s: (s32[], f32[4,16])) -> pred[] {
  %n = s32[] constant(12)
  %s = (s32[], f32[4,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
"""


@pytest.mark.parametrize(
    ("known", "condition", "count", "unknown"),
    [
        ("", LOOP, 12, []),  # TPU programs: the condition says it
        (', backend_config={"known_trip_count":{"n":"5"}}', LOOP, 5, []),
        ("", LOOP.replace("direction=LT", "direction=NE"), 1, ["loop"]),
    ],
)
def test_loops(known, condition, count, unknown):
    program = module(
        f"""  %x = f32[4,16]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,16]{{1,0}}) tuple(%zero, %x)
  %loop = (s32[], f32[4,16]{{1,0}}) while(%start), condition=%condition, body=%body{known}
  ROOT %y = f32[4,16]{{1,0}} get-tuple-element(%loop), index=1""",
        SUM + condition,
    )
    assert [(c.kind, c.size, c.count) for c in program.collectives] == [("all-reduce", 256, count)]
    assert program.unknown_loops == unknown


def test_the_tpu_compiler_s_fusions():
    """A reduce-scatter is a slice of an all-reduce; an asynchronous gather is repeated in the fusions that hide it."""
    gather = "  %g = f32[32,16]{1,0} all-gather(%p), channel_id=1, replica_groups={}, dimensions={0}"
    program = module(
        """  %x = f32[4,16]{1,0} parameter(0)
  %rs = f32[1,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  %start = f32[32,16]{1,0} fusion(%x), kind=kCustom, calls=%begin
  %between = f32[32,16]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  ROOT %done = f32[32,16]{1,0} fusion(%x), kind=kCustom, calls=%end""",
        SUM
        + f"""
%all-reduce-scatter (p: f32[4,16]) -> f32[1,16] {{
  %p = f32[4,16]{{1,0}} parameter(0)
  %r = f32[4,16]{{1,0}} all-reduce(%p), replica_groups={{{{0,2,4,6}},{{1,3,5,7}}}}, to_apply=%add
  %c = s32[] constant(0)
  ROOT %d = f32[1,16]{{1,0}} dynamic-slice(%r, %c, %c), dynamic_slice_sizes={{1,16}}
}}

%begin (p: f32[4,16]) -> f32[32,16] {{
  %p = f32[4,16]{{1,0}} parameter(0)
{gather}
  ROOT %c = f32[32,16]{{1,0}} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.1 (p: f32[4,16]) -> f32[32,16] {{
  %p = f32[4,16]{{1,0}} parameter(0)
{gather.replace("  %g", "  ROOT %g")}
}}

%end (p: f32[4,16]) -> f32[32,16] {{
  %p = f32[4,16]{{1,0}} parameter(0)
{gather}
  ROOT %c = f32[32,16]{{1,0}} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}
""",
    )
    assert [(c.kind, c.size, c.groups.shape) for c in program.collectives] == [
        ("reduce-scatter", 256, (2, 4)),
        ("all-gather", 2048, (1, 8)),
    ]


def test_traffic():
    """A product of arrays in HBM, one of which is then in fast memory, and a slice of a stack."""
    program = module(
        """  %x = f32[4,16]{1,0} parameter(0)
  %stack = f32[12,4,16]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %w = f32[16,16]{1,0:T(8,128)S(1)} parameter(3)
  %y = f32[4,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %z = f32[4,16]{1,0} fusion(%stack, %i, %y), kind=kLoop, calls=%sliced""",
        """
%sliced (p: f32[12,4,16], i: s32[], y: f32[4,16]) -> f32[4,16] {
  %p = f32[12,4,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[4,16]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %s = f32[1,4,16]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,4,16}
  %b = f32[4,16]{1,0} bitcast(%s)
  ROOT %r = f32[4,16]{1,0} add(%b, %y)
}
""",
    )
    array = 4 * 16 * 4
    assert program.traffic == (array + array) + (array + 4 + array + array)  # read x, write y; slice, i, y, write z


def test_a_compiled_program():
    """Eight devices, replica 2 x fsdp 4: weights gathered in a loop of five, a loss summed over all."""
    mesh = Mesh(replica=2, fsdp=4).create()

    def loss(x, weights):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True)), None

        x, _ = jax.lax.scan(layer, x, weights)
        return jax.lax.psum((x * x).sum(), ("replica", "fsdp"))

    specs = PartitionSpec(("replica", "fsdp")), PartitionSpec(None, "fsdp")
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(((16, 32), (5, 32, 32)), specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(loss, in_specs=specs, out_specs=PartitionSpec())
        program = Program(jax.jit(mapped).lower(*arrays).compile().as_text())
    found = {(c.kind, c.axes(dict(mesh.shape))): (c.size, c.count, c.sent) for c in program.collectives}
    weights = 32 * 32 * 4
    assert found == {
        ("all-gather", ("fsdp",)): (weights, 5, 5 * weights * 3 / 4),
        ("all-reduce", ("replica", "fsdp")): (4, 1, 2 * 4 * 7 / 8),
    }
    assert program.unknown_loops == []
