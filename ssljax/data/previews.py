"""Pictures of what is no picture, for contact sheets: uint8 `[H, W, 3]` of a value of a record. All raise BadSample."""

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ssljax.data.bands import channels_last
from ssljax.data.errors import BadSample
from ssljax.data.graphs import around, graph_arrays
from ssljax.data.pictures import decode
from ssljax.data.points import Points
from ssljax.data.scans import open_volume, to_unit, typical_range
from ssljax.data.tiff import Tiff

_SIDE = 256  # pixels of what is drawn
_LARGEST = 2**26  # voxels of a slice
_POINTS = 4096
_NODES, _STEPS = 150, 80  # of a graph; of moving its nodes
_COLOURS = ((38, 90, 170), (214, 96, 40), (60, 140, 70), (190, 50, 60), (130, 90, 170), (120, 80, 60), (210, 120, 180),
            (110, 110, 110), (180, 170, 40), (40, 170, 190))  # fmt: skip


def image(value: Any, max_pixels: int = 64_000_000) -> np.ndarray:
    """The picture, or false colours of one with other channels than a screen has: the first, middle and last."""
    tiff = _tiff(value, max_pixels)
    if tiff is None or tiff.channels in (1, 3, 4) or tiff.samples in (3, 4):
        try:
            return decode(value, max_pixels=max_pixels)
        except BadSample:
            odd = isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] not in (1, 3, 4)
            if tiff is None and not odd:
                raise
    if tiff is not None:
        shown = tiff.read(_three(tiff.channels))
    else:
        array = channels_last(value)
        shown = array[..., _three(array.shape[-1])]
    ranges = [typical_range(channel.astype(np.float64).ravel()) for channel in np.moveaxis(shown, -1, 0)]
    return _bytes(np.stack([to_unit(shown[..., i], window) for i, window in enumerate(ranges)], -1))


def _tiff(value: Any, max_pixels: int) -> Tiff | None:
    """None for what is none, or cannot be read."""
    if not isinstance(value, bytes) or value[:2] not in (b"II", b"MM"):
        return None
    try:
        return Tiff(value, max_pixels)
    except BadSample:
        return None


def volume(value: Any) -> np.ndarray:
    """The three slices through the middle, in grey: above from the front and the side, below from the top."""
    with open_volume(value, channels=None) as scan:
        window, slices = scan.window(), []
        for axis in (1, 0, 2):
            start, stop = [0, 0, 0], list(scan.shape)
            start[axis], stop[axis] = stop[axis] // 2, stop[axis] // 2 + 1
            if math.prod(scan.shape) // scan.shape[axis] > _LARGEST:
                raise BadSample(f"{scan.shape} voxels are too many to show")
            slices.append(to_unit(scan.box(start, stop).squeeze(axis)[..., 0], window, scan.scale).T[::-1])
    front, side, top = slices
    sheet = np.zeros((front.shape[0] + top.shape[0], front.shape[1] + side.shape[1]), np.float32)
    sheet[: front.shape[0], : front.shape[1]] = front
    sheet[: front.shape[0], front.shape[1] :] = side
    sheet[front.shape[0] :, : front.shape[1]] = top
    return np.repeat(_bytes(sheet)[..., None], 3, -1)


def volume_facts(value: Any) -> dict[str, float]:
    """Unit -> how much of it."""
    with open_volume(value, channels=None) as scan:
        facts: dict[str, float] = dict(zip(("voxels deep", "high", "wide"), map(float, scan.shape), strict=True))
        if scan.spacing is not None:
            facts["mm a voxel"] = float(np.mean(scan.spacing))
        return facts


def points(value: Any) -> np.ndarray:
    """Seen from the front and, turned by 60 degrees, from above; the third axis is up, near points are dark."""
    cloud = Points(_POINTS, unit_sphere=True)(value, None)["points"]
    sheet = np.full((_SIDE // 2, _SIDE, 3), 255, np.uint8)
    for pane, (turn, tilt) in enumerate(((0.0, 0.0), (60.0, 30.0))):
        across, away, up = _turned(cloud, math.radians(turn), math.radians(tilt)).T
        order = np.argsort(-away)  # far ones first, so that near ones lie over them
        half = _SIDE // 4
        x, y = (np.rint(half * (1 + 0.92 * at[order])).astype(int) for at in (across, -up))
        shade = np.clip((away[order] + 1) / 2, 0, 1)[:, None]
        colour = np.rint((1 - shade) * (20, 40, 110) + shade * (190, 205, 235)).astype(np.uint8)
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            rows, columns = np.clip(y + down, 0, 2 * half - 1), np.clip(x + right, 0, 2 * half - 1)
            sheet[rows, pane * 2 * half + columns] = colour
    return sheet


def points_facts(value: Any) -> dict[str, float]:
    """Unit -> how much of it."""
    return {"points": len(Points(1).prepare(value).array)}


def _turned(cloud: np.ndarray, turn: float, tilt: float) -> np.ndarray:
    """About the third axis, then about the first, towards the onlooker."""
    x, y, z = cloud.T
    x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    return np.stack([x, y * math.cos(tilt) - z * math.sin(tilt), y * math.sin(tilt) + z * math.cos(tilt)], 1)


def _three(channels: int) -> list[int]:
    """Two become magenta and green, which are told apart by every eye."""
    return [0, 1, 0] if channels == 2 else [0, (channels - 1) // 2, channels - 1]


def _bytes(unit: np.ndarray) -> np.ndarray:
    return np.rint(unit * 255).astype(np.uint8)


def graph(value: Any) -> np.ndarray:
    """Nodes joined by their edges, coloured by label or largest feature; of a large graph the nodes around its best
    connected one."""
    nodes, edges = graph_arrays(value)
    kinds = np.asarray(value.get("node_label", nodes.argmax(1) if nodes.shape[1] else np.zeros(len(nodes), int)))
    if len(nodes) > _NODES:
        chosen, edges = around(edges, len(nodes), _NODES, None)
        kinds = kinds[chosen]
    place = _spread(edges, len(kinds))
    place = (place - place.min(0)) / np.maximum(np.ptp(place, axis=0).max(), 1e-9)
    place += (1 - place.max(0)) / 2
    place = [tuple(one) for one in (10 + place * (_SIDE - 20)).tolist()]
    sheet = Image.new("RGB", (_SIDE, _SIDE), (255, 255, 255))
    draw, radius = ImageDraw.Draw(sheet), 6 if len(kinds) <= 40 else 4
    for a, b in edges.T.tolist():
        draw.line((*place[a], *place[b]), (176, 176, 190), 2)
    for (x, y), kind in zip(place, kinds.tolist(), strict=True):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), _COLOURS[kind % len(_COLOURS)])
    return np.asarray(sheet)


def graph_facts(value: Any) -> dict[str, float]:
    """Unit -> how much of it."""
    nodes, edges = graph_arrays(value)
    return {"nodes": len(nodes), "edges": edges.shape[1], "features": nodes.shape[1]}


def _spread(edges: np.ndarray, count: int) -> np.ndarray:
    """Places `[count, 2]`: nodes repel each other, edges draw together (Fruchterman and Reingold 1991)."""
    turns = np.arange(count) * 2 * math.pi / count
    place = np.stack([np.cos(turns), np.sin(turns)], 1)
    joined = np.zeros((count, count))
    joined[edges[0], edges[1]] = joined[edges[1], edges[0]] = 1
    wide = 1 / math.sqrt(count)
    for step in range(_STEPS):
        apart = place[:, None] - place[None]
        length = np.maximum(np.sqrt((apart**2).sum(-1)), 1e-3)
        force = wide**2 / length**2 - joined * length / wide
        move = (apart * force[..., None]).sum(1) - 0.5 * place  # and all to the middle, lest parts drift off
        size = np.maximum(np.sqrt((move**2).sum(1, keepdims=True)), 1e-9)
        place += move / size * np.minimum(size, 0.1 * (1 - step / _STEPS))
    return place
