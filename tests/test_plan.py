"""`ssljax plan`: what it says of tiny configs, of those that do not fit, and of topologies that do not exist."""

import importlib.util
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from small import CONFIGS, SIMCLR, quick_compilation, tiny  # noqa: F401

from ssljax.chips import CHIPS, Topology
from ssljax.cli import main
from ssljax.hlo import Collective
from ssljax.listing import config_files
from ssljax.mesh import Mesh, process_rows
from ssljax.plan import Plan, make_plan, ranked, sweep
from ssljax.run import Run

DIGITS, SCENES = f"{CONFIGS}/simclr.py:digits", f"{CONFIGS}/clip.py:scenes"
TRANSFORMER = {"width": 64, "depth": 2, "heads": 4, "projection": 16, "scan": True}
CLIP = (
    f"method.image={ {'type': 'ViT', 'image_size': 16, 'patch': 4, 'remat': 'full', **TRANSFORMER} }",
    f"method.text={ {'type': 'TextTransformer', 'vocab_size': 259, 'context_length': 64, **TRANSFORMER} }",
    "data.size=16",
    "data.views.views.image.size=16",
    "batch_size=64",
    "mesh.min_size=1024",
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is missing: pip install libtpu"
)
REFUSALS = {
    "early": "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
    "HLO temporaries (83.50G) exceeds available HBM (15.75G). HLO module: jit_step.",
    "late": "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 83.50G "
    "of 15.75G hbm. Exceeded hbm capacity by 67.75G.",
}


@pytest.mark.parametrize("file", config_files(CONFIGS), ids=lambda file: file.stem)
def test_the_batch_is_the_one_that_data_would_give(file):
    e = tiny(file)
    read = Run(e, jax.devices()[:1]).batch_shapes
    assumed = Run(replace(e, data=replace(e.data, train=None)), jax.devices()[:1]).batch_shapes
    assert {name: assumed[name] for name in read} == read
    assert assumed.keys() - read.keys() <= {"label"}


@pytest.fixture(scope="module")
def clip() -> Plan:
    return make_plan(SCENES, (*CLIP, "mesh.replica=2", "mesh.fsdp=4"), Topology.parse("h100:8"))


def test_a_plan_adds_up(clip):
    assert clip.chips == 8
    assert clip.mesh == {"replica": 2, "fsdp": 4, "tensor": 1}
    assert clip.remat == {"method.image.remat": "full", "method.text.remat": "none"}
    assert clip.fits
    assert clip.advice == ()
    assert clip.fastest == max(clip.seconds.values())
    assert clip.slowest == sum(clip.seconds.values())
    assert clip.seconds["network"] == sum(row.seconds for row in clip.collectives)
    assert clip.flops > clip.model_flops  # one tower computes its blocks again
    assert clip.mfu == pytest.approx(clip.model_flops / 8 / 989e12 / clip.fastest)
    assert 0 < clip.views["compute"] < clip.seconds["compute"]
    assert 0 < clip.views["memory"] < clip.seconds["memory"]
    rows = 64 / 8
    # picture, text; label, index, replaced; stop
    assert clip.memory["batch"] == rows * (16 * 16 * 3 + 64 * 4 + 3 * 4 + 1)
    assert clip.memory["optimizer"] == pytest.approx(2 * clip.memory["parameters"], rel=0.01)  # Adam's two moments


def test_fsdp_moves_parameters_and_not_activations(clip):
    """Per step at most: two gathers in the forward and backward pass, one sum of gradients; all in float32 here."""
    whole = make_plan(SCENES, CLIP, Topology.parse("h100:8")).memory["parameters"]
    assert clip.memory["parameters"] < 0.4 * whole
    assert sum(row.sent for row in clip.collectives if row.axes == "fsdp") < 6 * whole


def test_json_and_tables(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "150")
    command = ["plan", "--config", DIGITS, "--topology", "h200:8", *SIMCLR, "batch_size=512"]
    assert main([*command, "--json", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    for text in (
        "h200:8: 8 chips",
        "parameters",
        "all-reduce",
        "fits; first bottleneck",
        "views (augmentation), in the step",
        "examples/s",
        "XLA:CPU",
    ):
        assert text in out
    found = json.loads((tmp_path / "plan.json").read_text())
    derived = {"needs", "fits", "fastest", "slowest", "mfu", "bottleneck", "advice"}
    assert set(found) == set(Plan.__dataclass_fields__) | derived
    assert found["capacity"] == 141e9
    assert {row["axes"] for row in found["collectives"]} == {"replica"}
    # The rows for the diagnostics lie on all devices: taking them needs no exchange one by one.
    assert "collective-permute" not in {row["kind"] for row in found["collectives"]}


def test_sweep_ranks_what_fits_first():
    plans = ranked(list(sweep(DIGITS, (*SIMCLR, "mesh.min_size=64"), Topology.parse("h100:8"))))
    assert [plan.mesh["fsdp"] for plan in sorted(plans, key=lambda plan: plan.mesh["fsdp"])] == [1, 8]
    assert [plan.slowest for plan in plans] == sorted({plan.slowest for plan in plans})
    big = replace(plans[0], capacity=1.0, seconds={})
    assert ranked([big, *plans])[-1] is big


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_the_compiler_refuses_does_not_fit(refusal, capsys, monkeypatch):
    def compile_step(self, platform=None):
        raise jax.errors.JaxRuntimeError(REFUSALS[refusal])

    monkeypatch.setattr(Run, "compile_step", compile_step)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", "--config", SCENES, "--topology", "h100:8", *CLIP]) == 0
    out = capsys.readouterr().out
    assert "does not fit: needs 83.50 GiB of 15.75 GiB on each chip" in out
    assert "method.text.remat=full" in out
    assert "batch_size=8" in out
    assert "micro_batches=8: encodes in parts" in out
    assert "Traceback" not in out


def test_other_errors_of_the_compiler_are_shown(monkeypatch):
    def compile_step(self, platform=None):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(Run, "compile_step", compile_step)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        make_plan(DIGITS, SIMCLR, Topology.parse("h100:8"))


@pytest.mark.parametrize("text", ["v5e", "v5e:16", "v5p:4x4", "v3:4x4", "h100:8x8", "h100:", "v5e:4x0", "v5e:4xx4"])
def test_unknown_topologies(text, capsys):
    assert main(["plan", "--config", DIGITS, "--topology", text]) == 1
    assert "write chip:size, for example v5e:16x16" in capsys.readouterr().err


def test_without_the_tpu_compiler(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", "--config", DIGITS, "--topology", "v5e:2x2"]) == 1
    assert "pip install 'ssljax[tpu]'" in capsys.readouterr().err


def test_more_gpus_than_devices():
    with pytest.raises(ValueError, match="needs 64 virtual CPU devices"):
        _ = Topology.parse("h100:64").devices


def test_seconds_of_a_gather_over_gpus():
    """1 GB: within a node at NVLink's rate; between two nodes the eight network cards of each share the work."""
    topology, mesh = Topology.parse("h100:16"), Mesh().create()
    hop = CHIPS["h100"].hop
    inside = Collective("all-gather", 10**9, np.arange(16).reshape(2, 8), 1)
    across = Collective("all-gather", 10**9, np.arange(16).reshape(1, 16), 1)
    pairs = Collective("all-reduce", 10**9, np.arange(16).reshape(2, 8).T, 1)
    assert topology.seconds(inside, mesh) == pytest.approx(7 / 8 / 450 + 3 * hop)
    assert topology.seconds(across, mesh) == pytest.approx(max(7 / 8 / 450, 1 / 2 / 8 / 50) + 4 * hop)
    assert topology.seconds(pairs, mesh) == pytest.approx(2 * (1 / 2 / 50 + hop))


# ------------------------------------------------------------------------------------------------- the TPU compiler


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "chips"), [("v5e:4x4", 16), ("v4:4x4x4", 64), ("v5p:4x4x4", 64), ("v6e:16x16", 256), ("v4:2x2x1", 4)]
)
def test_one_device_is_one_chip(name, chips):
    devices = Topology.parse(name).devices
    assert len(devices) == chips
    assert {device.device_kind for device in devices} == {CHIPS[name.split(":")[0]].kind}


@needs_libtpu
def test_a_slice_that_does_not_exist():
    with pytest.raises(ValueError, match=r"v5e:3x5.*not divisible"):
        _ = Topology.parse("v5e:3x5").devices


@needs_libtpu
def test_seconds_of_a_gather_on_a_torus():
    """1 GB over v5e:16x16: two rings; over one axis of v5e:4x4, a line, half of one."""
    size, link = 10**9, 45e9
    pod = Topology.parse("v5e:16x16")
    everything = Collective("all-gather", size, np.arange(256)[None], 1)
    assert pod.seconds(everything, Mesh().create(pod.devices)) == pytest.approx(255 / 256 * size / (4 * link) + 16e-6)
    part = Topology.parse("v5e:4x4")
    mesh = Mesh(replica=4, fsdp=4).create(part.devices)
    line = Collective("all-gather", size, np.arange(16).reshape(4, 4), 1)
    assert part.seconds(line, mesh) == pytest.approx(3 / 4 * size / link + 3e-6)


@needs_libtpu
def test_a_host_of_a_slice_reads_several_blocks_of_rows():
    rows = process_rows(64, Mesh().create(Topology.parse("v5e:4x4").devices))
    assert len(rows) == 64 / 4
    assert (np.diff(rows) >= 1).all()
    assert (np.diff(rows) > 1).any()


@needs_libtpu
def test_compiled_for_v5e():
    plan = make_plan(DIGITS, SIMCLR, Topology.parse("v5e:2x2"))
    assert plan.fits
    assert plan.capacity == 15.75 * 2**30
    assert {row.axes for row in plan.collectives} == {"replica"}


@needs_libtpu
def test_compiled_for_v5e_with_fsdp():
    plan = make_plan(SCENES, (*CLIP, "mesh.replica=4", "mesh.fsdp=4"), Topology.parse("v5e:4x4"))
    assert plan.fits
    assert {"fsdp", "replica x fsdp"} <= {row.axes for row in plan.collectives}
    gathers = [row for row in plan.collectives if (row.kind, row.axes) == ("all-gather", "fsdp")]
    assert gathers[0].count >= 4  # of every block's parameters, forward and backward


@needs_libtpu
def test_a_batch_that_does_not_fit_and_the_advice():
    """The compiler's own refusal; with what the plan says of micro-batches, the same batch fits."""
    cifar10 = f"{CONFIGS}/simclr.py:cifar10_mini"
    plan = make_plan(cifar10, ("batch_size=262144",), Topology.parse("v5e:2x2"))
    assert not plan.fits
    assert plan.capacity == 15.75 * 2**30
    assert plan.model_flops == plan.flops
    parts = next(line for line in plan.advice if line.startswith("micro_batches=")).split(":")[0]
    in_parts = make_plan(cifar10, ("batch_size=262144", parts), Topology.parse("v5e:2x2"))
    assert in_parts.fits
    assert in_parts.model_flops == plan.model_flops
    assert 1.02 * plan.flops < in_parts.flops < 4 / 3 * plan.flops  # one more forward pass of the encoder
