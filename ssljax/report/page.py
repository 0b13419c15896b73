"""HTML without holes: elements whose every text and attribute is escaped, pictures inside the page, the page itself."""

import base64
import html
import re
from typing import Any

import cv2
import numpy as np

# Control characters, lone surrogates, and the marks that turn the direction of text that follows.
_NOT_IN_HTML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_LONGEST = 500  # characters of a caption, a class name, a key
PIXELATED = 64  # pictures up to this side are enlarged with sharp pixels

# Okabe and Ito's palette (told apart with any colour vision), without its yellow, which is too faint for thin lines.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b4fa0", "#444c56")


class Html(str):
    """A text that is HTML already. Every other text is escaped when it enters an element."""

    __slots__ = ()


def el(name: str, /, *children: str | None, **attributes: Any) -> Html:
    """The element `<name ...>children</name>`: texts and attribute values are escaped, None is left out.

    Underscores in attribute names are hyphens, a last one is dropped: `class_="wide"`, `stroke_width=2`.
    """
    given = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items() if v is not None}
    start = "".join([name, *(f' {k}="{_escape(str(v))}"' for k, v in given.items())])
    if name in ("img", "meta", "br"):
        return Html(f"<{start}>")
    return Html(f"<{start}>{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """Elements and (escaped) texts one after another."""
    return Html("".join(c if isinstance(c, Html) else _escape(c) for c in children if c is not None))


def _escape(text: str) -> str:
    return html.escape(_NOT_IN_HTML.sub("\ufffd", text), quote=True)


def short_text(text: str) -> str:
    """A text from the data, cut to a length that a page can show."""
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def picture(image: np.ndarray, alt: str, side: int = 96, class_: str | None = None) -> Html:
    """An image, uint8 `[h, w, 3]`, of at most `side` pixels (larger ones are reduced), inside the page."""
    height, width = image.shape[:2]
    if max(height, width) > side:
        scale = side / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        height, width = image.shape[:2]
    small = max(height, width) <= PIXELATED
    kind, options = (".png", []) if small else (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 88])
    data = base64.b64encode(cv2.imencode(kind, np.ascontiguousarray(image[..., ::-1]), options)[1].tobytes()).decode()
    classes = " ".join(c for c in (class_, "pixels" if small else None) if c) or None
    source = f"data:image/{'png' if small else 'jpeg'};base64,{data}"
    return el("img", src=source, alt=alt, title=alt, width=width, height=height, class_=classes)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], class_: str | None = None) -> Html:
    """A table in a frame that scrolls sideways on narrow screens; the first column names the rows."""
    body = [el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:])) for row in rows]
    header = el("thead", el("tr", *(el("th", cell, scope="col") for cell in head)))
    return el("div", el("table", header, el("tbody", *body), class_=class_), class_="scroll")


def section(title: str, *children: str | None) -> Html:
    """A part of the page under its heading."""
    return el("section", el("h2", title), *children)


def lead(*text: str | None) -> Html:
    """The sentence below a heading that says how to read what follows."""
    return el("p", *text, class_="lead")


def document(title: str, *body: str | None) -> str:
    """The whole page. Should a hole remain, its content security policy forbids scripts and all of the network."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", Html(_STYLE)),
    )
    return "<!doctype html>\n" + el("html", head, el("body", el("main", *body)), lang="en") + "\n"


_STYLE = """
:root { --ink: #1d2127; --soft: #5d6672; --line: #e3e6ea; --ground: #f6f7f9; --good: #0072b2; --bad: #d55e00; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 4px; letter-spacing: -.01em; }
h3 { font-size: 14px; margin: 22px 0 8px; color: var(--soft); font-weight: 600; }
p { margin: 0; overflow-wrap: anywhere; }
header p { margin-top: 4px; }
header .outline { font-size: 16px; margin-top: 10px; }
header .versions { font-size: 13px; }
.paper, .versions, .lead, .skipped, .failed { color: var(--soft); }
.lead { max-width: 96ch; margin-bottom: 14px; }
.lead, .skipped, .failed, .verdict, table, summary { font-size: 14px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px 22px;
  margin-top: 18px; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 400; }
th:first-child { text-align: left; }
th:last-child, td:last-child { padding-right: 2px; }
thead th { color: var(--soft); font-size: 13px; }
tbody tr:last-child > * { border-bottom: 0; }
.results td:nth-child(2) { font-weight: 650; }
.texts th, .texts td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top;
  font-size: 13px; }
.texts th { min-width: 16ch; }
.beside { display: flex; flex-wrap: wrap; gap: 16px 40px; align-items: flex-start; }
.beside > .scroll { max-width: 100%; }
.verdict { flex: 1 1 300px; list-style: none; margin: 4px 0 0; padding: 0; }
.verdict li { padding: 8px 12px 8px 36px; position: relative; border-radius: 8px; background: var(--ground);
  margin-bottom: 6px; overflow-wrap: anywhere; }
.verdict li::before { position: absolute; left: 14px; font-weight: 700; }
.verdict .good::before { content: "\\2713"; color: var(--good); }
.verdict .note::before { content: "i"; color: var(--soft); left: 17px; }
.verdict .warning { background: #fdf1e9; }
.verdict .warning::before { content: "!"; color: var(--bad); left: 17px; }

.charts { display: grid; gap: 20px 26px;
  grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figure + .scroll { margin-top: 12px; }
figcaption { font-size: 13.5px; display: flex; justify-content: space-between; gap: 12px; overflow-wrap: anywhere; }
figcaption span { font-variant-numeric: tabular-nums; white-space: nowrap; }
.aid, .legend { color: var(--soft); font-size: 12.5px; line-height: 1.4; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 0; padding: 0; list-style: none; }
.legend li { overflow-wrap: anywhere; }
.legend svg { display: inline-block; width: 11px; height: 11px; margin-right: 5px; vertical-align: -1px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 10.5px; fill: var(--soft); }
.grid { stroke: var(--line); }
.path { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.band { opacity: .18; }
.baseline { stroke-width: 1.2; stroke-dasharray: 4 4; opacity: .8; }

img { display: block; width: 100%; height: auto; border-radius: 3px; box-shadow: 0 0 0 1px #0000000f; }
.pixels { image-rendering: pixelated; }
.cards { display: grid; gap: 24px 36px;
  grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); }
.card { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 6.9fr); gap: 14px; }
.name { font-size: 12.5px; line-height: 1.25; margin-top: 4px; text-align: center; overflow-wrap: anywhere; }
.row { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 6px; }
.over { display: flex; justify-content: space-between; margin-bottom: 3px; }
.row + .over { margin-top: 10px; }
.same { outline: 2.5px solid var(--good); }
.other { outline: 2.5px dashed var(--bad); }
.captions { display: grid; gap: 20px 36px;
  grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); }
.captions > div { display: grid; grid-template-columns: 84px minmax(0, 1fr); gap: 14px; align-items: start; }
.captions ol { margin: 0; padding-left: 20px; font-size: 13px; line-height: 1.4; overflow-wrap: anywhere; }
.true { color: var(--good); font-weight: 650; }
.tiles { display: grid; gap: 6px; align-items: center; }
.tiles > span { font-size: 12.5px; color: var(--soft); overflow: hidden; text-overflow: ellipsis; }
.pair { display: grid; gap: 10px 30px; margin-bottom: 8px;
  grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); }

details { margin-top: 10px; }
summary { cursor: pointer; }
pre, .config { font: 12px/1.45 ui-monospace, Menlo, Consolas, monospace; }
.config { margin-top: 8px; }
.config th, .config td { font-size: 12px; }
pre { overflow-x: auto; background: var(--ground); padding: 12px; border-radius: 8px; }
@media (max-width: 520px) {
  main { padding: 22px 10px 40px; }
  section { padding: 16px 14px; }
  h1 { font-size: 25px; }
  th, td { padding-right: 9px; }
  .results { font-size: 13px; }
  .results th { white-space: normal; overflow-wrap: anywhere; }
  .card { grid-template-columns: minmax(0, 1fr) minmax(0, 5.6fr); gap: 10px; }
  .name, .tiles > span { font-size: 11px; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
