"""How fast is the input? `ssljax data bench <source>`: images per second of each stage, and which of them limits."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import numpy as np
from rich.console import Group
from rich.table import Table

from ssljax import views as recipes
from ssljax.data import BadSample, HostTransform, Loader, Source, train_batches, typical_sample
from ssljax.data.pictures import Opened
from ssljax.data.sources.base import nearest
from ssljax.views import View, Views

RECIPES: Mapping[str, Callable[[int], dict[str, dict[str, Any]]]] = {
    "simclr": recipes.simclr,
    "moco_v2": recipes.moco_v2,
    "byol": recipes.byol,
    "multi_crop": recipes.multi_crop,
    "mae": recipes.mae,
    "clip": recipes.clip,
}
_ROWS = 16  # of a batch, for each core: all of them have a part in it


@dataclass(frozen=True)
class Speed:
    """Images per second, each stage alone. One thread of one core, except `loader` and `device`."""

    read: float  # from the source
    decode: float  # in full
    crop: float  # the host's part with Views(host="crop"): decode, cut
    augment: float  # the host's part with Views(host="augment"): decode, cut, flip, colour, blur, ...
    loader: dict[tuple[str, str], float]  # all of that and reading, in batches; by Views.host and "threads", "workers"
    device: dict[str, float]  # what is left for the device; by Views.host
    cores: int  # threads, or workers, of `loader`
    bad: int  # records among them that could not be read

    @property
    def limit(self) -> str:
        """The slower of host and device, in words, for the best of the ways to share the work."""
        host, hands = max(self.loader, key=lambda way: min(self.loader[way], self.device[way[0]]))
        way = f"Views(host={host!r}), data.loader.{hands}={self.cores}"
        loader, device = self.loader[host, hands], self.device[host]
        if device < loader:
            return f"{way}: this device limits, at {device:,.0f} images/s"
        seconds = {"reading": 1 / self.read, "decoding": 1 / self.decode}
        seconds["cropping"] = max(0.0, 1 / self.crop - 1 / self.decode)
        if host == "augment":
            seconds["colour and blur"] = max(0.0, 1 / self.augment - 1 / self.crop)
        slowest = max(seconds, key=lambda name: seconds[name])
        share = seconds[slowest] / sum(seconds.values())
        return f"{way}: the host limits, at {loader:,.0f} images/s; {share:.0%} of its time is {slowest}"


def measure(
    source: Source, recipe: str = "simclr", size: int = 224, *, cores: int | None = None, seconds: float = 3.0
) -> Speed:
    """Times the stages of an image recipe on a source, about `seconds` each.

    Args:
      size: side of the (global) views in pixels.
      cores: threads, or workers, of the loader; by default as many as this machine has.

    Raises:
      ValueError: an unknown recipe; a source without pictures, or without good ones.
    """
    if recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r}{nearest(recipe, RECIPES)}; there are {', '.join(RECIPES)}")
    cores = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    views = {name: View(**fields) for name, fields in RECIPES[recipe](size).items()}
    plans = {host: Views(views, host=host) for host in ("crop", "augment")}
    transforms = {host: HostTransform(crops=views, augment=host == "augment") for host in plans}

    records, bad = _records(source)
    rng = np.random.default_rng(0)
    order = np.random.default_rng(1).permutation(len(source)).tolist()
    rate = {
        "read": _rate(lambda i: source[i], order, seconds),
        "decode": _rate(lambda record: Opened(record["image"]).decode(), records, seconds),
        **{host: _rate(lambda record, t=t: t(record, rng), records, seconds) for host, t in transforms.items()},
    }
    rows, loader, device = _ROWS * cores, {}, {}
    for host, transform in transforms.items():
        like = typical_sample(source, transform)
        for hands, options in (("threads", Loader(threads=cores)), ("workers", Loader(workers=cores))):
            batches = train_batches(source, transform, batch_size=rows, seed=0, like=like, loader=options)
            loader[host, hands] = rows * _rate_of(batches, seconds, first=2 * options.held)
            batches.close()
        batch = {name: jax.device_put(np.stack([x] * rows)) for name, x in like.items()}
        step = jax.jit(plans[host])
        device[host] = rows * _rate_of((jax.block_until_ready(step(None, batch)) for _ in iter(int, 1)), seconds)
    return Speed(**rate, loader=loader, device=device, cores=cores, bad=bad)


def show(speed: Speed, name: str) -> Group:
    """Tables for the terminal."""
    host = Table("one thread", "images/s", "ms", title=name, title_justify="left")
    rows = {"read": speed.read, "decode": speed.decode, "decode, crop": speed.crop}
    for stage, rate in {**rows, "decode, crop, colour, blur": speed.augment}.items():
        host.add_row(stage, f"{rate:,.0f}", f"{1e3 / rate:.2f}")
    kind = jax.devices()[0].device_kind
    names = {"threads": f"{speed.cores} threads", "workers": f"{speed.cores} workers"}
    columns = (*names.values(), *(f"{name} / alone" for name in names), f"device ({kind})")
    ways = Table("Views(host=...)", *columns, title="whole batches, images/s", title_justify="left")
    for way, alone in (("crop", speed.crop), ("augment", speed.augment)):
        one = 1 / (1 / speed.read + 1 / alone)
        rates = [speed.loader[way, hands] for hands in names]
        shares = (f"{rate / one:.2f}" for rate in rates)
        ways.add_row(way, *(f"{rate:,.0f}" for rate in rates), *shares, f"{speed.device[way]:,.0f}")
    for table in (host, ways):
        for column in table.columns[1:]:
            column.justify = "right"
    bad = [f"{speed.bad} of the records looked at could not be read"] if speed.bad else []
    return Group(host, ways, speed.limit, *bad)


def _records(source: Source, count: int = 256) -> tuple[list[Mapping[str, Any]], int]:
    """Good records spread over the source, and how many bad ones were met."""
    records, bad = [], 0
    for i in np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)).tolist():
        try:
            record = source[i]
            if "image" not in record:
                raise ValueError(f"record {i} has no 'image', only {sorted(record)}")
            Opened(record["image"]).decode()
            records.append(record)
        except BadSample:
            bad += 1
    if not records:
        raise ValueError(f"none of the {bad} records looked at can be read")
    return records, bad


def _rate(work: Callable[[Any], Any], items: Sequence[Any], seconds: float) -> float:
    """Items per second."""

    def done() -> Iterator[None]:
        while True:
            for item in items:
                try:
                    yield work(item)
                except BadSample:
                    yield None

    return _rate_of(done(), seconds)


def _rate_of(steps: Iterator[Any], seconds: float, first: int = 3) -> float:
    """Steps per second; the first ones, in which caches fill and programs are compiled, do not count."""
    for _ in islice(steps, first):
        pass
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds or count < 3:
        next(steps)
        count += 1
    return count / elapsed
