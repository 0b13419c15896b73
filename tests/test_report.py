"""The report: complete in one file, safe against hostile data, and written whatever a run lacks."""

import base64
import json
import re
import shutil
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlparse

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import simclr, simclr_config

from ssljax import load
from ssljax.config import apply_override, experiment
from ssljax.data import Arrays
from ssljax.report import verdict, write_report
from ssljax.report.charts import Line, line_chart, scatter, short
from ssljax.report.page import Html, document, el, picture
from ssljax.report.pictures import _components, _display, _others, _pca, _plane
from ssljax.report.samples import choose
from ssljax.summary import Figure
from ssljax.train import train
from ssljax.views import View, Views

HOSTILE = ("<script>alert(1)<", '"><img src=x onerror=alert(2)>', "Tom & <b>Jerry")
SECTIONS = ["Results", "Curves", "Collapse diagnostics", "Where the time went", "Nearest neighbours", "Patch features",
            "Map of the features", "Augmentations", "Bad samples", "Config"]  # fmt: skip


ALLOWED = """html head meta title style body main header section h1 h2 h3 p div span b ul ol li details summary pre
    table thead tbody tr th td figure figcaption svg line text polyline polygon circle path g img"""


# Less to compile than the tests of the loop need.
FAST = (
    "method.encoder.blocks=(1,)",
    "method.encoder.channels=(8,)",
    "data.views.views.x1.jitter=0.0",
    "data.views.views.x2.jitter=0.0",
)


class Page(HTMLParser):
    """Reads a page, fails on unbalanced tags, and keeps what the tests look at."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.raw = text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def read(path) -> Page:
    """The page at `path`, after the checks that hold for every report."""
    page = Page(Path(path).read_text())
    assert page.tags <= set(ALLOWED.split())
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("href", "srcset", "action")
        assert name != "src" or value.startswith("data:image/")
    assert all(alt for tag, name, alt in page.attributes if (tag, name) == ("img", "alt"))
    assert not re.search(r"url\(|@import", page.raw)
    assert any(policy.startswith("default-src 'none'; img-src data:;") for policy in page.values("content"))
    return page


def photos(n: int, size: int = 12) -> np.ndarray:
    """Pictures that differ by a bright square."""
    images = np.random.default_rng(0).integers(0, 60, (n, size, size, 3), dtype=np.uint8)
    for i in range(n):
        images[i, 2 + i % 5 : 6 + i % 5, 3:8] += 120
    return images


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """(workdir, folder of pictures) of a tiny run on pictures whose class names are hostile."""
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(photos(24)):
        path = folder / HOSTILE[i % 3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    (folder / HOSTILE[0] / "broken.png").write_bytes(b"no picture")
    config = simclr_config(f"data.train=folder:{folder}", "steps=6", "eval_every=3", *FAST)
    config.evals = {"frozen": {"type": "Classification", "train": f"folder:{folder}", "test": f"folder:{folder}"}}
    workdir = tmp_path_factory.mktemp("run")
    train(experiment(config), workdir, devices=jax.devices()[:1])
    return workdir, folder


@pytest.fixture(scope="module")
def page(run) -> Page:
    return read(write_report(run[0]))


def test_a_run_gives_every_section(page):
    assert page.headings == SECTIONS
    assert "This part failed" not in page.text
    assert "skipped" not in page.values("class")
    assert "SimCLR" in page.text
    assert "Chen et al., ICML 2020" in page.text
    assert f"jax {jax.__version__}" in page.text
    assert "6 steps · batch 16" in page.text
    assert "optim.lr" in page.text
    assert "encoder/stem_conv/kernel" in page.text
    # 8 queries of 6 neighbours each, twice; 8 pictures and two maps; 6 pictures and 3 draws of 2 views.
    assert len(page.values("src")) == 8 * (1 + 6 + 6) + 8 * 3 + 6 * (1 + 2 * 3)


def test_hostile_names_are_text(page):
    for name in HOSTILE:
        assert any(name in alt for alt in page.values("alt"))
        assert name in page.text
        assert name not in page.raw


def test_results_are_those_of_the_records(run, page):
    records = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    name = "frozen/knn20_top1"
    trained, random = (100 * r["eval/" + name] for r in (records[-1], records[0]))
    pixels = 100 * records[0]["pixels/" + name]
    expected = [name, f"{trained:.1f}", f"{random:.1f}", f"{pixels:.1f}", f"{trained - random:+.1f}"]
    assert expected == page.words[page.words.index(name) :][:5]


def test_bad_samples_are_counted(run, page):
    found = (run[0] / "bad_samples.jsonl").read_text().splitlines()
    assert len(found) == 1
    assert "1 sample could not be read" in page.text
    assert f"{HOSTILE[0]}/broken.png" in page.text


def test_data_that_are_gone_cost_only_the_pictures(run):
    workdir, folder = run
    moved = folder.rename(folder.parent / "moved")
    try:
        page = read(write_report(workdir))
    finally:
        moved.rename(folder)
    assert page.headings == [*SECTIONS[:4], "Pictures", "Augmentations", *SECTIONS[-2:]]
    assert "This part failed" not in page.text
    assert page.text.count(f"there is no folder {folder}") == 3  # evaluation, training, augmentations
    assert not page.values("src")


def test_a_source_that_cannot_be_opened_is_an_error(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(run[0], f"folder:{tmp_path}/nowhere")
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        write_report(tmp_path)


@dataclass(frozen=True)
class Sketch:
    """A method of one's own, quick to compile: random colours of pixels, counts of letters, and pictures to show."""

    sound: bool = False  # instead of images
    stride: int = 2  # of the map

    def init(self, key, batch):
        return {"kernel": jax.random.normal(key, (3, 4))}, {}

    def loss(self, params, state, batch, ctx):
        return jnp.mean((batch["x1"] @ params["kernel"]) ** 2), (state, {})

    def update(self, params, state, ctx):
        return params, state

    def features(self, params, state, batch):
        patches = batch["image"][:, :: self.stride, :: self.stride] @ params["kernel"]
        if self.sound:
            return {"sound": patches[:, 0, 0]}
        found = {"image": patches.mean(axis=(1, 2)), "patches": patches}
        return found | ({"text": jax.nn.one_hot(batch["text"] % 4, 4).mean(axis=1)} if "text" in batch else {})

    def pictures(self, params, state, batch):
        return {"<negative>": 1 - batch["x1"], "mask": batch["x1"][..., :1] > 0.5}


def train_sketch(workdir: Path, **fields) -> Path:
    config = simclr_config("steps=1", *FAST)
    config.method = {"type": Sketch, **fields}
    apply_override(config, "data.tokenizer={'type': 'ByteTokenizer', 'length': 32}")
    train(experiment(config), workdir, devices=jax.devices()[:1])
    return workdir


@pytest.fixture(scope="module")
def sketch(tmp_path_factory) -> Path:
    return train_sketch(tmp_path_factory.mktemp("sketch"))


@pytest.mark.parametrize(("n", "skipped"), [(1, 2), (5, 0)])
def test_few_pictures_without_labels(sketch, n, skipped):
    source = Arrays({"image": photos(n), "key": [f"<i>{i}" for i in range(n)]})
    page = read(write_report(sketch, source, types={"Sketch": Sketch}))
    assert page.headings[4:9] == [*SECTIONS[4:8], "The method's pictures"]
    assert "This part failed" not in page.text
    # One picture has no neighbours and makes no map; the run has neither evaluations, nor embeddings, nor bad samples.
    assert page.values("class").count("skipped") == 3 + skipped
    assert any("<i>0" in alt for alt in page.values("alt"))


def test_a_method_without_images(tmp_path):
    train_sketch(tmp_path, sound=True)
    page = read(write_report(tmp_path, types={"Sketch": Sketch}))
    assert "This part failed" not in page.text
    assert "no feature 'image' of these samples; it has sound." in page.text
    assert len([alt for alt in page.values("alt") if alt.startswith("<negative> of picture")]) == 6


def test_a_method_that_is_not_named_in_types(sketch):
    page = read(write_report(sketch))
    assert "This part failed" not in page.text
    assert "config.method.type='Sketch' is not known" in page.text


def files_only(workdir: Path, to: Path, *lines: str) -> Path:
    """A copy of a run without its checkpoints, with more records."""
    shutil.copytree(workdir, to, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    with (to / "metrics.jsonl").open("a") as file:
        file.write("".join(line + "\n" for line in lines))
    return to


def test_values_that_are_not_finite(run, tmp_path):
    """`null` stands for NaN and infinity; a method may name its metrics as it likes."""
    record = {"step": 7, "loss": None, "<script>x": None, "eval/frozen/knn20_top1": None, "collapse/std": None}
    page = read(write_report(files_only(run[0], tmp_path / "run", json.dumps(record))))
    assert "This part failed" not in page.text
    assert (
        "Not finite (NaN or infinity) from step 7 on: <script>x, collapse/std, eval/frozen/knn20_top1, loss."
        in page.text
    )
    assert page.text.count("1 value not finite") == 3
    assert "no finite value" in page.text
    assert "no checkpoint in" in page.text


@pytest.mark.parametrize("config", [True, False])
def test_a_run_without_records(run, tmp_path, config):
    workdir = files_only(run[0], tmp_path / "run")
    (workdir / "metrics.jsonl").write_text("")
    if not config:
        (workdir / "config.json").unlink()
    (workdir / "bad_samples.jsonl").write_text('{"key": "<u>", "reason": "<s>"}\n{"key": cut')
    (workdir / "incidents.jsonl").write_text('{"step": 7, "kind": "rewind", "text": "going back to step 4"}\n')
    page = read(write_report(workdir))
    assert "This part failed" not in page.text
    assert "Nothing has been logged yet." in page.text
    assert "2 samples could not be read" in page.text
    assert "<u>" in page.text
    assert page.words[page.words.index("rewind") - 1 :][:3] == ["7", "rewind", "going back to step 4"]


def test_captions_are_ranked_and_escaped(tmp_path):
    """Seven pictures, each with its five nearest captions of seven, and its own where that is not among them."""
    train_sketch(tmp_path, stride=4)
    texts = [f"</li><script>{3 ** (i + 7)}" for i in range(7)]
    source = Arrays({"image": photos(7), "text": texts, "label": np.zeros(7, int)}, classes=(HOSTILE[1],))
    page = read(write_report(tmp_path, source, types={"Sketch": Sketch}))
    assert "This part failed" not in page.text
    assert "only 2 x 2 places" in page.text
    found = load(tmp_path, types={"Sketch": Sketch}).embed(source, ("image", "text"))
    image, text = (found[name] / np.linalg.norm(found[name], axis=1, keepdims=True) for name in ("image", "text"))
    order = np.argsort(-image @ text.T, axis=1)
    rank = np.argmax(order == np.arange(7)[:, None], axis=1)
    shown = [alt.removeprefix("picture with the caption: ") for alt in page.values("alt") if "the caption: " in alt]
    expected = []
    for i in (texts.index(own) for own in shown):
        expected += [texts[j] + (" ✓" if j == i else "") for j in order[i, :5]]
        expected += [f"Its own, at rank {rank[i] + 1}: {texts[i]}"] if rank[i] >= 5 else []
    assert len(shown) == 6
    assert [word for word in page.words if "</li><script>" in word] == expected
    first, five = (f"{100 * np.mean(rank < k):.1f} %" for k in (1, 5))
    assert f"comes first for {first} of the pictures and among the first 5 for {five}" in page.text


def records(n: int = 12, **values) -> list[dict]:
    """Records of a healthy run, changed by `values`: functions of the progress from 0 to 1."""
    healthy = {
        "loss": lambda t: 5 - t,
        "data_wait": lambda t: 0.01,
        "collapse/std": lambda t: 0.9,
        "collapse/rank": lambda t: 40 - 10 * t,
        "collapse/positive": lambda t: t,
        "collapse/negative": lambda t: 0.0,
    }
    functions = healthy | {name.replace("__", "/"): f for name, f in values.items()}
    return [{"step": i + 1, **{name: f(i / (n - 1)) for name, f in functions.items()}} for i in range(n)]


def warnings(*args) -> list[str]:
    return [f.text for f in verdict(*args) if f.kind == "warning"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"collapse__std": lambda t: 0.9 * (1 - t) ** 2}, "collapsed to a point"),
        ({"collapse__std": lambda t: 0.25}, "narrow cone"),
        ({"collapse__rank": lambda t: 1.1}, "single direction"),
        ({"collapse__rank": lambda t: 40 * (1 - t) + 4 * t}, "lost most of their dimensions"),
        ({"collapse__positive": lambda t: 0.5, "collapse__negative": lambda t: 0.49}, "hardly closer"),
        ({"loss": lambda t: None if t == 1 else 1 - t}, "Not finite (NaN or infinity) from step 12 on: loss."),
    ],
)
def test_verdict_warns(change, said):
    assert warnings(records(), []) == []
    (warning,) = warnings(records(**change), [])
    assert said in warning


def test_verdict_compares_with_random_and_pixels():
    one = np.array([0.5])
    below = verdict(records(), [Figure("a", one, one + 0.2, one + 0.3), Figure("b", one, one - 0.1, one * np.nan)])
    assert [f.text for f in below if f.kind == "warning"] == ["Below random initialisation: a 50.0 % against 70.0 %."]
    assert "Raw pixels do better: a 50.0 % against 80.0 %." in [f.text for f in below if f.kind == "note"]
    notes = [f.text for f in verdict(records(data_wait=lambda t: 0.4, loss=lambda t: t), []) if f.kind == "note"]
    assert any("The loss did not fall" in note for note in notes)
    assert any("waited for data 40 % of the time" in note for note in notes)


def points(figure: Html) -> list[np.ndarray]:
    """The coordinates of each line of a chart."""
    values = [value for tag, name, value in Page(figure).attributes if (tag, name) == ("polyline", "points")]
    return [np.array([p.split(",") for p in value.split()], float) for value in values]


def test_a_line_is_drawn_where_its_values_are():
    steps, values = np.array([0, 10, 20, 40]), np.array([1.0, 3.0, 2.0, 5.0])
    (xy,) = points(line_chart("loss", [Line("loss", steps, values)]))
    for drawn, given in ((xy[:, 0], steps), (-xy[:, 1], values)):
        assert np.corrcoef(drawn, given)[0, 1] > 0.99999
    # Without the second value there are two pieces, and over more than a factor of 50 the axis is logarithmic.
    values = np.array([0.1, np.nan, 10.0, 1000.0])
    first, second = points(line_chart("loss", [Line("loss", steps, values)], log=True))
    assert (len(first), len(second)) == (1, 2)
    y = np.concatenate([first, second])[:, 1]
    np.testing.assert_allclose(np.diff(y)[1], np.diff(y)[0], atol=0.2)


def test_long_lines_are_averaged_within_a_band():
    steps = np.arange(10_000)
    values = np.where(steps == 5000, 9.0, 0.0) + np.random.default_rng(0).normal(size=10_000) * 0.1
    figure = line_chart("noise", [Line("noise", steps, values)])
    (xy,) = points(figure)
    assert len(xy) <= 240
    # A gap stays a gap.
    values[3000:4000] = np.nan
    before, after = points(line_chart("noise", [Line("noise", steps, values)]))
    assert after[0, 0] - before[-1, 0] > 25
    band = next(value for tag, name, value in Page(figure).attributes if (tag, name) == ("polygon", "points"))
    top = min(float(p.split(",")[1]) for p in band.split())
    assert top < xy[:, 1].min() - 50  # the spike is in the band


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1234"),
        (12_345, "12.3k"),
        (3.4e6, "3.4M"),
        (7.71e-7, "7.7e-7"),
        (-0.0012, "-0.0012"),
        (np.nan, "-"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_elements_escape_everything():
    made = el("p", '<&">', class_='a"b', data_x=None)
    assert made == '<p class="a&quot;b">&lt;&amp;&quot;&gt;</p>'
    assert el("div", made) == f"<div>{made}</div>"
    assert el("p", "a\0b\ud800\u200dc") == "<p>a\ufffdb\ufffd\u200dc</p>"
    document("<t>", "<b>").encode()
    assert "&lt;b&gt;" in document("<t>", "<b>")


def test_pictures_are_inside_the_page():
    image = photos(1, 16)[0]
    ((_, _, source),) = [a for a in Page(picture(image, "x")).attributes if a[1] == "src"]
    assert urlparse(source).scheme == "data"
    data = np.frombuffer(base64.b64decode(source.partition(",")[2]), np.uint8)
    shown = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert shown is not None
    np.testing.assert_array_equal(shown[..., ::-1], image)  # small ones are lossless
    large = Page(picture(np.zeros((300, 600, 3), np.uint8), "x"))
    assert (large.values("width"), large.values("height")) == (["96"], ["48"])


def test_views_are_shown_without_their_normalisation():
    views = Views({"image": View(size=8, crop="none", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))})
    images = photos(2, 8)
    seen = np.asarray(views(None, {"image": images})["image"])
    np.testing.assert_array_equal(np.stack([_display(x, views, "image") for x in seen]), images)
    assert _display(np.array([[[True]]]), views).tolist() == [[[255, 255, 255]]]


def test_neighbours_are_the_nearest_others():
    x = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    x[3] = x[11] = x[7]
    cosine, index = _others(x, 4)
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    full = u @ u.T
    np.fill_diagonal(full, -2)
    np.testing.assert_allclose(cosine, -np.sort(-full, axis=1)[:, :4], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(full, index, axis=1), cosine, atol=1e-6)
    # More equal rows than neighbours: a row may miss itself, and is never its own neighbour.
    assert (_others(np.ones((9, 2), np.float32), 3)[1] != np.arange(9)[:, None]).all()


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (5, 2)])
def test_principal_components(shape):
    x = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1)
    centred = x - x.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    expected = np.pad(u * s, ((0, 0), (0, 3)))[:, :3]
    np.testing.assert_allclose(np.abs(_pca(x, 3)), np.abs(expected), atol=1e-8)


def test_equal_features_do_no_harm():
    """A collapsed encoder is exactly what a report must survive."""
    assert _components(np.ones((2, 3, 3, 5), np.float32)).shape == (2, 3, 3, 3)
    for n in (10, 60):
        plane = _plane(np.ones((n, 4), np.float32))
        assert plane.shape == (n, 2)
        assert np.isfinite(plane).all()
        figure = Page(scatter("map", plane, np.zeros(n, int), ["<a>"]))
        assert "nan" not in "".join(figure.values("d"))
        assert "<a>" in figure.text


def test_features_in_clusters_stay_in_clusters():
    """t-SNE of three far clusters: a point's nearest neighbour in the plane is of its own."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    x = (10 * np.eye(3, 8)[labels] + rng.normal(size=(90, 8))).astype(np.float32)
    plane = _plane(x)
    distance = np.linalg.norm(plane[:, None] - plane, axis=-1) + 1e9 * np.eye(90)
    assert (labels[distance.argmin(axis=1)] == labels).mean() > 0.95
    np.testing.assert_array_equal(_plane(x), plane)


def test_samples_are_chosen_evenly_from_sorted_sources():
    labels = np.sort(np.arange(5000) % 10)
    chosen = choose(Arrays({"image": labels, "label": labels}), 1000)
    counts = np.bincount([chosen[i]["label"] for i in range(1000)], minlength=10)
    assert len(set(chosen.indices)) == 1000
    assert counts.min() > 60


def test_seeds_and_overrides_reach_the_config_table(run, page):
    assert any(word == "data.views.views.x1.size" for word in page.words)
    assert simclr().steps != 6  # the table shows the run, not the config file
    assert page.words[page.words.index("steps") + 1] == "6"
