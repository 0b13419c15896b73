"""Chips and how they are wired: the figures of `ssljax plan`, each with its source."""

import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.lax import Precision

from ssljax.hlo import Collective
from ssljax.metrics import PEAK_FLOPS

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Chip:
    """One accelerator; its bfloat16 peak is `metrics.PEAK_FLOPS[kind]`."""

    kind: str  # jax's `device_kind`
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes/s
    link: float  # bytes/s one way: an ICI link of a TPU; NVLink of a GPU, all links together
    ring: int = 0  # TPU: axes of this many chips, or of a multiple where slices are 3-D, close to a ring
    network: float = 0.0  # GPU: bytes/s one way to other nodes
    hop: float = 1e-6  # seconds until the first byte arrives at the neighbour
    older: str = ""  # the TPU whose program stands in where jaxlib cannot read this one's
    float32: tuple[float, float] = (1.0, 6.0)  # time over bfloat16's of a float32 product: default, highest precision

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return PEAK_FLOPS[self.kind]

    def passes(self, equation: Any) -> float:
        """Time of a matrix product over that of the same in bfloat16, from its jaxpr equation."""
        if all(v.aval.dtype.itemsize < 4 for v in equation.invars[:2]):
            return 1.0
        precision = equation.params["precision"]
        return self.float32[Precision.HIGHEST in (precision if isinstance(precision, tuple) else (precision,))]


# TPUs. Memory is what the compiler leaves to programs, as its refusals say (of 32, 16, 95 and 32 GiB). Its bandwidth
# and the peak: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (v5e: 819 GB/s, 197 TFLOP/s; v5p: 2,765 GB/s, 459 TFLOP/s).
# Links, one way, and 1 us a hop: "How to Scale Your Model" (Austin et al., jax-ml.github.io/scaling-book), part 2:
# v4 45, v5e 45, v5p 90, v6e 90 GB/s, and rings where an axis has 16 chips (v5e, v6e) or a multiple of 4 (v4, v5p). A
# product at `Precision.HIGHEST` is six bfloat16 products on a TPU.
# GPUs. NVIDIA's data sheets of the H100 SXM (80 GB, 3.35 TB/s, NVLink 900 GB/s both ways) and the H200 (141 GB, 4.8
# TB/s), and of DGX H100/H200: eight GPUs a node, a 400 Gbit/s ConnectX-7 for each. TF32 at 495 TFLOP/s is the default
# of float32, and float32 proper has 67. 5 us a hop is a round figure for NCCL over InfiniBand, not a data sheet's.
_GPU: dict[str, Any] = {"link": 450e9, "network": 50e9, "hop": 5e-6, "float32": (2.0, 989 / 67)}
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * 2**30, 1.2e12, 45e9, ring=4),
    "v5e": Chip("TPU v5 lite", 15.75 * 2**30, 0.819e12, 45e9, ring=16),
    "v5p": Chip("TPU v5", 95.73 * 2**30, 2.765e12, 90e9, ring=4, older="v4"),
    "v6e": Chip("TPU v6 lite", 31.24 * 2**30, 1.64e12, 90e9, ring=16, older="v5e"),
    "h100": Chip("NVIDIA H100 80GB HBM3", 80e9, 3.35e12, **_GPU),
    "h200": Chip("NVIDIA H200", 141e9, 4.8e12, **_GPU),
}


@dataclass(frozen=True)
class Topology:
    """Chips and their places: `v5e:16x16` (chips along the axes of the torus), `h100:64` (GPUs, eight a node).

    Its devices only exist for the compiler. One device is one chip: the two TensorCores of a v4 or v5p work as one, so
    v4-128 and v5p-128, which count cores, are 64 chips, `4x4x4`.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @staticmethod
    def parse(text: str) -> "Topology":
        """Raises ValueError for what is no topology."""
        name, _, sizes = text.partition(":")
        shape = tuple(int(n) for n in sizes.split("x") if n.isdecimal())
        axes = {0: 1, 16: 2, 4: 3}[CHIPS[name].ring] if name in CHIPS else 0
        if not axes or len(shape) != axes or len(sizes.split("x")) != axes or 0 in shape:
            raise ValueError(
                f"--topology {text!r}: write chip:size, for example v5e:16x16, v6e:8x8, v5p:4x4x4 (64 chips, v5p-128), "
                f"v4:4x4x4, h100:64; chips: {', '.join(CHIPS)}"
            )
        return Topology(text, CHIPS[name], shape)

    @property
    def tpu(self) -> bool:
        return self.chip.ring > 0

    @cached_property
    def devices(self) -> Sequence[Any]:
        """Compile-only TPUs, or as many virtual CPU devices. Nothing that computes is looked for or touched.

        Raises:
          ImportError: no TPU compiler is installed.
          ValueError: the compiler knows no such slice, or jax has started with fewer CPU devices.
        """
        jax.config.update("jax_platforms", "cpu")
        if not self.tpu:
            return self._virtual_devices()
        if importlib.util.find_spec("libtpu") is None:
            raise ImportError(f"{self.name} needs the TPU compiler (it runs without a TPU): pip install 'ssljax[tpu]'")
        from jax.experimental import topologies

        # Or libtpu asks the cloud's metadata server, for minutes, which machine this is. Any type will do.
        cloud = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
        # Or it refuses to load beside another process that has it. No chip is touched.
        os.environ.update(cloud | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
        options = {"chip_config_name": "megacore"} if self.name.startswith("v4") else {}
        try:
            return topologies.get_topology_desc(self.name, "tpu", **options).devices
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"--topology {self.name}: {error}") from error

    def _virtual_devices(self) -> Sequence[Any]:
        count = self.shape[0]
        with suppress(RuntimeError):  # jax has started: those it has may be enough
            jax.config.update("jax_num_cpu_devices", count)
        if len(jax.devices("cpu")) < count:
            raise ValueError(f"{self.name} needs {count} virtual CPU devices, but jax has started with fewer")
        return jax.devices("cpu")[:count]

    def seconds(self, collective: Collective, mesh: jax.sharding.Mesh) -> float:
        """Time of a collective in a step: what each chip sends over the links that its group can use, and the hops.

        TPUs: along every axis of the torus over which a group extends, in both directions if the axis is a ring and the
        group fills it. GPUs: within the nodes and between them, whichever takes longer.
        """
        n = collective.groups.shape[1]
        twice = 2 if collective.kind == "all-reduce" else 1
        if n < 2:
            return 0.0
        if not self.tpu:
            local = min(
                n, max(np.unique(group // GPUS_PER_NODE, return_counts=True)[1].max() for group in collective.groups)
            )
            nodes = -(-n // local)
            total = twice * collective.count * collective.size
            within, between = total * (local - 1) / local / self.chip.link, total * (nodes - 1) / nodes / local
            hops = math.ceil(math.log2(n))
            return max(within, between / self.chip.network) + twice * collective.count * hops * self.chip.hop
        devices = mesh.devices.ravel()[collective.groups]
        at = np.array([[device.coords for device in group] for group in devices])  # [groups, members, axes]
        if collective.kind == "collective-permute":
            hops = np.abs(at[:, 0] - at[:, 1]).sum(-1).max()
            return collective.sent / self.chip.link + collective.count * hops * self.chip.hop
        links = hops = 0
        for axis, size in enumerate(self.shape):
            extent = len(np.unique(at[0, :, axis]))
            ring = extent == size and size % self.chip.ring == 0
            links += 0 if extent == 1 else 2 if ring else 1
            hops += extent // 2 if ring else extent - 1
        return collective.sent / (links * self.chip.link) + twice * collective.count * hops * self.chip.hop
