"""The pod before the pod: a config's training step, compiled for chips that are not here, and what follows from it.

The program is the one that `ssljax train` runs, through the same code; for TPUs it is compiled by the TPU compiler. Its
memory, its collectives and its traffic are read off; only the times are a model: each of three resources (matrix units,
memory, network) at its full rate, see `Plan.seconds`.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import accumulate, product
from operator import mul
from typing import Any

import jax

from ssljax.chips import GPUS_PER_NODE, Topology
from ssljax.config import Experiment, experiment, load_config
from ssljax.flops import matmul_flops
from ssljax.hlo import Program
from ssljax.mesh import batch_sharding
from ssljax.plan_tables import gib
from ssljax.run import Run

REMAT = ("none", "dots", "full")  # `remat` of `models.Transformer`, the more is computed again the later


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind along the same axes of the mesh."""

    kind: str
    axes: str
    count: float
    sent: float  # bytes
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a training step takes. Bytes, seconds and counts are per chip and step, FLOPs per step of all chips."""

    config: str
    overrides: tuple[str, ...]
    topology: str
    chips: int
    mesh: dict[str, int]
    remat: dict[str, str]  # dotted path of the option -> its value
    batch_size: int
    micro_batches: int
    in_parts: bool  # whether the method can encode more micro-batches
    steps: int
    state: float  # bytes of the whole train state: what a checkpoint holds
    capacity: float  # bytes that programs can have
    memory: dict[str, float]  # bytes: the state by part, batch, outputs not in place of inputs, temporaries, code
    flops: float  # of matrix products, what is rematerialised counted again
    model_flops: float  # the same with nothing computed twice (rematerialisation, micro-batches): what MFU counts
    seconds: dict[str, float]  # each resource alone: compute, memory, network; {} if the step does not fit
    views: dict[str, float]  # the same of the views by themselves: part of the step
    memory_traffic: float  # bytes
    collectives: tuple[Traffic, ...]
    compile_seconds: float
    notes: tuple[str, ...]

    @property
    def needs(self) -> float:
        """Bytes of memory."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needs <= self.capacity

    @property
    def fastest(self) -> float | None:
        """Seconds if all three resources work at the same time."""
        return max(self.seconds.values(), default=None)

    @property
    def slowest(self) -> float | None:
        """Seconds if they take turns."""
        return sum(self.seconds.values()) if self.seconds else None

    @property
    def mfu(self) -> float | None:
        """Ceiling: the share of the peak that is reached if a step takes `fastest`."""
        peak = self.chips * Topology.parse(self.topology).chip.peak
        return self.model_flops / peak / self.fastest if self.fastest else None

    @property
    def bottleneck(self) -> str:
        if not self.seconds:
            return f"memory: {max(self.memory, key=lambda name: self.memory[name])}"
        first = max(self.seconds, key=lambda name: self.seconds[name])
        if first == "network":
            row = max(self.collectives, key=lambda row: row.seconds)
            return f"network: {row.kind} over {row.axes}"
        return {"compute": "compute: matrix products", "memory": "memory bandwidth"}[first]

    @property
    def advice(self) -> tuple[str, ...]:
        """What would make it fit, from the figures; () if it fits."""
        if self.fits:
            return ()
        batch = sum(size for name, size in self.memory.items() if name in ("temporaries", "batch"))
        fixed = self.needs - batch
        advice = []
        state = sum(self.memory[name] for name in ("parameters", "optimizer", "method state", "average"))
        rest = self.mesh["replica"]
        if state > 0.1 * self.capacity and rest > 1:
            advice.append(
                f"mesh.replica=1 mesh.fsdp={self.mesh['fsdp'] * rest}: parameters and optimizer take {gib(state)} on "
                f"every chip, sharded over {rest} times as many about {gib(state / rest)}"
            )
        if less := [f"{name}=full" for name, value in self.remat.items() if value != "full"]:
            advice.append(f"{' '.join(less)}: of every block only the input is kept for the backward pass")
        shards = self.mesh["replica"] * self.mesh["fsdp"]
        room = self.capacity - fixed
        parts = next((2**i for i in range(1, 12) if batch / 2**i <= room), 0) * self.micro_batches
        if self.in_parts and parts and self.batch_size % (parts * shards) == 0:
            advice.append(f"micro_batches={parts}: encodes in parts, one loss over all rows, if temporaries shrink so")
        rows = int(self.batch_size * room / batch) // shards * shards
        if rows > 0:
            advice.append(f"batch_size={rows}, if temporaries shrink in proportion")
        more = -(-self.needs // self.capacity)
        advice.append(f"about {more:.0f} times as many chips for this batch, or chips with {gib(self.needs)}")
        return tuple(advice)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        derived = ("needs", "fits", "fastest", "slowest", "mfu", "bottleneck", "advice")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def make_plan(spec: str, overrides: Sequence[str], topology: Topology) -> Plan:
    """Compiles the training step of a config for a topology. Reads no data and no vocabulary.

    Raises:
      ConfigError, ValueError: the config or the topology is wrong, or they do not go together.
      ImportError: there is no TPU compiler.
    """
    e, chip, chips, notes = _experiment(spec, overrides), topology.chip, len(topology.devices), []
    run, remat = Run(e, topology.devices), dict(_remat_options(e.method, "method"))
    once = "micro_batches=1", *(f"{path}=none" for path in remat)
    plain = Run(_experiment(spec, [*overrides, *once]), topology.devices)
    began = time.perf_counter()
    with jax.set_mesh(run.mesh):
        arguments = run.state_shapes, run.batch_shapes
        flops, timed = (matmul_flops(run.step, *arguments, passes=passes) for passes in (lambda _: 1.0, chip.passes))
        model_flops = matmul_flops(plain.step, *arguments)
        compiled, refusal = _compile(run.compile_step, topology)
    memory, capacity, seconds, traffic, rows, program = _state_memory(run), chip.memory, {}, 0.0, (), None
    if refusal:
        needs, capacity = refusal
        memory["temporaries"] = needs - sum(memory.values())
        notes.append("the compiler refused the program, so there is nothing to read times from")
    else:
        found = compiled.memory_analysis()
        memory["outputs"] = found.output_size_in_bytes - found.alias_size_in_bytes
        memory["temporaries"] = found.temp_size_in_bytes
        memory["code"] = found.generated_code_size_in_bytes
        program, unreadable = _program(compiled, e, topology)
        notes += unreadable
    if program:
        rows, traffic = _table_of(program, run.mesh, topology), program.traffic
        seconds = {"compute": timed / chip.peak / chips, "memory": traffic / chip.bandwidth}
        seconds["network"] = sum(row.seconds for row in rows)
        if program.unknown_loops:
            notes.append(f"loops of unknown length count once: {', '.join(program.unknown_loops)}")
    if not topology.tpu:
        notes.append(
            "compiled by XLA for CPU devices: sharding and collectives as on GPUs, but memory and its traffic are "
            "XLA:CPU's (other fusions, some bfloat16 widened to float32), mostly too high"
        )
    return Plan(
        config=spec,
        overrides=tuple(overrides),
        topology=topology.name,
        chips=chips,
        mesh=dict(run.mesh.shape),
        remat=remat,
        batch_size=e.batch_size,
        micro_batches=e.micro_batches,
        in_parts=getattr(e.method, "supports_micro_batches", False),
        steps=e.steps,
        state=float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.state_shapes))),
        capacity=capacity,
        memory=memory,
        flops=flops,
        model_flops=model_flops,
        seconds=seconds,
        views=_views(run, topology) if seconds else {},
        memory_traffic=traffic,
        collectives=rows,
        compile_seconds=time.perf_counter() - began,
        notes=tuple(notes),
    )


def sweep(spec: str, overrides: Sequence[str], topology: Topology) -> Iterator[Plan]:
    """Plans of other mesh shapes and remat policies, as they are made.

    Meshes: fsdp over nothing, over axes of the torus (or a node of GPUs) or everything; tensor 1 or 2 where there is
    attention. For each, the policy that recomputes least and fits: one that recomputes more takes longer.
    """
    e, chips = _experiment(spec, overrides), len(topology.devices)
    remat = dict(_remat_options(e.method, "method"))
    inner = accumulate(reversed(topology.shape), mul) if topology.tpu else (GPUS_PER_NODE, chips)
    for tensor, fsdp in product((1, 2) if remat else (1,), sorted({1, *inner})):
        replica = chips // (tensor * fsdp)
        if replica * tensor * fsdp != chips or e.batch_size % (replica * fsdp):
            continue
        mesh = [f"mesh.{name}={size}" for name, size in (("replica", replica), ("fsdp", fsdp), ("tensor", tensor))]
        for policy in REMAT if remat else REMAT[:1]:
            plan = make_plan(spec, [*overrides, *mesh, *(f"{path}={policy}" for path in remat)], topology)
            yield plan
            if plan.fits:
                break


def ranked(plans: Sequence[Plan]) -> list[Plan]:
    """Those that fit first, by the time of a step without overlap; then by what they need."""
    return sorted(plans, key=lambda plan: (not plan.fits, plan.slowest or 0.0, plan.needs))


# ---------------------------------------------------------------------------------------------------------------- parts


def _experiment(spec: str, overrides: Sequence[str]) -> Experiment:
    config = load_config(spec, overrides)
    config.data.train, config.evals = None, {}  # some sources open their files when they are made
    return experiment(config)


def _compile(program: Callable[..., Any], topology: Topology) -> tuple[Any, tuple[float, float] | None]:
    """What `program(platform)` compiles, or the compiler's refusal: the bytes that it needs, and those there are."""
    if not topology.tpu:  # this code will never run: LLVM need not optimise it
        jax.config.update("jax_disable_most_optimizations", True)
    try:
        # Code for CPUs alone must not be taken for that of a GPU; GPU's own would not compile here.
        return program(None if topology.tpu else "tpu"), None
    except jax.errors.JaxRuntimeError as error:
        amount = r"\(?([\d.]+)([KMGT])\)?"
        patterns = rf"memory required .*? {amount} exceeds available HBM {amount}", rf"Used {amount} of {amount} hbm"
        found = next((match for pattern in patterns if (match := re.search(pattern, str(error)))), None)
        if not found:
            raise
        needs, there = (float(found[i]) * 2 ** (10 * "KMGT".index(found[i + 1]) + 10) for i in (1, 3))
        return None, (needs, there)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def _program(compiled: Any, e: Experiment, topology: Topology) -> tuple[Program | None, list[str]]:
    """The program, and notes on it.

    v5p and v6e look up embeddings on their SparseCores, and jaxlib 0.10.2 fails on the text of such a program
    (`async-update instruction should have 1 operands`). Then that of the older chip in the same arrangement is read.
    """
    try:
        return Program(compiled.as_text()), []
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
    older = Topology.parse(f"{topology.chip.older}:{'x'.join(map(str, topology.shape))}")
    run = Run(e, older.devices)
    with jax.set_mesh(run.mesh):
        stand_in, refusal = _compile(run.compile_step, older)
    note = f"jaxlib cannot read this chip's program ({reason}); "
    if refusal:
        return None, [f"{note}nor does it fit {older.name}, whose would stand in: no times"]
    return Program(stand_in.as_text()), [f"{note}collectives and memory traffic are those of {older.name}'s"]


def _views(run: Run, topology: Topology) -> dict[str, float]:
    """Seconds of the views alone: nothing of them crosses the network."""
    chip = topology.chip
    with jax.set_mesh(run.mesh):
        flops = matmul_flops(run.views, run.step_key, run.batch_shapes, passes=chip.passes)
        compiled, _ = _compile(run.compile_views, topology)
    traffic = Program(compiled.as_text()).traffic
    return {"compute": flops / chip.peak / len(topology.devices), "memory": traffic / chip.bandwidth}


def _state_memory(run: Run) -> dict[str, float]:
    """Bytes on one chip of the parts of the train state, and of the batch."""
    state, shardings = run.state_shapes, run.state_shardings
    batch = batch_sharding(run.mesh)
    names = {"parameters": "params", "optimizer": "opt", "method state": "method", "average": "ema"}
    sizes: dict[str, float] = {
        name: sum(
            _bytes(leaf, sharding)
            for leaf, sharding in zip(
                jax.tree.leaves(getattr(state, field)), jax.tree.leaves(getattr(shardings, field)), strict=True
            )
        )
        for name, field in names.items()
    }
    return {**sizes, "batch": sum(_bytes(leaf, batch) for leaf in run.batch_shapes.values())}


def _bytes(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> float:
    return float(jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype).size * leaf.dtype.itemsize)


def _table_of(program: Program, mesh: jax.sharding.Mesh, topology: Topology) -> tuple[Traffic, ...]:
    """The collectives by kind and axes, the slowest first."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for c in program.collectives:
        if axes := c.axes(dict(mesh.shape)):
            row = sums[c.kind, " x ".join(axes)]
            row[:] = row[0] + c.count, row[1] + c.sent, row[2] + topology.seconds(c, mesh)
    return tuple(sorted((Traffic(*key, *row) for key, row in sums.items()), key=lambda row: -row.seconds))


def _remat_options(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """(dotted path, value) of every `remat` in a method."""
    for field in fields(value):
        inner: Any = getattr(value, field.name, None)
        if field.name == "remat":
            yield f"{path}.remat", inner
        elif is_dataclass(inner) and field.name != "parent":
            yield from _remat_options(inner, f"{path}.{field.name}")
