"""Digests: short fingerprints of arrays, JSON and files, by which a checkpoint is known to be what was saved.

An array's digest does not depend on where its parts lie. Every word of its bits is mixed with its position in the
array, one-to-one, and the results are summed modulo 2^32. Such sums are exact in any order, so any sharding, mesh and
number of processes gives the same digest; and because the mixing is one-to-one, a change within one element always
changes it. Other changes are missed with a chance of about 2^-64: there are two sums, of differently mixed words.
"""

import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from etils import epath
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, UInt32

from ssljax.bounded import check_small, is_plain, parse_json
from ssljax.rules import leaf_name

MANIFEST = "digests.json"  # of a folder's files, in the folder


def array_digest(x: Array) -> UInt32[Array, "2"]:
    """The digest of an array of any dtype and shape; of the local part of one inside `shard_map`.

    The shape is not part of it, the dtype only as far as it determines the bits.
    """
    return _digest(x, (0,) * x.ndim, x.shape)


def digest_tree(tree: Any) -> dict[str, tuple[str, ...]]:
    """Digests of (global, possibly sharded) arrays by leaf name, as 16 hexadecimal digits.

    Several where replicas of an array differ, that of the first one first. All processes must call it, and all get the
    same.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        return {}
    # Every device digests what it holds, in a program for each shape and sharding: one program for all leaves takes
    # seconds to compile where these take half a second. None of them communicates: XLA:CPU hangs if many do at once.
    parts = [_compiled(x.sharding)(x) for _, x in leaves]
    found = np.asarray(_gathered(leaves[0][1].sharding)(parts))
    return {leaf_name(path): _replicas(x.sharding, sums) for (path, x), sums in zip(leaves, found, strict=True)}


def kinds(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf by name, as in `float32[768,3072]`."""
    kind = lambda x: f"{x.dtype}[{','.join(map(str, x.shape))}]"  # noqa: E731
    return {leaf_name(path): kind(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def json_digest(value: Any) -> str:
    """The digest of a JSON value; the order of keys does not matter."""
    # Read back first: JSON has no tuples, and its keys are strings.
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def write_manifest(folder: epath.Path) -> None:
    """Writes the sizes and digests of all files of a folder into it, atomically."""
    files = {path.relative_to(folder).as_posix(): (path.stat().length, _file_digest(path)) for path in _files(folder)}
    unfinished = folder / f"{MANIFEST}.unfinished"
    unfinished.write_text(_manifest(files))
    unfinished.replace(folder / MANIFEST)


def read_manifest(folder: epath.Path) -> dict[str, tuple[int, str]] | None:
    """(size in bytes, digest) of a folder's files by relative path; None if no manifest was written.

    Raises:
      ValueError: the manifest itself is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        check_small(path)
        text = path.read_text()
        files = parse_json(text)["files"]
        for name, (size, digest) in files.items():
            if {"", ".", ".."} & set(name.split("/")) or not isinstance(size, int) or not isinstance(digest, str):
                raise ValueError(f"no name, size and digest of a file in this folder: {name!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged: {error!r}") from error
    if text != _manifest(files):
        raise ValueError(f"{MANIFEST} is damaged: it does not have its own digest")
    return files


def damaged_files(folder: epath.Path, manifest: dict[str, tuple[int, str]], part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a folder, a line for each that differs from its manifest.

    Presence and sizes of all files are checked, contents of every `parts`-th: processes share the reading.
    """
    problems = []
    for i, (name, (size, digest)) in enumerate(sorted(manifest.items())):
        path = folder / name
        try:
            found = path.stat().length
            if found != size:
                problems.append(f"{name} has {found:,} bytes, not {size:,}")
            elif not is_plain(path):  # a pipe could block for ever
                problems.append(f"{name} is not a plain file")
            elif i % parts == part and (other := _file_digest(path)) != digest:
                problems.append(f"{name} was changed: its digest is {other[:8]}..., not {digest[:8]}...")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error}")
    return problems


def _manifest(files: dict[str, tuple[int, str]]) -> str:
    return json.dumps({"files": files, "digest": json_digest(files)})


def _words(x: Array) -> Array:
    """The bits of an array as uint32: one word an element, two for 64-bit types (in a new last dimension)."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype).bits
    if bits == 64:
        return lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _digest(x: Array, starts: Sequence[Any], whole: Sequence[int]) -> UInt32[Array, "2"]:
    """The digest of the part of an array of shape `whole` that begins at index `starts`: parts add up."""
    words = _words(x)
    inner = words.shape[x.ndim :]
    mixed = _mix(
        words + _positions(words.shape, (*starts, *(0 for _ in inner)), (*whole, *inner)) * np.uint32(0x9E3779B9)
    )
    again = mixed * np.uint32(0x9E3779B1)
    again ^= again >> 15
    # One reduction of both sums: XLA fuses it with all of the above, and nothing as large as `x` is ever stored.
    return jnp.stack(
        lax.reduce(
            (mixed, again),
            (np.uint32(0), np.uint32(0)),
            lambda a, b: (a[0] + b[0], a[1] + b[1]),
            tuple(range(words.ndim)),
        )
    )


def _positions(shape: Sequence[int], starts: Sequence[Any], whole: Sequence[int]) -> Array:
    """The flat index of every element within the whole array, modulo 2^32."""
    flat = jnp.zeros(shape, jnp.uint32)
    for axis, start in enumerate(starts):
        stride = np.uint32(math.prod(whole[axis + 1 :]) % 2**32)
        flat += (lax.broadcasted_iota(jnp.uint32, shape, axis) + jnp.uint32(start)) * stride
    return flat


def _mix(h: Array) -> Array:
    """A one-to-one map of uint32 in which every bit depends on every other (Wellons' `lowbias32`)."""
    h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
    return h ^ (h >> 16)


def _axes(sharding: NamedSharding, ndim: int) -> list[tuple[str, ...]]:
    """The mesh axes that split each dimension of an array."""
    spec = [*sharding.spec, *(None,) * (ndim - len(sharding.spec))]
    return [() if names is None else (names,) if isinstance(names, str) else tuple(names) for names in spec]


@functools.cache
def _compiled(sharding: Sharding) -> Any:
    """x -> uint32 [devices, 2]: the digest of the part on each device, in the order of the mesh."""
    if not isinstance(sharding, NamedSharding):
        return jax.jit(lambda x: array_digest(x)[None])
    mesh = sharding.mesh

    def local(x: Array) -> Array:
        axes = _axes(sharding, x.ndim)
        counts = [math.prod(mesh.shape[name] for name in names) for names in axes]
        starts = [lax.axis_index(names) * size if names else 0 for names, size in zip(axes, x.shape, strict=True)]
        return _digest(x, starts, [size * count for size, count in zip(x.shape, counts, strict=True)])[None]

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=sharding.spec, out_specs=PartitionSpec(mesh.axis_names)))


@functools.cache
def _gathered(sharding: Sharding) -> Any:
    """A list of arrays like those of `_compiled`, as one array, on all processes."""
    replicated = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return jax.jit(jnp.stack, out_shardings=replicated)


def _replicas(sharding: Sharding, sums: np.ndarray) -> tuple[str, ...]:
    """The digests of an array's replicas, without repeats, from those of the parts (uint32 [devices, 2])."""
    if isinstance(sharding, NamedSharding):
        mesh, split = sharding.mesh.shape, {name for names in _axes(sharding, len(sharding.spec)) for name in names}
        parts = tuple(axis for axis, name in enumerate(mesh) if name in split)
        sums = sums.reshape(*mesh.values(), 2).sum(parts, dtype=np.uint32).reshape(-1, 2)
    return tuple(dict.fromkeys(f"{a:08x}{b:08x}" for a, b in sums))


def _files(folder: epath.Path) -> list[epath.Path]:
    found = [path / name for path, _, names in folder.walk() for name in names]
    return sorted(path for path in found if not path.name.startswith(MANIFEST))


def _file_digest(path: epath.Path) -> str:
    # About ten times as fast as SHA-256. It is proof against accidents, not against forgers.
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
