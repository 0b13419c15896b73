"""Frozen features of whole sources: what evaluation, `ssljax embed` and the report read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ssljax.data import HostTransform, Source, Tokenizer, eval_batches
from ssljax.data.stream import Loader, check_bad_fraction
from ssljax.mesh import data_shards, global_batch, process_rows
from ssljax.method import Batch, Method, Params, State


def viewed(view: Callable[[None, Batch], Batch], batch: Batch) -> Batch:
    """What a method sees of an evaluation batch. Texts have no view."""
    return batch if batch.keys() <= {"text", "label", "index", "mask"} else view(None, batch)


class Encoder:
    """Compiles a method's `features` once and runs it over sources, on all devices of the mesh.

    Args:
      method: anything with `features(params, state, batch)`.
      view: the deterministic evaluation view, `(None, batch) -> batch`.
      transform: the host transform of evaluation.
      batch_size: rows per pass, rounded up to the mesh's data shards; it changes speed and memory, not results.
    """

    def __init__(
        self,
        method: Method,
        view: Callable[[None, Batch], Batch],
        transform: HostTransform,
        mesh: jax.sharding.Mesh,
        batch_size: int = 256,
        loader: Loader = Loader(),
    ):
        self.transform, self.mesh, self.loader = transform, mesh, loader
        shards = data_shards(mesh)
        self.batch_size = -(-batch_size // shards) * shards

        def run(params: Params, state: State, batch: Batch, names: Sequence[str]) -> Batch:
            found = method.features(params, state, viewed(view, batch))
            missing = [name for name in names if name not in found]
            if missing:
                raise ValueError(
                    f"{type(method).__name__} has no features {missing}; for this batch it has {sorted(found)}"
                )
            carried = {name: batch[name] for name in ("label", "index", "mask") if name in batch}
            if "text" in batch:
                carried["tokens"] = batch["text"]
            return {**{name: found[name].astype(jnp.float32) for name in names}, **carried}

        # Replicated results: every process sees all rows, so evaluation code is the same on one process and on many.
        replicated = NamedSharding(mesh, PartitionSpec())
        self._run = jax.jit(run, static_argnames="names", out_shardings=replicated)

    def at(self, params: Params, state: State) -> "FrozenEncoder":
        """The encoder with these parameters."""
        return FrozenEncoder(self, params, state)


@dataclass(frozen=True)
class FrozenEncoder:
    """An `Encoder` with parameters: what an evaluation gets."""

    encoder: Encoder
    params: Params
    state: State

    def features(self, source: Source, names: Sequence[str] = ("image",)) -> dict[str, np.ndarray]:
        """Float32 features `[n, ...]` of every readable sample, in order; also `index` and any `label` and `tokens`.

        Raises:
            ValueError: too many bad records (`Loader.max_bad_fraction`).
        """
        e = self.encoder
        rows = process_rows(e.batch_size, e.mesh)
        parts: list[dict[str, np.ndarray]] = []
        for batch in eval_batches(source, e.transform, batch_size=e.batch_size, rows=rows, loader=e.loader):
            out = self._call(batch, names)
            keep = out.pop("mask")
            parts.append({name: values[keep] for name, values in out.items()})
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        check_bad_fraction(len(source) - len(found["index"]), len(source), e.loader.max_bad_fraction)
        return found

    def texts(self, texts: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
        """Text features `[n, D]` of some strings."""
        e, n = self.encoder, len(texts)
        rows = process_rows(e.batch_size, e.mesh)
        parts = []
        for start in range(0, n, e.batch_size):
            # Padding rows repeat the last text and are cut off below.
            padded = [texts[min(start + int(row), n - 1)] for row in rows]
            parts.append(self._call({"text": np.stack([tokenizer(text) for text in padded])}, ("text",))["text"])
        return np.concatenate(parts)[:n]

    def images(self, images: np.ndarray, names: Sequence[str] = ("image",)) -> dict[str, np.ndarray]:
        """Features of uint8 images `[n, H, W, 3]` of one size (on one process)."""
        e, n = self.encoder, len(images)
        parts = []
        for start in range(0, n, e.batch_size):
            rows = images[[min(i, n - 1) for i in range(start, start + e.batch_size)]]
            parts.append(self._call({"image": rows}, names))
        return {name: np.concatenate([part[name] for part in parts])[:n] for name in names}

    def _call(self, batch: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
        e = self.encoder
        placed = global_batch(batch, e.batch_size, e.mesh)
        return jax.device_get(e._run(self.params, self.state, placed, names=tuple(names)))


@dataclass(frozen=True)
class Pixels:
    """The baseline that learns nothing: an image's normalised pixels are its features."""

    def features(self, params: Any, state: Any, batch: Batch) -> Batch:
        return {"image": batch["image"].reshape(batch["image"].shape[0], -1)}
