"""Does a run look healthy? Plain answers from its records, with the figures they rest on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ssljax.summary import Figure

# Two embeddings have a mean cosine of about 1 - std^2: 0.99 and 0.91 here.
COLLAPSED_STD, NARROW_STD = 0.1, 0.3
COLLAPSED_RANK = 1.5  # of RankMe: practically one direction
LOST_RANK = 0.2  # of the highest rank of the run
NO_GAP = 0.05  # cosine of positive pairs less that of negative pairs
WAITING = 0.1  # share of the time
_RECENT = 3  # records a last value is averaged over


@dataclass(frozen=True)
class Finding:
    """One sentence on a run."""

    kind: Literal["good", "note", "warning"]
    text: str


def curve(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a metric; NaN where the record says null."""
    found = [(r["step"], np.nan if r[name] is None else float(r[name])) for r in records if name in r]
    return np.array([step for step, _ in found]), np.array([value for _, value in found], float)


def verdict(records: Sequence[Mapping[str, Any]], figures: Sequence[Figure]) -> list[Finding]:
    """Warnings first, then notes; what is fine is said too."""
    found = [*_numbers(records), *_collapse(records), *_evaluations(figures), *_speed(records)]
    return sorted(found, key=lambda f: ("warning", "good", "note").index(f.kind))


def _numbers(records: Sequence[Mapping[str, Any]]) -> list[Finding]:
    found: list[Finding] = []
    lost = sorted({name for r in records for name, value in r.items() if value is None})
    if lost:
        first = min(r["step"] for r in records if None in r.values())
        found.append(Finding("warning", f"Not finite (NaN or infinity) from step {first:,} on: {', '.join(lost[:6])}."))
    _, loss = curve(records, "loss")
    loss = loss[np.isfinite(loss)]
    if len(loss) >= 2 * _RECENT:
        first, last = loss[:_RECENT].mean(), loss[-_RECENT:].mean()
        if last >= first:
            # With teachers, critics or centring that move along, a loss may rise while the features improve.
            found.append(Finding("note", f"The loss did not fall: {first:.4g} at first, {last:.4g} at the end."))
    return found


def _collapse(records: Sequence[Mapping[str, Any]]) -> list[Finding]:
    std, rank, positive, negative = (
        _finite(records, f"collapse/{name}") for name in ("std", "rank", "positive", "negative")
    )
    if not len(std) or not len(rank):
        return [Finding("note", "No embeddings were reported, so nothing can be said about collapse.")]
    spread, dimensions = std[-_RECENT:].mean(), rank[-_RECENT:].mean()
    found: list[Finding] = []
    if spread < COLLAPSED_STD:
        found.append(
            Finding("warning", f"The embeddings have collapsed to a point: std {spread:.3f}, where 1 is fully spread.")
        )
    elif spread < NARROW_STD:
        found.append(
            Finding("warning", f"The embeddings fill only a narrow cone: std {spread:.2f}, where 1 is fully spread.")
        )
    if dimensions < COLLAPSED_RANK:
        found.append(Finding("warning", f"The embeddings use a single direction: effective rank {dimensions:.2f}."))
    elif dimensions < LOST_RANK * rank.max():
        lost = f"effective rank {dimensions:.1f}, down from {rank.max():.1f}"
        found.append(Finding("warning", f"The embeddings have lost most of their dimensions: {lost}."))
    alike = ""
    if len(positive) and len(negative):
        p, n = (round(x[-_RECENT:].mean(), 2) + 0.0 for x in (positive, negative))  # no -0.00
        if p - n < NO_GAP:
            found.append(
                Finding(
                    "warning", f"Pairs that belong together (cosine {p:.2f}) are hardly closer than others ({n:.2f})."
                )
            )
        alike = f"; pairs that belong together have a cosine of {p:.2f}, others {n:.2f}"
    if not found:
        found.append(
            Finding(
                "good", f"No collapse: std {spread:.2f} (1 is fully spread), effective rank {dimensions:.1f}{alike}."
            )
        )
    return found


def _evaluations(figures: Sequence[Figure]) -> list[Finding]:
    both = [(f.name, f.trained[0], f.random[0], f.pixels[0]) for f in figures]
    compared = [(name, t, r) for name, t, r, _ in both if np.isfinite([t, r]).all()]
    worse = [(name, t, r) for name, t, r in compared if t < r]
    found: list[Finding] = []
    if worse:
        found.append(Finding("warning", f"Below random initialisation: {_against(worse)}."))
    elif compared:
        gain = max(t - r for _, t, r in compared)
        found.append(Finding("good", f"Above random initialisation in all metrics, by up to {100 * gain:.1f} points."))
    below = [(name, t, p) for name, t, _, p in both if np.isfinite([t, p]).all() and t < p]
    if below:
        found.append(Finding("note", f"Raw pixels do better: {_against(below)}."))
    return found


def _against(rows: Sequence[tuple[str, float, float]]) -> str:
    parts = [f"{name} {100 * a:.1f} % against {100 * b:.1f} %" for name, a, b in rows[:3]]
    return "; ".join(parts) + (f"; and {len(rows) - 3} more" if len(rows) > 3 else "")


def _speed(records: Sequence[Mapping[str, Any]]) -> list[Finding]:
    waits = _finite(records, "data_wait")
    # The first reading includes the start of the reading threads.
    share = waits[1:].mean() if len(waits) > 1 else 0.0
    if share < WAITING:
        return []
    advice = "more data.loader.threads or workers, data.loader.cache, or views cut on the device would help"
    return [Finding("note", f"Training waited for data {100 * share:.0f} % of the time: {advice}.")]


def _finite(records: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    values = curve(records, name)[1]
    return values[np.isfinite(values)]
