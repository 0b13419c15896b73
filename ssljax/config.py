"""Configs: nested dicts to dataclasses and back.

The dataclass is the schema. A nested dict whose key `type` names a class of `TYPES` (or is a class itself, for a
method of your own) becomes that class; where a field's annotation is a concrete dataclass, `type` may be left out.
Unknown keys and wrong types raise with the dotted path and the nearest valid name. `resolve` turns the result back
into plain JSON with every default filled in.
"""

import ast
import dataclasses
import difflib
import importlib.util
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from beartype.door import is_bearable
from flax import linen as nn
from ml_collections import ConfigDict

from ssljax import data, evals, methods, models, views
from ssljax.checkpoint import Checkpoints
from ssljax.data import HostTransform, Loader, Reader, Sampling, Source, Tokenizer, parse_source
from ssljax.evals import Evaluation
from ssljax.guard import Guard
from ssljax.mesh import Mesh
from ssljax.method import Method
from ssljax.optim import Optim
from ssljax.watchdog import Heartbeats


class ConfigError(ValueError):
    """A config that cannot be built; the message names the key."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads."""

    train: Source | None  # a source, or "folder:/my/images" and the like; None in encoders loaded without their data
    views: Any  # (key, batch) -> batch, on the device: the training views
    eval_view: Any  # the same for frozen features: deterministic
    size: int | None = None  # side of the square that the host fits every image to; None where it cuts the views
    tokenizer: Tokenizer | None = None  # for sources with captions
    readers: Mapping[str, Reader] = dataclasses.field(default_factory=dict)  # of videos, volumes, ...: by entry
    sampling: Sampling = Sampling()
    loader: Loader = Loader()

    def __post_init__(self):
        if self.train is not None:
            self.sampling.order(self.train, seed=0)  # raises where the two do not go together

    def transform(self, views: Any) -> HostTransform:
        """What the host does to a record for these views."""
        crops, augment = getattr(views, "host_crops", None), getattr(views, "host", "fit") == "augment"
        return HostTransform(self.size, crops, augment, self.tokenizer, self.readers)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that defines a run."""

    method: Method
    data: Data
    steps: int
    batch_size: int  # global
    micro_batches: int = 1  # encode the batch in so many parts, one loss over all: less memory, a third more work
    deterministic: int = 0  # logical shards of a batch, 2^k: the same bits on 1, 2, ... 2^(k-1) devices; 0: off
    optim: Optim = Optim()
    mesh: Mesh = Mesh()
    precision: Literal["float32", "bf16"] = "float32"  # of the computation; parameters, losses, statistics: float32
    seed: int = 0
    log_every: int = 50
    eval_every: int = 0  # 0: only before the first and after the last step
    evals: Mapping[str, Evaluation] = dataclasses.field(default_factory=dict)
    checkpoint: Checkpoints = Checkpoints()
    guard: Guard = Guard()
    heartbeats: Heartbeats = Heartbeats()

    def __post_init__(self):
        for name in ("steps", "batch_size", "micro_batches", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        shards = self.deterministic
        if shards and (shards < 2 or shards & (shards - 1)):
            raise ConfigError(f"deterministic must be 0 (off) or 2, 4, 8, ... logical shards, not {shards}")
        for name, parts in (("micro_batches", self.micro_batches), ("deterministic", shards)):
            if parts > 1 and not getattr(self.method, "supports_micro_batches", False):
                raise ConfigError(
                    f"{name}={parts}: {type(self.method).__name__} encodes its batch in one piece; a "
                    "method that can do otherwise says supports_micro_batches = True (docs/add-a-method.md)"
                )


def _public_dataclasses(*modules: types.ModuleType) -> dict[str, type]:
    return {
        name: cls
        for module in modules
        for name, cls in vars(module).items()
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and name in module.__all__
    }


# What `type` may name in a config: the public dataclasses of these packages, by class name.
TYPES: dict[str, type] = _public_dataclasses(methods, models, views, data, evals)


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """'; did you mean ...' or the list of valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"


def build(annotation: Any, value: Any, path: str = "config", extra_types: Mapping[str, type] | None = None) -> Any:
    """Builds `value` (nested dicts, tuples, scalars) as an object of type `annotation`.

    Raises:
      ConfigError: unknown key, wrong type, missing key or unknown `type`, with its dotted path.
    """
    types_by_name = {**TYPES, **(extra_types or {})}
    value = value.to_dict() if isinstance(value, ConfigDict) else value
    if isinstance(value, Mapping):
        annotation = _member(annotation, lambda a: a is not type(None)) if not _is_mapping(annotation) else annotation
        if _is_mapping(annotation):
            item = typing.get_args(annotation)[1] if typing.get_args(annotation) else Any
            return {k: build(item, v, f"{path}.{k}", extra_types) for k, v in value.items() if v is not None}
        return _build_dataclass(annotation, value, path, types_by_name, extra_types)
    if isinstance(value, str) and _member(annotation, lambda a: a is Source) is Source:
        return parse_source(value)
    if isinstance(value, list | tuple):
        value = _tuple(annotation, value, path, extra_types)
    if type(value) is int and _member(annotation, lambda a: a in (int, float, Any)) is float:
        value = float(value)
    # bool is an int to Python, but `steps=True` is surely a mistake.
    if not is_bearable(value, annotation) or (
        type(value) is bool and _member(annotation, lambda a: a in (int, float, bool)) is not bool
    ):
        raise ConfigError(f"{path} should be {_type_name(annotation)}, not {value!r} ({type(value).__name__})")
    return value


def _build_dataclass(annotation: Any, value: Mapping, path: str, types_by_name: Mapping[str, type], extra: Any) -> Any:
    value = dict(value)
    cls = value.pop("type", annotation)
    if isinstance(cls, str) and isinstance(annotation, type) and cls == annotation.__name__:
        cls = annotation
    if isinstance(cls, str):
        if cls not in types_by_name:
            raise ConfigError(f"{path}.type={cls!r} is not known{nearest(cls, types_by_name)}")
        cls = types_by_name[cls]
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(
            f"{path} should be {_type_name(annotation)}; a dict here needs the key 'type', for example type='ResNet'"
        )
    if not _accepts(annotation, cls):  # before it is made: making it may open files
        raise ConfigError(f"{path} should be {_type_name(annotation)}, not {cls.__name__}")
    hints = typing.get_type_hints(cls)
    fields = {
        f.name: f
        for f in dataclasses.fields(cls)
        if f.init and not (issubclass(cls, nn.Module) and f.name in ("parent", "name"))
    }
    for key in value:
        if key not in fields:
            raise ConfigError(f"{path}.{key}: {cls.__name__} has no option {key!r}{nearest(str(key), fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{path}: {cls.__name__} needs {', '.join(missing)}")
    built = {name: build(hints[name], v, f"{path}.{name}", extra) for name, v in value.items()}
    try:
        return cls(**built)
    except (ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} ({cls.__name__}): {error}") from error


def _tuple(annotation: Any, value: Any, path: str, extra: Any) -> tuple:
    args = typing.get_args(_member(annotation, lambda a: typing.get_origin(a) is tuple))
    items = args[:1] * len(value) if args[1:] == (...,) else args
    if len(items) != len(value):
        return tuple(value)
    return tuple(build(item, v, f"{path}[{i}]", extra) for i, (item, v) in enumerate(zip(items, value, strict=True)))


def _member(annotation: Any, wanted: Callable[[Any], bool]) -> Any:
    """The first member of a union (or the annotation itself) that is `wanted`."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if union else (annotation,)
    return next((m for m in members if wanted(m)), None)


def _accepts(annotation: Any, cls: type) -> bool:
    """Whether objects of `cls` can be what `annotation` says."""

    def can_be(member: Any) -> bool:
        try:
            return member is Any or (isinstance(member, type) and issubclass(cls, member))
        except TypeError:  # a protocol with attributes
            return True

    return _member(annotation, can_be) is not None


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (dict, Mapping) or annotation in (dict, Mapping)


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def resolve(value: Any) -> Any:
    """The plain JSON form of a built object, all defaults filled in; `build` of it gives the object back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        skip = ("parent", "name") if isinstance(value, nn.Module) else ()
        fields = [f for f in dataclasses.fields(value) if f.init and f.name not in skip]
        values = {f.name: getattr(value, f.name) for f in fields}
        plain = {k: resolve(v) for k, v in values.items() if not callable(v) or dataclasses.is_dataclass(v)}
        return {"type": type(value).__name__, **plain}
    if isinstance(value, Mapping):
        return {k: resolve(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [resolve(v) for v in value]
    return value


def types_of(value: Any) -> dict[str, type]:
    """The classes a built object consists of, by name: what `build` must know to read its saved form."""
    found: dict[str, type] = {}
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple):
        for item in value:
            found |= types_of(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        found[type(value).__name__] = type(value)
        skip = ("parent", "name") if isinstance(value, nn.Module) else ()
        found |= types_of(
            tuple(getattr(value, f.name) for f in dataclasses.fields(value) if f.init and f.name not in skip)
        )
    return found


def with_precision(value: Any, dtype: str | None) -> Any:
    """A copy in which every Linen module that left its `dtype` open computes in `dtype`."""
    if dtype is None:
        return value
    if isinstance(value, Mapping):
        return {k: with_precision(v, dtype) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(with_precision(v, dtype) for v in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    module = isinstance(value, nn.Module)
    fields = [f.name for f in dataclasses.fields(value) if f.init and not (module and f.name in ("parent", "name"))]
    changed = {name: with_precision(getattr(value, name), dtype) for name in fields}
    if module and "dtype" in changed and changed["dtype"] is None:
        changed["dtype"] = dtype
    return value.clone(**changed) if module else dataclasses.replace(value, **changed)


def experiment(config: ConfigDict | Mapping, extra_types: Mapping[str, type] | None = None) -> Experiment:
    """The `Experiment` of a config, checked."""
    try:
        return build(Experiment, config, "config", extra_types)
    except RecursionError:
        raise ConfigError("the config is nested too deeply") from None


def load_variants(file: str) -> dict[str, Callable[[], ConfigDict]]:
    """The variants of a config file: its `VARIANTS`, name -> function returning a ConfigDict. The first is the default.

    A config file is Python and is executed: treat it like any program you run.
    """
    path = Path(file)
    if not path.is_file():
        others = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise ConfigError(
            f"no config file {file!r}" + (nearest(file, others) if others else f"; {path.parent} has none")
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as for any Python script: a method of your own may lie beside its config
    spec.loader.exec_module(module)
    return module.VARIANTS


def load_config(spec: str, overrides: typing.Sequence[str] = ()) -> ConfigDict:
    """The config `file:variant` (`configs/simclr.py:cifar10`) with overrides such as `optim.lr=0.1` applied."""
    file, _, variant = spec.partition(":")
    variants = load_variants(file)
    variant = variant or next(iter(variants))
    if variant not in variants:
        raise ConfigError(f"{file} has no variant {variant!r}{nearest(variant, variants)}")
    config = variants[variant]()
    for override in overrides:
        apply_override(config, override)
    return config


def apply_override(config: ConfigDict, override: str) -> None:
    """Sets `dotted.path=value` in place: a Python literal or else a string. `build` checks its key and type."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r} should look like optim.lr=0.1")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    *parents, last = path.split(".")
    node = config
    for i, part in enumerate(parents):
        if part not in node or node[part] is None:
            node[part] = ConfigDict()
        node = node[part]
        if not isinstance(node, ConfigDict):
            raise ConfigError(
                f"{'.'.join(parents[: i + 1])} is {node!r}: it has no option {(*parents, last)[i + 1]!r}; "
                "replace it as a whole"
            )
    with node.ignore_type():
        node[last] = ConfigDict(value) if isinstance(value, dict) else value
