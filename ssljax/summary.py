"""The figures of a run (or of several seeds) beside random initialisation and raw pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath
from rich.table import Table

from ssljax.metrics import read_records


@dataclass(frozen=True)
class Figure:
    """One evaluation metric over seeds; NaN where it was not measured."""

    name: str
    trained: np.ndarray  # [seeds]
    random: np.ndarray  # [seeds], the same network before training
    pixels: np.ndarray  # [seeds], raw pixels as features

    @property
    def gain(self) -> np.ndarray:
        """Trained minus random, per seed."""
        return self.trained - self.random


def figures(workdirs: Sequence[epath.PathLike]) -> list[Figure]:
    """The newest evaluation of each run, its step-0 evaluation and its pixel baseline, metric by metric."""
    columns: dict[str, list[tuple[float, float, float]]] = {}
    for workdir in workdirs:
        records = read_records(workdir)
        last = {k: v for r in records for k, v in r.items() if k.startswith("eval/") and r["step"] > 0}
        first = {k: v for r in records for k, v in r.items() if r["step"] == 0}
        for name, value in last.items():
            if name.endswith(("_lr", "_std")):  # no shares
                continue
            pixels = first.get("pixels/" + name.removeprefix("eval/"))
            row = [np.nan if v is None else float(v) for v in (value, first.get(name), pixels)]
            columns.setdefault(name.removeprefix("eval/"), []).append((row[0], row[1], row[2]))
    return [Figure(name, *np.array(rows).T) for name, rows in columns.items()]


def table(workdirs: Sequence[epath.PathLike]) -> Table:
    """A rich table of `figures`: shares in per cent, mean and standard deviation over seeds."""
    many = len(workdirs) > 1
    title = f"{len(workdirs)} seeds, mean ± standard deviation" if many else None
    caption = (
        "shares in %; random: the same network before training; pixels: raw pixels as features; gain: trained - random"
    )
    result = Table(title=title, caption=caption)
    for column in ("evaluation", "trained", "random", "pixels", "gain"):
        result.add_column(column, justify="left" if column == "evaluation" else "right", no_wrap=True)
    for f in figures(workdirs):
        result.add_row(f.name, *(_percent(values) for values in (f.trained, f.random, f.pixels, f.gain)))
    return result


def _percent(values: np.ndarray) -> str:
    if np.isnan(values).any():
        return "-"
    spread = f" ± {100 * values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread}"
