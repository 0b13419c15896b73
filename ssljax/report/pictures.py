"""The parts of the report that show pictures: neighbours, captions, patch maps, the map of features, augmentations."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ssljax.api import Pretrained
from ssljax.data import Source
from ssljax.evals.knn import nearest
from ssljax.report.charts import scatter, scatter_legend
from ssljax.report.page import COLORS, Html, el, lead, picture, section, short_text
from ssljax.report.samples import Samples, Skip, choose, readable, square

QUERIES, NEIGHBOURS = 8, 6
CAPTIONED, CAPTIONS = 6, 5
MAPS, SMALLEST_MAP = 8, 3
AUGMENTED, DRAWS, MOST_VIEWS = 6, 6, 4  # DRAWS: of all views together
MOST_GROUPS = 2 * len(COLORS)  # classes with a colour and shape of their own
_TSNE_FROM = 50  # samples; fewer are projected linearly


def neighbours(samples: Samples) -> Html:
    """Nearest neighbours of some pictures, by the trained encoder and by the same network before training."""
    n, labels = len(samples.trained["image"]), samples.labels
    if n < 2:
        raise Skip("One sample has no neighbours.")
    k = min(NEIGHBOURS, n - 1)
    found = {name: _others(x["image"], k) for name, x in samples.both.items()}
    said = f"Cosine of the image features, among {n:,} of the {samples.total:,} samples of {samples.where}."
    if labels is not None:
        shares = [f"{name} {_share(labels[rows] == labels[:, None])}" for name, (_, rows) in found.items()]
        said += (
            " Solid blue: same label as the query; dashed orange: another one. "
            f"Same label among the {k} nearest, over all samples: {', '.join(shares)}."
        )
    cards = []
    for query in samples.queries(QUERIES):
        rows: list[Html] = []
        for name, (cosine, index) in found.items():
            agree = "" if labels is None else f"{np.sum(labels[index[query]] == labels[query])} of {k}"
            rows.append(el("div", el("span", name), el("span", agree), class_="aid over"))
            near = [_neighbour(samples, query, int(i), c) for i, c in zip(index[query], cosine[query], strict=True)]
            rows.append(el("div", *near, class_="row"))
        name = samples.name(query)
        shown = el("div", picture(samples.picture(query), f"query: {name}"), el("div", name, class_="name"))
        cards.append(el("div", shown, el("div", *rows), class_="card"))
    return section("Nearest neighbours", lead(said), el("div", *cards, class_="cards"))


def _others(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, row) of each row's k nearest other rows."""
    cosine, index = nearest(x, x, k + 1)
    own = index == np.arange(len(x))[:, None]
    own[~own.any(axis=1), -1] = True  # among equal rows, a row need not be in its own list
    return cosine[~own].reshape(len(x), k), index[~own].reshape(len(x), k)


def _neighbour(samples: Samples, query: int, row: int, cosine: float) -> Html:
    labels, told, mark = samples.labels, "", None
    if labels is not None:
        mark = "same" if labels[row] == labels[query] else "other"
        told = f"{samples.name(row)}, {mark} label, "
    return picture(samples.picture(row), f"{told}cosine {cosine:.2f}", class_=mark)


def _share(hits: np.ndarray) -> str:
    return f"{100 * np.mean(hits):.1f} %"


def captions(samples: Samples) -> Html:
    """The captions nearest to some pictures, for methods with a text tower."""
    found = samples.trained
    # Samples with one caption in common count as one candidate.
    _, first, candidate = np.unique(found["tokens"], axis=0, return_index=True, return_inverse=True)
    _, order = nearest(found["text"][first], found["image"], len(first))
    rank = np.argmax(order == candidate[:, None], axis=1)
    items = []
    for row in samples.queries(CAPTIONED):
        own = samples.caption(row)
        lines = [
            el("li", own, " ✓", class_="true") if j == candidate[row] else el("li", samples.caption(int(first[j])))
            for j in order[row, :CAPTIONS]
        ]
        missed = el("p", f"Its own, at rank {rank[row] + 1}: {own}", class_="aid") if rank[row] >= CAPTIONS else None
        shown = picture(samples.picture(row), f"picture with the caption: {own}")
        items.append(el("div", shown, el("div", el("ol", *lines), missed)))
    said = (
        f"The captions with the largest cosine to a picture, among {len(first):,} different ones of {samples.where}. "
        f"Blue with ✓: its own, which comes first for {_share(rank == 0)} of the pictures and among the first "
        f"{CAPTIONS} for {_share(rank < CAPTIONS)}."
    )
    return section("Captions of pictures", lead(said), el("div", *items, class_="captions"))


def patch_maps(samples: Samples) -> Html:
    """The first principal components of the patch features as red, green and blue (as in Oquab et al., 2023)."""
    rows = samples.queries(MAPS)
    maps = samples.maps(rows)
    height, width = maps["trained"].shape[1:3]
    if min(height, width) < SMALLEST_MAP:
        raise Skip(f"The map of patches has only {height} x {width} places.")
    view = samples.pretrained.experiment.data.eval_view
    batch = {"image": np.stack([samples.picture(row) for row in rows])}
    seen = jax.device_get(jax.jit(lambda batch: view(None, batch))(batch))["image"]
    colors = {name: _components(patches) for name, patches in maps.items()}
    cells = [el("span", name) for name in 2 * ("picture", *colors)]
    for i, row in enumerate(rows):
        name = samples.name(row)
        cells.append(picture(_display(seen[i], view, "image"), name))
        cells += [picture(images[i], f"patches of {name}, {kind}") for kind, images in colors.items()]
    said = (
        f"The first three principal components of the {height} x {width} patch features, over all pictures below, "
        "as red, green and blue: like colours are like features."
    )
    return section("Patch features", lead(said), _tiles(6, 126, cells))


def _components(patches: np.ndarray) -> np.ndarray:
    """Patch features `[n, h, w, d]` to colours, uint8 `[n, h, w, 3]`; a component spans two standard deviations."""
    x = _pca(patches.reshape(-1, patches.shape[-1]), 3)
    x = 0.5 + x / np.maximum(4 * x.std(axis=0), 1e-12)
    return np.rint(255 * x.clip(0, 1)).astype(np.uint8).reshape(*patches.shape[:3], 3)


def _pca(x: np.ndarray, count: int) -> np.ndarray:
    """The first principal components `[n, count]`, float64; zeros where there are fewer."""
    from sklearn.decomposition import PCA  # slow to import

    kept = min(count, *x.shape)
    with np.errstate(invalid="ignore"):  # it divides by the variance, also of equal rows
        found = PCA(kept, random_state=0).fit_transform(x.astype(np.float64))
    return np.pad(found, ((0, 0), (0, count - kept)))


def feature_map(samples: Samples) -> Html:
    """All samples in the plane, by the neighbourhood of their features."""
    n, labels = len(samples.trained["image"]), samples.labels
    if n < 3:
        raise Skip("Fewer than three samples make no map.")
    groups, names = np.full(n, 0 if labels is None else -1), ["samples"]
    if labels is not None:
        present, counts = np.unique(labels, return_counts=True)
        largest = np.sort(np.argsort(-counts, kind="stable")[:MOST_GROUPS])
        names = [samples.class_name(int(label)) for label in present[largest]]
        for i, label in enumerate(present[largest]):
            groups[labels == label] = i
    figures = [scatter(name, _plane(x["image"]), groups, names) for name, x in samples.both.items()]
    how = "t-SNE" if n >= _TSNE_FROM else "Two principal components"
    said = f"{how} of the normalised image features of {n:,} samples of {samples.where}."
    legend = None if labels is None else scatter_legend(names, others=bool((groups < 0).any()))
    return section("Map of the features", lead(said), el("div", *figures, class_="pair"), legend)


def _plane(x: np.ndarray) -> np.ndarray:
    """Features to the plane, `[n, 2]`, the same at every call."""
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    if len(x) < _TSNE_FROM:
        return _pca(x, 2)
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    x = _pca(x, 30).astype(np.float32)
    start = 1e-4 * x[:, :2] / max(x[:, 0].std(), 1e-12)  # a linear start keeps the large structure
    tsne = TSNE(perplexity=min(30.0, (len(x) - 1) / 3), init=start, random_state=0, max_iter=500)
    with threadpool_limits(1):  # 3 s for 1,000 points; on two busy cores, threads that wait for each other took 16 s
        return tsne.fit_transform(x)


Training = tuple[list[dict[str, Any]], list[dict[str, np.ndarray]]]


def training_batches(pretrained: Pretrained, source: Source) -> Training:
    """(some records, batches of other draws that the training views make of them)."""
    run = pretrained.run
    records = readable(choose(source, 4 * AUGMENTED), AUGMENTED)
    views = jax.jit(lambda key, batch: run.experiment.data.views(key, batch))  # the views need not be hashable
    draws = []
    for d in range(DRAWS):
        rng = np.random.default_rng(d)
        rows = [run.train_transform(record, rng) for record in records]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batch["index"] = np.arange(len(records), dtype=np.int32)
        draws.append(jax.device_get(views(jax.random.key(d), batch)))
    return records, draws


def augmentations(pretrained: Pretrained, training: Training) -> Html:
    """What the training views make of some pictures."""
    views = pretrained.experiment.data.views
    records, draws = training
    names = [name for name, x in draws[0].items() if x.ndim in (4, 5) and x.shape[-1] in (1, 3)]
    if not names or "image" not in records[0]:
        raise Skip("The training views are no pictures.")
    shown = names[:MOST_VIEWS]
    each = max(2, DRAWS // len(shown))
    cells = [el("span", "picture"), *(el("span", name, style=f"grid-column: span {each}") for name in shown)]
    for i, record in enumerate(records):
        cells.append(picture(square(record["image"]), short_text(str(record.get("key", f"picture {i + 1}")))))
        for name in shown:
            # Some views hold several draws of a picture; the others give one a batch.
            drawn = [image for x in draws for image in (x[name][i] if x[name].ndim == 5 else x[name][i : i + 1])]
            cells += [picture(_display(x, views, name), f"{name}, draw {d + 1}") for d, x in enumerate(drawn[:each])]
    said = f"{each} draws of each training view, as the method sees them."
    if len(names) > len(shown):
        said += f" Not shown: {', '.join(names[MOST_VIEWS:])}."
    return section("Augmentations", lead(said), _tiles(1 + len(shown) * each, 88, cells))


def of_method(pretrained: Pretrained, training: Training) -> Html:
    """What the method itself has to show of a training batch: reconstructions, masks, samples (`Method.pictures`)."""
    method: Any = pretrained.experiment.method
    records, draws = training
    found = jax.device_get(jax.jit(method.pictures)(pretrained.encoder.params, pretrained.encoder.state, draws[0]))
    views = pretrained.experiment.data.views
    cells = [el("span", name) for name in found]
    for i in range(len(records)):
        cells += [picture(_display(x[i], views), f"{name} of picture {i + 1}") for name, x in found.items()]
    return section("The method's pictures", _tiles(len(found), 126, cells))


def _tiles(columns: int, side: int, cells: Sequence[Html]) -> Html:
    """Cells of at most `side` pixels, row by row."""
    width = min(1060, columns * side)
    style = f"grid-template-columns: repeat({columns}, minmax(0, 1fr)); max-width: {width}px"
    return el("div", *cells, class_="tiles", style=style)


def _display(image: np.ndarray, views: Any, name: str | None = None) -> np.ndarray:
    """A view as a picture, uint8 `[h, w, 3]`: the normalisation of its recipe undone, where that is known.

    Without a name, that of any view, as recipes normalise their views alike. One channel is taken to lie in [0, 1].
    """
    if image.dtype != np.uint8:
        recipes: Mapping[str, Any] = getattr(views, "views", {})
        recipe = recipes.get(name) if name else next(iter(recipes.values()), None)
        image = np.nan_to_num(image.astype(np.float32))
        if recipe is not None and image.shape[-1] == len(recipe.mean):
            image = image * np.array(recipe.std, np.float32) + np.array(recipe.mean, np.float32)
        elif recipe is None and (image.min() < 0 or image.max() > 1):
            image = (image - image.min()) / np.ptp(image)
        image = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
