"""The pictures of a report: which source they come from, a bounded number of them, and their features."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import jax
import numpy as np

from ssljax.api import Pretrained
from ssljax.config import build
from ssljax.data import BadSample, Loader, Record, Source, decode, parse_source
from ssljax.data.pictures import fit
from ssljax.encode import Encoder, FrozenEncoder, viewed
from ssljax.report.page import short_text

MOST = 1_000  # samples that are embedded
_BATCH = 64  # rows per pass; for maps, which are large, as many as are shown


class Skip(Exception):
    """A part of the report that this run or its data cannot fill; the message says why."""


@dataclass(frozen=True)
class Chosen:
    """Some samples of a source, as a source."""

    source: Source
    indices: tuple[int, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[self.indices[index]]


def choose(source: Source, most: int) -> Chosen:
    """At most so many samples, drawn at random (the same at every call): files are often sorted by class."""
    n = len(source)
    drawn = np.random.default_rng(0).choice(n, min(n, most), replace=False)
    return Chosen(source, tuple(np.sort(drawn).tolist()))


def open_source(
    config: Mapping[str, Any], source: str | Source | None, types: Mapping[str, type]
) -> tuple[Source, str]:
    """(source, what to call it): the given one, else the evaluations' first test source that can be opened, else the
    training source.

    Raises:
      Skip: none can be opened.
    """
    if isinstance(source, str):
        return parse_source(source), source
    if source is not None:
        return source, f"{type(source).__name__} given to write_report"
    refused = []
    for name, evaluation in config.get("evals", {}).items():
        for key in ("test", "query"):
            if isinstance(evaluation, Mapping) and evaluation.get(key) is not None:
                try:
                    return _named(build(Source, evaluation[key], f"evals.{name}.{key}", types), f"evals.{name}.{key}")
                except Exception as error:  # whatever a source raises when its files are gone
                    refused.append(f"evals.{name}.{key}: {error}")
    try:
        return _named(open_training(config, types), "data.train")
    except Skip as error:
        refused.append(str(error))
    raise Skip("No pictures: " + "; ".join(refused))


def _named(source: Source, option: str) -> tuple[Source, str]:
    return source, f"{option} ({type(source).__name__})"


def open_training(config: Mapping[str, Any], types: Mapping[str, type]) -> Source:
    """The source the run was trained on. Raises Skip if it is gone."""
    try:
        source = build(Source | None, config["data"]["train"], "data.train", types)
    except Exception as error:
        raise Skip(f"data.train: {error}") from error
    if source is None:
        raise Skip("data.train is not in the config")
    return source


def readable(source: Source, most: int) -> list[Record]:
    """The records of the first samples that can be decoded. Raises Skip without any."""
    records = []
    for i in range(len(source)):
        if len(records) == most:
            break
        try:
            record = source[i]
            records.append({**record, "image": decode(record["image"])} if "image" in record else record)
        except BadSample:
            continue
    if not records:
        raise Skip("No sample of this source can be read.")
    return records


class Samples:
    """At most `MOST` samples of a source and their features.

    "trained" is the run's encoder, "random init." the same network before training. Features are indexed by rows, one
    for each sample that can be read.
    """

    def __init__(self, pretrained: Pretrained, source: Source, where: str):
        self.pretrained, self.where, self.total = pretrained, where, len(source)
        self.source = choose(source, MOST)
        self._encoders: dict[str, Callable[[], FrozenEncoder]] = {
            "trained": lambda: pretrained.encoder,
            "random init.": cache(pretrained.random_encoder),
        }

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The features the method has of these samples."""
        run, frozen = self.pretrained.run, self.pretrained.encoder
        sample = run.eval_transform(readable(self.source, 1)[0], None)
        batch = {name: np.asarray(value)[None] for name, value in sample.items()}
        e = run.experiment

        def features(batch: dict[str, Any]) -> dict[str, Any]:
            return e.method.features(frozen.params, frozen.state, viewed(e.data.eval_view, batch))

        return tuple(jax.eval_shape(features, batch))

    @cached_property
    def both(self) -> dict[str, dict[str, np.ndarray]]:
        """Of each encoder: `image`, and if there are any `text`, `label`, `tokens`; and `index`."""
        if "image" not in self.names:
            raise Skip(f"The method has no feature 'image' of these samples; it has {', '.join(self.names) or 'none'}.")
        found = self._features(_BATCH, self.source, tuple(name for name in ("image", "text") if name in self.names))
        if not all(np.isfinite(x["image"]).all() for x in found.values()):
            raise Skip("The image features are not finite.")
        return found

    def maps(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Of each encoder, the patch features `[n, h, w, d]` of some rows."""
        if "patches" not in self.names:
            raise Skip(f"The method has no feature 'patches'; it has {', '.join(self.names)}.")
        chosen = Chosen(self.source, tuple(int(self.trained["index"][row]) for row in rows))
        return {name: x["patches"] for name, x in self._features(len(chosen), chosen, ("patches",)).items()}

    def _features(self, batch_size: int, source: Source, names: tuple[str, ...]) -> dict[str, dict[str, np.ndarray]]:
        run = self.pretrained.run
        data = run.experiment.data
        encoder = Encoder(run.experiment.method, data.eval_view, run.eval_transform, run.mesh, batch_size, Loader())
        found = {}
        for name, make in self._encoders.items():
            frozen = make()
            found[name] = encoder.at(frozen.params, frozen.state).features(source, names)
        return found

    @property
    def trained(self) -> dict[str, np.ndarray]:
        """The trained encoder's features."""
        return self.both["trained"]

    def record(self, row: int) -> Record:
        """The record of a row."""
        return self.source[int(self.trained["index"][row])]

    def picture(self, row: int) -> np.ndarray:
        """The picture of a row, uint8 `[h, w, 3]`, as the host brings it to the encoder."""
        record = self.record(row)
        sample = self.pretrained.run.eval_transform(record, None)
        return sample["image"] if "image" in sample else square(decode(record["image"]))

    def caption(self, row: int) -> str:
        """The caption of a row; the first of several."""
        text = self.record(row)["text"]
        return short_text(text if isinstance(text, str) else text[0])

    @property
    def labels(self) -> np.ndarray | None:
        """int `[n]`, or None without labels."""
        return self.trained.get("label")

    def class_name(self, label: int) -> str:
        """The name of a label, or its number."""
        return short_text(self.source.classes[label]) if 0 <= label < len(self.source.classes) else str(label)

    def name(self, row: int) -> str:
        """What to call a row: its class, or without labels its key."""
        return (
            short_text(str(self.record(row).get("key", "")))
            if self.labels is None
            else self.class_name(int(self.labels[row]))
        )

    def queries(self, count: int) -> list[int]:
        """Rows to show, the same at every call: one of each class, then a second one of each, ..."""
        order = np.random.default_rng(1).permutation(len(self.trained["index"]))
        if self.labels is not None:
            labels = self.labels[order]
            before = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])  # of the same class
            order = order[np.argsort(before, kind="stable")]
        return order[:count].tolist()


def square(image: np.ndarray) -> np.ndarray:
    """The largest central square of a picture."""
    return fit(image, min(image.shape[:2]))
