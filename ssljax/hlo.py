"""What a compiled program does in a step: its collectives and its memory traffic, read from the text of its HLO.

`compiled.as_text()` is the program of one device after partitioning. Bodies of loops count as often as they run.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128} | {f"{t}{n}": n for t in "fsu" for n in (2, 4, 8, 16, 32, 64)}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_IOTA = re.compile(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?")
# Operations that only name memory, and those whose traffic is that of the computation they call.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"while", "call", "conditional", "async-start"}
_SLICES = {"slice", "dynamic-slice", "gather"}
_PASSED_ON = {"tuple", *KINDS}  # inside a fusion: what its operands are only carried through


@dataclass(frozen=True)
class Collective:
    """One collective of the program.

    `size` is its larger side in bytes per device: what is reduced, gathered, permuted. `groups` holds the devices that
    take part together, as positions in the mesh: int [groups, members]; pairs (from, to) of a permutation.
    """

    kind: str
    size: int
    groups: np.ndarray
    count: float  # executions a step

    @property
    def sent(self) -> float:
        """Bytes a device sends in a step: in a ring (n - 1) / n of the size, for an all-reduce twice that."""
        n = self.groups.shape[1]
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(self.kind, (n - 1) / n)
        return self.count * share * self.size

    def axes(self, mesh: dict[str, int]) -> tuple[str, ...]:
        """The axes of a mesh (name -> size) along which it goes."""
        places = np.unravel_index(self.groups, tuple(mesh.values()))
        return tuple(name for name, at in zip(mesh, places, strict=True) if (at != at[:, :1]).any())


@dataclass(frozen=True)
class _Array:
    size: int  # bytes
    main: bool  # in main memory (HBM), not in one of the TPU's small fast ones
    scalar: bool


@dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    arrays: tuple[_Array, ...]  # of its result
    operands: tuple[str, ...]
    inside: str  # the text between its parentheses
    behind: str  # its attributes
    root: bool

    @property
    def size(self) -> int:
        return sum(a.size for a in self.arrays)

    @property
    def in_main(self) -> int:
        """Bytes of its result in main memory."""
        return sum(a.size for a in self.arrays if a.main)

    def attribute(self, pattern: str, default: str = "") -> str:
        found = re.search(pattern, self.behind)
        return found[1] if found else default

    @property
    def called(self) -> str:
        return self.attribute(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")


class Program:
    """The parsed text of a module.

    Attributes:
      collectives: all of them; the two halves of an asynchronous one count once.
      traffic: bytes that one device reads from and writes to main memory in a step. Operations read their operands and
        write their results; nothing inside a fusion does. What lies in a TPU's fast memory is free, and of an operand
        that is only sliced the slices are read.
      unknown_loops: names of the loops whose length the text does not say. Their bodies count once.
    """

    def __init__(self, text: str):
        self._computations, entry = _parse(text)
        self._runs: dict[str, float] = defaultdict(float)
        self._fused: set[str] = set()
        self.unknown_loops: list[str] = []
        self._visit(entry, 1.0, fused=False)
        devices = math.prod(
            int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.split("\n")[0])
        )
        self.collectives = self._find_collectives(devices)
        self.traffic = sum(
            times * self._traffic_of(i, computation)
            for computation, times in self._runs.items()
            for i in self._computations[computation].values()
            if computation not in self._fused
        )

    def _visit(self, computation: str, times: float, fused: bool) -> None:
        self._runs[computation] += times
        if fused:
            self._fused.add(computation)
        for i in self._computations[computation].values():
            if i.opcode == "while":
                self._visit(i.called, times * self._trips(i), fused)
            elif i.opcode in ("call", "fusion", "async-start"):
                self._visit(i.called, times, fused or i.opcode == "fusion")
            elif i.opcode == "conditional":  # every branch counts: an upper bound
                for branch in re.findall(r"_computations?=\{?([^,}]*(?:, %[^,}]*)*)", i.behind):
                    for name in re.findall(r"%?([\w.\-]+)", branch):
                        self._visit(name, times, fused)

    def _trips(self, loop: _Instruction) -> int:
        """The known trip count or, as TPU programs do not say it, the constant that the counter is compared with."""
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self._computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        test = next(i for i in condition.values() if i.root)
        limit = condition.get(test.operands[-1]) if test.opcode == "compare" else None
        if limit and limit.opcode == "constant" and "direction=LT" in test.behind and limit.inside.isdecimal():
            return int(limit.inside)  # jax counts from 0 by 1
        self.unknown_loops.append(loop.name)
        return 1

    def _find_collectives(self, devices: int) -> list[Collective]:
        found: list[Collective] = []
        for computation, times in self._runs.items():
            instructions = self._computations[computation].values()
            # The TPU compiler hides an asynchronous collective behind others' work by repeating it in their fusions.
            begins = any("AsyncCollectiveStart" in i.behind for i in instructions)
            sliced = computation.startswith("all-reduce-scatter")  # its form of a reduce-scatter
            for i in instructions:
                kind = i.opcode.removesuffix("-start")
                if kind not in KINDS or (computation in self._fused and not begins and not sliced):
                    continue
                groups, size = _groups(i.behind, devices), i.size
                if kind != i.opcode and kind != "all-reduce":  # the start of the others also returns operands and flags
                    operands = (self._computations[computation][name].size for name in i.operands)
                    size = sum(a.size for a in i.arrays if not a.scalar) - sum(operands)
                if kind == "reduce-scatter":
                    size *= groups.shape[1]
                if "_promoted" in i.attribute(r"to_apply=%?([\w.\-]+)"):  # XLA:CPU adds up bfloat16 in float32
                    size //= 2
                found.append(Collective("reduce-scatter" if sliced else kind, size, groups, times))
        return found

    def _traffic_of(self, i: _Instruction, computation: str) -> int:
        if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")):
            return 0
        table = self._computations[computation]
        operands = [table[name] for name in i.operands if name in table]
        if i.opcode in ("copy-start", "slice-start"):  # both sides are in its result
            sides = [a for a in i.arrays if not a.scalar]
            return min((a.size for a in sides), default=0) * sum(a.main for a in sides)
        if i.opcode == "fusion":
            read = sum(min(x.in_main, self._used(i.called, place)) for place, x in enumerate(operands))
            return int(read + min(i.in_main, self._written(i.called)))
        if i.opcode in _SLICES:
            return i.size * operands[0].arrays[0].main + i.in_main
        if i.opcode == "dynamic-update-slice":
            return operands[1].in_main + operands[1].size * i.arrays[0].main
        return sum(x.in_main for x in operands) + i.in_main

    def _used(self, fusion: str, operand: int) -> float:
        """Bytes that a fusion reads of an operand: of one that is sliced the slices, of one updated in place none."""
        instructions = self._computations[fusion].values()
        parameter = next(i for i in instructions if i.opcode == "parameter" and i.inside == str(operand))

        def of(name: str) -> float:
            total = 0.0
            for user in instructions:
                for place in (k for k, operand in enumerate(user.operands) if operand == name):
                    if user.opcode == "bitcast":
                        total += of(user.name)
                    elif user.opcode == "fusion":
                        total += self._used(user.called, place)
                    elif place == 0 and user.opcode in _SLICES:
                        total += user.size
                    elif not (user.opcode in _PASSED_ON or (place == 0 and user.opcode == "dynamic-update-slice")):
                        return math.inf
            return total

        return of(parameter.name)

    def _written(self, fusion: str) -> int:
        """Bytes that a fusion writes: of an array updated in place, the update."""
        instructions = self._computations[fusion]

        def of(i: _Instruction) -> int:
            operands = [instructions[name] for name in i.operands if name in instructions]
            if i.opcode == "tuple":
                return sum(map(of, operands))
            if i.opcode == "bitcast":
                return of(operands[0])
            if i.opcode == "dynamic-update-slice":
                return operands[1].size
            return 0 if i.opcode == "parameter" or i.opcode in _PASSED_ON else i.size

        return of(next(i for i in instructions.values() if i.root))


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """Computation -> name -> instruction, and the name of the entry."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, inside = "", {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            root, name, rest = match.groups()
            rest = re.sub(r"/\*.*?\*/", "", rest)
            end = _closing(rest) if rest.startswith("(") else rest.index(" ")
            opcode, _, rest_ = rest[end:].lstrip().partition("(")
            close = _closing("(" + rest_) - 1
            within, behind = rest_[: close - 1], rest_[close:]
            operands = tuple(re.findall(r"%([\w.\-]+)", within))
            inside[name] = _Instruction(name, opcode, _arrays(rest[:end]), operands, within, behind, root is not None)
        elif match := _COMPUTATION.match(line):
            inside = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
    return computations, entry


def _closing(text: str) -> int:
    """The place behind the parenthesis that closes the one at the start."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _arrays(text: str) -> tuple[_Array, ...]:
    found = []
    for kind, shape, layout in _ARRAY.findall(text):
        bits = _BITS.get(kind, 8 if kind.startswith("f8") else 0)  # tokens hold nothing
        count = math.prod(int(n) for n in shape.split(",") if n)
        found.append(_Array(math.ceil(bits * count / 8), not re.search(r"S\([1-9]", layout), not shape))
    return tuple(found)


def _integers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _devices(text: str) -> np.ndarray:
    """`[4,2]<=[2,4]T(1,0)`: the devices 0 .. n as [2, 4], transposed, as [4, 2]. Or `[2,4]T(1,0)`, or `0,2,1,3`."""
    if not (iota := _IOTA.search(text)):
        return np.array(_integers(text))
    shape, source, order = (_integers(part or "") for part in iota.groups())
    return np.arange(math.prod(source)).reshape(source).transpose(order or None).reshape(shape or -1)


def _groups(attributes: str, devices: int) -> np.ndarray:
    """The devices that take part together, int [groups, members], from any of XLA's ways to write them."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}?,", attributes + ","):
        return np.array(_integers(pairs[1])).reshape(-1, 2)
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = (_devices(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))).ravel()
        # A group goes over whole axes ('x'), or over the part of one that has 2 steps within each of 4: 'x':(4)2.
        chosen: dict[str, tuple[int, int]] = {}
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[3]):
            chosen[name] = (int(before or 1), int(size or sizes[name]))
        shape, together = [], []
        for name, size in sizes.items():
            before, part = chosen.get(name, (size, 1))
            together.append(len(shape) + 1)
            shape += [before, part, size // before // part]
        rest = [axis for axis in range(len(shape)) if axis not in together]
        members = math.prod(shape[axis] for axis in together)
        return ids.reshape(shape).transpose(rest + together).reshape(-1, members)
    if iota := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _devices(iota[1])
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if not listed:
        return np.arange(devices)[None]
    return np.array([_integers(group) for group in re.findall(r"\{(.*?)\}", listed[1])])
