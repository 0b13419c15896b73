"""Charts as inline SVG: small, sharp, in the page's type, with the figures behind every point on hover."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from ssljax.report.page import COLORS, Html, el, join

_WIDTH, _HEIGHT = 340, 176
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 8, 22  # margins of the plot
_STEPS = (1, 2, 2.5, 5, 10)  # distances between ticks
_MOST = 240  # points of a line; a longer one is averaged, with a band from the smallest to the largest value
_DOTS = 30  # up to so many points are marked one by one

Scale = Callable[[Any], Any]  # values to coordinates in the picture


@dataclass(frozen=True)
class Line:
    """One curve: `values` at `steps`, NaN where the value was not finite, and a constant to compare with, if any."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    baseline: float = math.nan


def line_chart(
    title: str,
    lines: Sequence[Line],
    aid: str = "",
    *,
    percent: bool = False,
    log: bool = False,
    include: tuple[float, ...] = (),
) -> Html:
    """A figure of some curves over steps: the last values in its caption or legend, and a line on how to read it.

    Args:
      percent: the values are shares.
      log: the axis may be logarithmic; it is where positive values span more than a factor of 50.
      include: values the axis always shows, so that noise does not look like a change.
    """
    factor = 100 if percent else 1
    lines = [Line(x.name, x.steps, factor * x.values, factor * x.baseline) for x in lines]
    everything = np.concatenate([np.append(x.values, x.baseline) for x in lines])
    finite = everything[np.isfinite(everything)]
    if not finite.size:
        return el("figure", _caption(title, "no finite value"), el("p", aid, class_="aid"))
    finite = np.append(finite, include)
    log = log and bool(finite.min() > 0 and finite.max() > 50 * finite.min())
    low, high = _limits(np.log10(finite) if log else finite)
    last_step = max(float(x.steps.max()) for x in lines)
    first_step = min(0.0, last_step - 1)

    def x_of(step: Any) -> Any:
        return _LEFT + (step - first_step) / (last_step - first_step) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: Any) -> Any:
        value = np.log10(value) if log else value
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    drawing: list[str] = []
    ticks = _ticks(low, high, log)
    for tick, text in zip(ticks, _texts(ticks), strict=True):
        y = _n(y_of(tick))
        drawing += [el("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid")]
        drawing += [el("text", text, x=_LEFT - 6, y=_n(float(y) + 3.5), text_anchor="end")]
    for tick in MaxNLocator(4, steps=_STEPS, integer=True).tick_values(first_step, last_step):
        if first_step <= tick <= last_step:
            # The last label would be cut by the edge of the picture.
            anchor = "end" if x_of(tick) > _WIDTH - 20 else "middle"
            x = _WIDTH - 2 if anchor == "end" else _n(x_of(tick))
            drawing += [el("text", short(tick), x=x, y=_HEIGHT - 6, text_anchor=anchor)]
    for i, line in enumerate(lines):
        color = COLORS[i % len(COLORS)]
        if math.isfinite(line.baseline):
            y = _n(y_of(line.baseline))
            drawing += [el("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, stroke=color, class_="baseline")]
        drawing += _curve(line, color, x_of, y_of)
    ends = [(line.name, _value(_last(line.values), percent)) for line in lines]
    shown = ", ".join(f"{name} {value}" for name, value in ends)
    lost = int(sum(np.isnan(line.values).sum() for line in lines))
    alt = f"{title} over {short(last_step)} steps; last values: {shown}"
    return el(
        "figure",
        _caption(title, ends[0][1] if len(lines) == 1 else ""),
        el("svg", *drawing, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=alt),
        _legend([(f"{name}  {value}", mark(0, COLORS[i % len(COLORS)])) for i, (name, value) in enumerate(ends)])
        if len(lines) > 1
        else None,
        el("p", f"{lost} value{'s' if lost > 1 else ''} not finite", class_="aid") if lost else None,
        el("p", aid, class_="aid") if aid else None,
    )


def _curve(line: Line, color: str, x_of: Scale, y_of: Scale) -> list[str]:
    steps, values, bounds = line.steps.astype(float), line.values, None
    if len(values) > _MOST:
        bins = np.array_split(np.arange(len(values)), _MOST)
        kept = [values[b][np.isfinite(values[b])] for b in bins]
        steps = np.array([steps[b].mean() for b in bins])
        values, low, high = (np.array([f(v) if v.size else np.nan for v in kept]) for f in (np.mean, np.min, np.max))
        bounds = low, high
    finite = np.isfinite(values)
    bands, paths, dots = [], [], []
    # A value that is not finite is a gap.
    for run in np.split(np.arange(len(values)), np.flatnonzero(np.diff(finite)) + 1):
        if not len(run) or not finite[run[0]]:
            continue
        x = x_of(steps[run])
        if bounds is not None:
            low, high = (_points(x, y_of(bound[run])) for bound in bounds)
            bands.append(el("polygon", points=" ".join(low + high[::-1]), fill=color, class_="band"))
        paths.append(el("polyline", points=" ".join(_points(x, y_of(values[run]))), stroke=color, class_="path"))
    if finite.sum() <= _DOTS:
        for step, value in zip(steps[finite], values[finite], strict=True):
            hint = el("title", f"step {step:g}, {line.name}: {value:.4g}")
            dots.append(el("circle", hint, cx=_n(x_of(step)), cy=_n(y_of(value)), r=2.4, fill=color))
    return [*bands, *paths, *dots]


def share_bar(title: str, parts: Sequence[tuple[str, float, str, str]]) -> Html:
    """A figure of the parts of a whole as one bar: (name, share of 0 to 1, colour, text for the legend) of each."""
    width, height, x = 1000, 26, 0.0
    drawing = []
    for name, share, color, text in parts:
        hint = el("title", f"{name}: {text}")
        box = f"M{_n(x)},0h{_n(width * share)}v{height}h{_n(-width * share)}z"
        drawing.append(el("g", hint, el("path", d=box, fill=color)))
        x += width * share
    alt = f"{title}: " + ", ".join(f"{name} {text}" for name, _, _, text in parts)
    return el(
        "figure",
        el("svg", *drawing, viewBox=f"0 0 {width} {height}", role="img", aria_label=alt),
        _legend([(f"{name}  {text}", mark(2, color)) for name, _, color, text in parts]),
    )


def scatter(title: str, points: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> Html:
    """A square figure of points `[n, 2]`; `groups[i]` is the position in `names`, or -1 for a point in grey."""
    side, margin = 340, 8
    low, high = points.min(axis=0), points.max(axis=0)
    xy = margin + (points - low) / np.maximum(high - low, 1e-9) * (side - 2 * margin)
    drawing = []
    for group in [-1, *range(len(names))]:
        chosen = xy[groups == group]
        dots = "".join(_shape(max(group, 0) // len(COLORS), x, y, 2.8 if group >= 0 else 2.0) for x, y in chosen)
        name = names[group] if group >= 0 else "other"
        color = COLORS[group % len(COLORS)] if group >= 0 else "#aab1ba"
        if len(chosen):
            drawing += [el("g", el("title", name), el("path", d=dots, fill=color), opacity="0.8")]
    alt = f"{title}: {len(points)} points" + (f" in {len(names)} groups" if names else "")
    return el(
        "figure", _caption(title, ""), el("svg", *drawing, viewBox=f"0 0 {side} {side}", role="img", aria_label=alt)
    )


def scatter_legend(names: Sequence[str], others: bool) -> Html:
    """Colour and shape of each group of `scatter`."""
    entries = [(name, mark(i // len(COLORS), COLORS[i % len(COLORS)])) for i, name in enumerate(names)]
    return _legend([*entries, ("other classes", mark(0, "#aab1ba"))] if others else entries)


def mark(shape: int, color: str) -> Html:
    """A symbol for a legend."""
    return el("svg", el("path", d=_shape(shape, 5.5, 5.5, 4.5), fill=color), viewBox="0 0 11 11", aria_hidden="true")


def _shape(kind: int, x: float, y: float, r: float) -> str:
    """Path of a disc, a triangle or a square."""
    if kind % 3 == 0:
        return f"M{_n(x - r)},{_n(y)}a{_n(r)},{_n(r)} 0 1,0 {_n(2 * r)},0a{_n(r)},{_n(r)} 0 1,0 {_n(-2 * r)},0z"
    if kind % 3 == 1:
        return f"M{_n(x)},{_n(y - 1.3 * r)}l{_n(1.2 * r)},{_n(2.2 * r)}h{_n(-2.4 * r)}z"
    return f"M{_n(x - r)},{_n(y - r)}h{_n(2 * r)}v{_n(2 * r)}h{_n(-2 * r)}z"


def _legend(entries: Sequence[tuple[str, Html]]) -> Html:
    return el("ul", *(el("li", join(symbol, name)) for name, symbol in entries), class_="legend")


def _caption(title: str, value: str) -> Html:
    return el("figcaption", el("b", title), el("span", value))


def _points(x: np.ndarray, y: np.ndarray) -> list[str]:
    return [f"{_n(a)},{_n(b)}" for a, b in zip(x, y, strict=True)]


def _n(x: float) -> str:
    return f"{x:.1f}"


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else math.nan


def _limits(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or max(abs(high), 1e-6) * 0.1
    return low - margin, high + margin


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        # 1, 3, 10, 30, ... thinned out to about four.
        halves = [h for h in range(math.floor(2 * low), math.ceil(2 * high) + 1) if low <= h / 2 <= high]
        return [10 ** (h // 2) * (3.0 if h % 2 else 1.0) for h in halves[:: max(1, len(halves) // 4)]]
    return [float(t) for t in MaxNLocator(4, steps=_STEPS).tick_values(low, high) if low <= t <= high]


def _value(value: float, percent: bool) -> str:
    return f"{value:.1f} %" if percent and math.isfinite(value) else short(value)


def _texts(ticks: Sequence[float]) -> list[str]:
    """Labels with as many digits as it takes to tell the ticks apart."""
    several = [[short(tick, digits) for tick in ticks] for digits in range(3, 9)]
    return next((texts for texts in several if len(set(texts)) == len(ticks)), several[-1])


def short(value: float, digits: int = 3) -> str:
    """A number in few characters: 12k, 3.4M, 0.0012, 7.7e-7."""
    if not math.isfinite(value):
        return "-"
    value += 0.0  # no -0
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{unit}"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.{digits}g}k"
    if 0 < abs(value) < 1e-3:
        mantissa, _, power = f"{value:.{digits - 2}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.{max(digits, 4 if abs(value) >= 1000 else 3)}g}"
