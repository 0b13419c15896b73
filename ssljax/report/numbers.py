"""The parts of the report that need a run's files alone: header, results, curves, incidents, bad samples, config."""

import json
import math
import platform
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

import ssljax
from ssljax.bounded import parse_json, read_lines
from ssljax.config import build
from ssljax.describe import flatten
from ssljax.goodput import PARTS, Record, duration, read_sessions, run_goodput, split_steps
from ssljax.optim import Optim
from ssljax.report.charts import Line, line_chart, share_bar
from ssljax.report.health import curve, verdict
from ssljax.report.page import COLORS, Html, el, join, lead, section, short_text, table
from ssljax.summary import Figure

Records = Sequence[Mapping[str, Any]]

# Metric -> (title, how to read it, values the axis always shows).
_COLLAPSE: Mapping[str, tuple[str, str, tuple[float, ...]]] = {
    "std": ("Spread of the embeddings", "Near 1: spread in all directions. Near 0: collapsed to a point.", (0.0, 1.0)),
    "rank": (
        "Effective rank",
        "Dimensions the embeddings use (RankMe). Falling towards 1: dimensional collapse.",
        (1.0,),
    ),
    "positive": ("Cosine of pairs", "Pairs that belong together should rise above the others.", (0.0, 1.0)),
    "uniformity": (
        "Uniformity",
        "The more negative, the more evenly spread over the sphere. 0: all in one place.",
        (0.0,),
    ),
    "alignment": ("Alignment", "Mean squared distance of pairs. 0: identical; 2: unrelated.", (0.0,)),
}
# Metrics with a chart of their own, and those another chart or the log says already.
_KNOWN = ("loss", "learning_rate", "grad_norm", "images_per_second", "data_wait", "mfu", "host_memory")
_PER_DEVICE = ("images_per_second_per_device", "flops_per_second_per_device")
_SKIPPED = ("step", "time", "bad_samples", "refused_steps", "goodput", *_PER_DEVICE)
_MOST_CHARTS = 24  # of a method's own metrics, and of evaluations
_BAD_SHOWN = 8
_INCIDENTS_SHOWN = 12
_SESSIONS_SHOWN = 12
# Colours of where the time went: grey for down, the strongest warning for lost work.
_PARTS = dict(zip(PARTS, (COLORS[0], COLORS[1], "#aab1ba", *COLORS[2:], "#8c6d31", "#7fc97f"), strict=True))


def header(method: str, paper: str, config: Mapping[str, Any], records: Records, parameters: str) -> Html:
    """Method and paper, one line on the run, versions."""
    return el(
        "header",
        el("h1", method),
        el("p", paper, class_="paper") if paper else None,
        el("p", " · ".join(_outline(config, records, parameters)), class_="outline"),
        el("p", " · ".join(_versions(records)), class_="versions"),
    )


def _outline(config: Mapping[str, Any], records: Records, parameters: str) -> list[str]:
    done, wanted = max((r["step"] for r in records), default=0), config.get("steps", 0)
    parts = [f"{done:,} steps" if done >= wanted else f"{done:,} of {wanted:,} steps"]
    if "batch_size" in config:
        parts += [f"batch {config['batch_size']:,}"]
    devices = {
        round(r["images_per_second"] / r["images_per_second_per_device"])
        for r in records
        if r.get("images_per_second_per_device")
    }
    if devices:
        parts += [f"{max(devices)} device{'s' if max(devices) > 1 else ''}"]
    parts += [str(config["precision"])] if "precision" in config else []
    if "optim" in config:
        optim = build(Optim, config["optim"], "config.optim")
        parts += [f"{optim.name}, peak learning rate {optim.peak_lr(config['batch_size']):.3g}"]
    if parameters.strip():
        parts += [parameters.strip().splitlines()[-1].split(" in ")[0]]
    return [*parts, f"seed {config['seed']}"] if "seed" in config else parts


def _versions(records: Records) -> list[str]:
    times = [r["time"] for r in records if "time" in r]
    parts = [f"{datetime.fromtimestamp(max(times), UTC):%Y-%m-%d %H:%M} UTC"] if times else []
    parts += [f"ssljax {ssljax.__version__}"]
    if commit := _commit():
        parts += [f"commit {commit}"]
    parts += [f"{package} {version(package)}" for package in ("jax", "flax", "optax")]
    return [*parts, f"Python {platform.python_version()}", f"report written on {jax.devices()[0].device_kind}"]


def _commit() -> str:
    """The commit of the source tree the package runs from, if it runs from one."""
    root = Path(ssljax.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def results(records: Records, figures: Sequence[Figure]) -> Html:
    """The table trained / random initialisation / raw pixels, and the verdict."""
    findings = el("ul", *(el("li", f.text, class_=f.kind) for f in verdict(records, figures)), class_="verdict")
    if not figures:
        return section("Results", el("p", "This run has no evaluation after step 0.", class_="skipped"), findings)
    columns = {"trained": [f.trained[0] for f in figures], "random init.": [f.random[0] for f in figures]}
    if any(np.isfinite(f.pixels[0]) for f in figures):
        columns["raw pixels"] = [f.pixels[0] for f in figures]
    shown = [[_percent(value) for value in column] for column in columns.values()]
    gains = [_percent(f.gain[0], "+") for f in figures]
    rows = list(zip([f.name for f in figures], *shown, gains, strict=True))
    how = "Shares in %. Random init.: the same network before training. Gain: trained minus random, in points."
    return section(
        "Results",
        lead(how),
        el("div", table(("evaluation", *columns, "gain"), rows, "results"), findings, class_="beside"),
    )


def _percent(value: float, sign: str = "") -> str:
    return format(100 * value, sign + ".1f") if math.isfinite(value) else "-"


def curves(records: Records) -> Html:
    """Charts of everything that was logged while training, and of the evaluations."""
    names = dict.fromkeys(name for r in records for name in r)
    terms = [name for name in names if name == "loss" or name.startswith("loss/")]
    own = [name for name in names if "/" not in name and name not in _KNOWN + _SKIPPED]
    charts: list[Html] = []
    if terms:
        charts += [line_chart("Loss", _lines(records, terms), log=True)]
    charts += [line_chart(name, _lines(records, [name]), log=True) for name in own[:_MOST_CHARTS]]
    if "learning_rate" in names:
        charts += [line_chart("Learning rate", _lines(records, ["learning_rate"]), include=(0.0,))]
    if "grad_norm" in names:
        charts += [line_chart("Gradient norm", _lines(records, ["grad_norm"]), "Before clipping.", log=True)]
    if "images_per_second" in names:
        charts += [line_chart("Samples per second", _lines(records, ["images_per_second"]), include=(0.0,))]
    for name, title, aid in (
        ("data_wait", "Time spent waiting for data", "Near 0: the device never starves."),
        ("mfu", "Model FLOP utilisation", "Share of the device's peak arithmetic."),
    ):
        if name in names:
            charts += [line_chart(title, _lines(records, [name]), aid, percent=True, include=(0.0, 10.0))]
    if "host_memory" in names:
        aid = "Of the first process and its workers. Level after the start: nothing leaks."
        charts += [line_chart("Host memory (GiB)", _lines(records, ["host_memory"]), aid, include=(0.0,))]
    training = join(el("h3", "Training"), el("div", *charts, class_="charts")) if charts else None
    measured = _evaluations(records)[:_MOST_CHARTS]
    evaluations = join(el("h3", "Evaluations"), el("div", *measured, class_="charts")) if measured else None
    if not training and not evaluations:
        return section("Curves", el("p", "Nothing has been logged yet.", class_="skipped"))
    return section("Curves", training, evaluations)


def _evaluations(records: Records) -> list[Html]:
    """A chart per evaluation and protocol: `eval/frozen/knn20_top1` and `..._top5` share one."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for r in records for name in r):
        # Learning rates and spreads are no results.
        if name.startswith("eval/") and not name.endswith(("_lr", "_std")):
            where, _, metric = name.removeprefix("eval/").rpartition("/")
            groups.setdefault(f"{where}/{metric.split('_')[0].rstrip('0123456789')}", []).append(name)
    charts = []
    pixels = {name: value for r in records if r["step"] == 0 for name, value in r.items() if name.startswith("pixels/")}
    for title, names in groups.items():
        lines = []
        for line in _lines(records, names):
            baseline = pixels.get(line.name.replace("eval/", "pixels/", 1))
            lines.append(
                Line(line.name.rpartition("/")[2], line.steps, line.values, math.nan if baseline is None else baseline)
            )
        share = all(0 <= v <= 1 for line in lines for v in line.values[np.isfinite(line.values)])
        aid = "Step 0: random initialisation." + (
            " Dashed: raw pixels." if any(math.isfinite(x.baseline) for x in lines) else ""
        )
        charts += [line_chart(title, lines, aid, percent=share)]
    return charts


def _lines(records: Records, names: Sequence[str]) -> list[Line]:
    return [Line(name, *curve(records, name)) for name in names]


def diagnostics(records: Records) -> Html:
    """Charts of the collapse diagnostics, each with a line on how to read it."""
    names = {name for r in records for name in r}
    charts = []
    for key, (title, aid, include) in _COLLAPSE.items():
        keys = [k for k in ("positive", "negative") if f"collapse/{k}" in names] if key == "positive" else [key]
        if keys and f"collapse/{keys[0]}" in names:
            lines = [
                Line({"positive": "pairs", "negative": "others"}.get(k, k), *curve(records, f"collapse/{k}"))
                for k in keys
            ]
            charts += [line_chart(title, lines, aid, include=include)]
    if not charts:
        return section("Collapse diagnostics", el("p", "This method reports no embeddings.", class_="skipped"))
    return section(
        "Collapse diagnostics",
        lead("Of the embeddings the loss compares, in some rows of a batch."),
        el("div", *charts, class_="charts"),
    )


def time_spent(workdir: epath.Path) -> Html:
    """Goodput of the run, a bar of where its time went, and the sessions."""
    title, sessions = "Where the time went", read_sessions(workdir)
    total = run_goodput(sessions)
    if not total.wall:
        return section(title, el("p", "This run has no record of its sessions.", class_="skipped"))
    several = f", in {len(sessions)} sessions" if len(sessions) > 1 else ""
    said = f"Goodput {100 * total.goodput:.1f} %: the share of {duration(total.wall)}{several}, that went into steps "
    said += "which count. Lost: steps that were done again or skipped. Down: between sessions."
    parts = [
        (name, seconds / total.wall, _PARTS[name], f"{100 * seconds / total.wall:.1f} % ({duration(seconds)})")
        for name, seconds in total.seconds.items()
        if seconds >= 0.0005 * total.wall
    ]
    rows = [_session(session, sessions[i + 1 :]) for i, session in enumerate(sessions)]
    listed = table(
        ("started, UTC", "steps done", "lasted", "goodput", "first step after", "end"), rows[-_SESSIONS_SHOWN:]
    )
    earlier = f"The last {_SESSIONS_SHOWN} of {len(rows)} sessions." if len(rows) > _SESSIONS_SHOWN else None
    return section(title, lead(said), share_bar(title, parts), earlier and lead(earlier), listed)


def _session(session: Record, later: Sequence[Record]) -> tuple[str, ...]:
    seconds = split_steps(session, later)
    after = session.first_step_after
    return (
        f"{datetime.fromtimestamp(session.started, UTC):%Y-%m-%d %H:%M:%S}",
        "none" if session.first_step is None else f"{session.first_step:,} to {session.last_step:,}",
        duration(sum(seconds.values())),
        f"{100 * seconds['step'] / max(sum(seconds.values()), 1e-9):.1f} %",
        "-" if after is None else duration(after),
        session.end or ("killed" if later else "under way, or killed"),
    )


def bad_samples(workdir: epath.Path) -> Html:
    """How many samples could not be read, and the first of them."""
    entries = _entries(workdir / "bad_samples.jsonl", ("key", "reason"))
    rows = list(islice(entries, _BAD_SHOWN))
    count = len(rows) + sum(1 for _ in entries)
    if not count:
        return section("Bad samples", el("p", "None: every sample could be read.", class_="skipped"))
    what = f"{count:,} sample{'s' if count > 1 else ''} could not be read and gave way to another."
    return section("Bad samples", lead(what), table(("key", "reason"), rows, "texts"))


def incidents(workdir: epath.Path) -> Html | None:
    """Refused steps, rewinds, damaged checkpoints: how many, and the latest. None if there were none."""
    rows: deque[tuple[str, ...]] = deque(maxlen=_INCIDENTS_SHOWN)
    count = 0
    for entry in _entries(workdir / "incidents.jsonl", ("step", "kind", "text")):
        rows.append(entry)
        count += 1
    if not count:
        return None
    latest = f"The latest {len(rows)} of {count:,}." if count > len(rows) else f"{count} in all."
    return section("Incidents", lead(latest), table(("step", "kind", "what happened"), list(rows), "texts"))


def _entries(path: epath.Path, fields: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """These fields of every line, cut to a readable length; a line cut short by a crash is shown as it is."""
    if not path.exists():
        return
    with path.open("r") as file:
        for line in read_lines(file):
            try:
                values = [parse_json(line)[name] for name in fields]
                if not all(isinstance(value, str | int) for value in values):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                values = ["?"] * (len(fields) - 1) + [line]
            yield tuple(short_text(str(value)) for value in values)


def configuration(config: Mapping[str, Any], parameters: str) -> Html:
    """Every option with its value, and every parameter, folded away."""
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in flatten(config)]
    options = el(
        "details",
        el("summary", f"{len(rows)} options, all defaults filled in"),
        table(("option", "value"), rows, "texts config"),
    )
    leaves = el("details", el("summary", "Parameters"), el("pre", parameters)) if parameters else None
    return section("Config", options, leaves)
