"""Look at data before training on it: `inspect` counts, checks and draws a contact sheet."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from ssljax.data import media_previews, previews
from ssljax.data.errors import BadSample
from ssljax.data.sources.base import Record, Source

_TILE, _GAP, _LINE, _LINES = 128, 10, 15, 3  # pixels, pixels, pixels, at most so many lines of text
_LONGEST = 1_000  # characters of a text that are looked at: fitting it to a tile takes quadratic time
_PAPER, _INK, _SOFT, _ALARM = (255, 255, 255), (34, 34, 40), (238, 238, 242), (176, 32, 32)


def inspect(source: Source, out_png: str | None = None, n: int = 48) -> dict[str, Any]:
    """Reads `n` samples spread over the source, decodes their pictures, and draws them on `out_png` if given.

    Returns: `count`; `classes` (name -> number of samples, of all samples if the source knows its labels, else of
    those read: see `labels_counted`); `keys` (key -> types and shapes seen); `sampled`; `unreadable` (key of the
    sample -> reason).
    """
    count = len(source)
    chosen = np.unique(np.linspace(0, count - 1, min(n, count)).round().astype(int))
    records: list[Record] = []
    pictures: list[np.ndarray | None] = []
    unreadable: dict[str, str] = {}
    for i in chosen.tolist():
        record: Record = {"key": f"[{i}]"}
        picture = None
        try:
            record = source[i]
            picture = preview(record)
        except BadSample as error:
            unreadable[str(record.get("key", i))] = str(error)
        records.append(record)
        pictures.append(picture)
    labels = getattr(source, "labels", None)
    sampled = [record["label"] for record in records if isinstance(record.get("label"), int)]
    counted = Counter(sampled if labels is None else np.asarray(labels).tolist())
    if out_png is not None:
        sheet = contact_sheet(records, pictures, source.classes)
        Path(out_png).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out_png)
    return {
        "count": count,
        "classes": {
            _class_name(label, source.classes): counted[label] for label in _all_labels(counted, source.classes)
        },
        "labels_counted": "all" if labels is not None else "sampled",
        "keys": _describe(records, pictures),
        "sampled": len(chosen),
        "unreadable": unreadable,
    }


def preview(record: Record) -> np.ndarray | None:
    """A record as a picture, uint8 `[H, W, 3]`; None if it has nothing to show. Raises BadSample."""
    return next((draw(record[entry]) for entry, draw in _PREVIEWS.items() if entry in record), None)


_PREVIEWS: Mapping[str, Callable[[Any], np.ndarray]] = {  # entry of a record -> its picture
    "image": previews.image,
    "video": media_previews.stills,
    "audio": media_previews.spectrogram,
    "volume": previews.volume,
    "points": previews.points,
    "graph": previews.graph,
}
# Unit -> how much.
_FACTS: Mapping[str, Callable[[Any], dict[str, float]]] = {
    "video": media_previews.video_track,
    "audio": media_previews.track,
    "volume": previews.volume_facts,
    "points": previews.points_facts,
    "graph": previews.graph_facts,
}


def _all_labels(counted: Counter, classes: tuple[str, ...]) -> list[int]:
    return sorted(counted.keys() | set(range(len(classes))))


def _class_name(label: int, classes: tuple[str, ...]) -> str:
    return classes[label] if 0 <= label < len(classes) else str(label)


def _describe(records: list[Record], pictures: list[np.ndarray | None]) -> dict[str, str]:
    """`image`: `bytes, decoded 96x128 .. 512x512`; `mask`: `uint8 [32, 32]`; `text`: `str, 3..60 characters`."""
    described = {}
    for key in dict.fromkeys(key for record in records for key in record):
        values = [record[key] for record in records if key in record]
        kinds = sorted({_kind(value) for value in values})
        text = ", ".join(kinds[:3]) + (f", ... ({len(kinds)} kinds)" if len(kinds) > 3 else "")
        if key == "image" and bytes in map(type, values):
            sizes = [p.shape[:2] for p in pictures if p is not None]
            if sizes:
                low, high = (tuple(int(side) for side in f(sizes, axis=0)) for f in (np.min, np.max))
                text += f", decoded {low[0]}x{low[1]}" + (f" .. {high[0]}x{high[1]}" if low != high else "") + " (HxW)"
        elif key in _FACTS:
            text += _ranges(values, _FACTS[key])
        elif all(isinstance(v, int | float) for v in values):
            text += f", {min(values)} .. {max(values)}"
        elif all(isinstance(v, str) for v in values):
            lengths = [len(v) for v in values]
            text += f", {min(lengths)} .. {max(lengths)} characters"
        described[key] = text + (f", in {len(values)} of {len(records)}" if len(values) < len(records) else "")
    return described


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return "Path" if isinstance(value, Path) else type(value).__name__


def _ranges(values: list[Any], facts_of: Callable[[Any], dict[str, float]]) -> str:
    """`, 2.2 .. 39.9 s, 360 .. 768 pixels wide`; what cannot be read is passed over."""
    found: dict[str, list[float]] = {}
    for value in values:
        with suppress(BadSample):
            for unit, number in facts_of(value).items():
                found.setdefault(unit, []).append(number)
    texts = ((unit, f"{min(x):.5g}", f"{max(x):.5g}") for unit, x in found.items())
    return "".join(f", {low} {unit}" if low == high else f", {low} .. {high} {unit}" for unit, low, high in texts)


def print_summary(summary: dict[str, Any], console: Console | None = None, most: int = 20) -> None:
    """The dict of `inspect` as tables: entries, classes (the `most` first), unreadable samples."""
    console = console or Console()
    console.print(
        f"[bold]{summary['count']:,}[/] samples; {summary['sampled']} read, {len(summary['unreadable'])} unreadable"
    )
    keys = Table("key", "what", title="record", title_justify="left")
    for key, what in summary["keys"].items():
        keys.add_row(key, what.replace("[", r"\["))
    console.print(keys)
    if classes := summary["classes"]:
        title = f"{len(classes)} classes"
        if summary["labels_counted"] == "sampled":
            classes = {name: number for name, number in classes.items() if number}
            title = f"{len(classes)} of {title} among the samples read"
        table = Table("class", "samples", title=title, title_justify="left")
        for name, number in list(classes.items())[:most]:
            table.add_row(name.replace("[", r"\["), f"{number:,}")
        if len(classes) > most:
            table.add_row(f"... {len(classes) - most} more", f"{sum(list(classes.values())[most:]):,}")
        console.print(table)
    for key, reason in summary["unreadable"].items():
        console.print(f"unreadable: {key}: {reason}", style="red", markup=False)


def contact_sheet(records: list[Record], pictures: list[np.ndarray | None], classes: tuple[str, ...]) -> Image.Image:
    """The pictures (uint8 `[H,W,3]`, None = unreadable) on a grid, with their text, class or key below."""
    import matplotlib  # for its font only, and slow to import

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 11)
    titles = [_wrap(_title(record, classes), font) for record in records]
    columns = min(len(records), max(4, round((1.4 * len(records)) ** 0.5)))
    rows = -(-len(records) // columns)
    cell_width, cell_height = _TILE + _GAP, _TILE + _GAP + max(map(len, titles)) * _LINE + 6
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (record, picture) in enumerate(zip(records, pictures, strict=True)):
        x, y = _GAP + i % columns * cell_width, _GAP + i // columns * cell_height
        draw.rectangle((x, y, x + _TILE - 1, y + _TILE - 1), fill=_SOFT)
        if picture is None:
            draw.text(
                (x + 8, y + _TILE // 2),
                "unreadable" if record.keys() & _PREVIEWS.keys() else "no picture",
                _ALARM,
                font,
                "lm",
            )
        else:
            tile = _fit(picture)
            sheet.paste(tile, (x + (_TILE - tile.width) // 2, y + (_TILE - tile.height) // 2))
        for k, line in enumerate(titles[i]):
            draw.text((x, y + _TILE + 4 + k * _LINE), line, _INK, font)
    return sheet


def _fit(picture: np.ndarray) -> Image.Image:
    """The picture in a tile: small ones enlarged in whole steps with sharp pixels, large ones reduced."""
    height, width = picture.shape[:2]
    factor = _TILE / max(height, width)
    if factor >= 1:
        factor, how = int(factor), Image.Resampling.NEAREST
    else:
        how = Image.Resampling.LANCZOS
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return Image.fromarray(picture).resize(size, how)


def _title(record: Record, classes: tuple[str, ...]) -> str:
    text = record.get("text")
    if isinstance(text, tuple):
        text = " | ".join(text)
    label = record.get("label")
    name = _class_name(label, classes) if isinstance(label, int) else ""
    return text or name or str(record.get("key", ""))


def _wrap(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """At most `_LINES` lines of a tile's width; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    rest = " ".join(text[:_LONGEST].split())
    while rest and len(lines) < _LINES:
        end = len(rest)
        while font.getlength(rest[:end]) > _TILE:
            end -= 1
        if end < len(rest):
            end = (rest.rfind(" ", 1, end + 1) + 1) or end  # break at a space, or within a long word
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(last + "…") > _TILE:
            last = last[:-1]
        lines[-1] = last + "…"
    return lines
