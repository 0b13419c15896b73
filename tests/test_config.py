import functools
import json
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from ssljax.config import (
    TYPES,
    ConfigError,
    apply_override,
    build,
    experiment,
    load_config,
    load_variants,
    resolve,
    with_precision,
)
from ssljax.data import Source
from ssljax.listing import config_files
from ssljax.methods import SimCLR
from ssljax.models import ResNet
from ssljax.optim import Optim
from ssljax.views import View

CONFIG = "configs/simclr.py:digits"


@pytest.fixture
def config():
    return load_config(CONFIG)


def test_a_config_becomes_objects(config):
    e = experiment(config)
    assert isinstance(e.method, SimCLR)
    assert isinstance(e.method.encoder, ResNet)
    assert e.optim.b2 == 0.999  # a default, filled in


def test_resolving_and_building_are_inverse(config):
    e = experiment(config)
    plain = json.loads(json.dumps(resolve(e)))
    assert resolve(experiment(plain)) == resolve(e)
    assert plain["optim"]["b2"] == 0.999


def test_overrides(config):
    for override in (
        "optim.lr=1",
        "method.encoder.width=1",
        "mesh.fsdp=2",
        "data.views.views.x1.jitter=0.25",
        "optim.freeze=('a', 'b')",
    ):
        apply_override(config, override)
    e = experiment(config)
    assert e.optim.lr == 1.0
    assert isinstance(e.optim.lr, float)
    assert e.method.encoder.width == 1
    assert e.mesh.fsdp == 2
    assert e.data.views.views["x1"].jitter == 0.25
    assert e.optim.freeze == ("a", "b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.momentums=1", r"config\.optim\.momentums: Optim has no option 'momentums'; did you mean 'momentum'\?"),
        ("method.temperatur=1", r"SimCLR has no option 'temperatur'; did you mean 'temperature'\?"),
        ("stepz=1", r"did you mean 'steps'\?"),
        ("steps=1.5", r"config\.steps should be int, not 1\.5"),
        ("steps=True", r"config\.steps should be int, not True"),
        ("steps=0", r"steps must be at least 1"),
        ("optim.name=adam", r"config\.optim\.name should be .*'adamw'.*not 'adam'"),
        ("method.encoder.type=ResNt", r"'ResNt' is not known; did you mean 'ResNet'\?"),
        ("data.views.views.x1.scale=(0.5,)", r"views\.x1\.scale should be tuple"),
        ("data.train=floder:/x", r"folder"),
        ("data.train=folder:/no/such/place", r"/no/such/place"),
        ("method=None", r"config\.method should be Method"),
        ("optim.lr.x=1", r"optim\.lr is 0\.002: it has no option 'x'"),
        ("nonsense", r"override 'nonsense' should look like optim\.lr=0\.1"),
    ],
)
def test_mistakes_name_the_key_and_what_is_valid(config, override, message):
    def build_with_override():
        apply_override(config, override)
        experiment(config)

    with pytest.raises((ConfigError, ValueError, OSError), match=message):
        build_with_override()


def test_only_what_belongs_there_is_made(config, tmp_path):
    """A saved config may name any public class: one in the wrong place is not made, as making it may open files."""
    made = []

    @dataclass(frozen=True)
    class Opens:
        def __post_init__(self):
            made.append(self)

    for place in ("optim", "method", "method.encoder", "checkpoint"):
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            *parents, last = place.split(".")
            node = functools.reduce(getattr, parents, changed)
            node[last] = ConfigDict({"type": "Opens"})
        with pytest.raises(ConfigError, match=rf"config.{place} should be .*, not Opens"):
            experiment(changed, {"Opens": Opens})
    assert not made


@dataclass(frozen=True)
class Wrapper:
    """A source of what another one has."""

    source: Source

    @property
    def classes(self):
        return self.source.classes

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]


def test_endless_nesting(config):
    nested = {"type": "Digits"}
    for _ in range(2000):
        nested = {"type": "Wrapper", "source": nested}
    plain = config.to_dict()
    plain["data"]["train"] = nested
    with pytest.raises(ConfigError, match="nested too deeply"):
        experiment(plain, {"Wrapper": Wrapper})
    plain["data"]["train"] = {"type": "Wrapper", "source": {"type": "Wrapper", "source": {"type": "Digits"}}}
    assert len(experiment(plain, {"Wrapper": Wrapper}).data.train) > 0


def test_missing_keys_are_named(config):
    del config["steps"]
    with pytest.raises(ConfigError, match=r"Experiment needs steps"):
        experiment(config)


def test_unknown_files_and_variants():
    with pytest.raises(ConfigError, match=r"did you mean 'configs/simclr.py'"):
        load_config("configs/simcrl.py")
    with pytest.raises(ConfigError, match=r"no variant 'cifar'; did you mean 'cifar10'"):
        load_config("configs/simclr.py:cifar")


def test_a_class_of_your_own_needs_no_registration():
    @dataclass(frozen=True)
    class Mine:
        net: nn.Module
        beta: float = 1.0

    built = build(Mine, ConfigDict({"type": Mine, "net": {"type": "Projector"}, "beta": 2}))
    assert built.beta == 2.0
    assert resolve(built)["type"] == "Mine"
    # Its saved form names the class; only who loads it can say which class that is.
    with pytest.raises(ConfigError, match="'Mine' is not known"):
        build(object, {"type": "Mine", "net": {"type": "Projector"}})
    assert build(object, {"type": "Mine", "net": {"type": "Projector"}}, extra_types={"Mine": Mine}).beta == 1.0


def test_precision_reaches_every_module_that_left_it_open(config):
    e = with_precision(experiment(config), "bfloat16")
    assert e.method.encoder.dtype == "bfloat16"
    assert e.method.projector.dtype == "bfloat16"
    x = jnp.zeros((2, 16, 16, 3))
    variables = jax.eval_shape(e.method.encoder.init, jax.random.key(0), x)
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    patches = jax.eval_shape(e.method.encoder.apply, variables, x)["patches"]
    assert patches.dtype == jnp.bfloat16


def test_mappings_of_dataclasses_need_no_type():
    views = build(TYPES["Views"], {"views": {"a": {"size": 8}}})
    assert views.views == {"a": View(8)}
    assert build(Optim, {"decay": [["kernel", 1], [".*", 0]]}).decay == (("kernel", 1.0), (".*", 0.0))


@pytest.mark.parametrize("file", [str(f) for f in config_files("configs")])
def test_every_variant_of_every_config_is_described(file):
    variants = load_variants(file)
    assert "paper" in variants
    for name, variant in variants.items():
        assert variant.__doc__, f"{file}:{name} says nothing about itself"
        assert variant().method.type in TYPES
    assert sys.modules.get("tensorflow") is None
