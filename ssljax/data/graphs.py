"""Graphs: `Graphs`, a source of one large graph or many small ones, and `Graph`, which pads them to one shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ssljax.bounded import read_npz
from ssljax.data.errors import BadSample
from ssljax.data.fields import shown
from ssljax.data.sources.base import Record, check_index, expand, int32

SPLITS = ("train", "val", "test")
_LARGEST = 2**28  # numbers of a feature matrix


@dataclass(frozen=True)
class Graphs:
    """Graphs in a numpy archive: a single one with labelled nodes, or many with a label each.

    Record: `graph`, a dict of `nodes` float32 `[N, F]` and `edges` int32 `[2, E]`, each edge once; `key`; and

    - many graphs (members `node_ptr`, `edge_ptr` [G+1], `edges` [E, 2] with node numbers of the whole archive,
      `node_tags` [N], `labels` [G]): `label`. Features: the tag one-hot, or the degree where all nodes have one tag or
      there is none, as GIN does it (Xu et al. 2019, section 7); `features` says otherwise.
    - one graph (members `feat_data`, `feat_indices`, `feat_indptr`, `feat_shape`: a sparse matrix; `edges`, `labels`,
      `train_idx`, `val_idx`, `test_idx`): in `graph` also `node_label` int32 `[N]` and `node_split` int32 `[N]`, an
      index into `SPLITS`; -1 is none.

    Raises:
        ValueError: other members; numbers that point outside.
    """

    path: str
    features: Literal["auto", "tags", "degree"] = "auto"

    def __post_init__(self) -> None:
        _ = self._members

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes read the file again rather than receive it through a pipe.
        return {"path": self.path, "features": self.features}

    @cached_property
    def _members(self) -> Mapping[str, np.ndarray]:
        path = expand(self.path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            members = read_npz(path)
            _check_members(members)
        except ValueError as error:
            raise ValueError(f"{path} is no archive of graphs: {error}") from error
        return members

    @property
    def _single(self) -> bool:
        return "feat_indptr" in self._members

    @property
    def classes(self) -> tuple[str, ...]:
        """Of the graphs, or of the nodes of a single graph: numbers."""
        return tuple(map(str, range(int(self._members["labels"].max()) + 1)))

    @property
    def labels(self) -> np.ndarray | None:
        """int32 `[G]`, or None for a single graph."""
        return None if self._single else int32(self._members["labels"])

    def __len__(self) -> int:
        return 1 if self._single else len(self._members["node_ptr"]) - 1

    def __getitem__(self, index: int) -> Record:
        i, m = check_index(index, len(self)), self._members
        key = f"{expand(self.path).name}[{i}]"
        if self._single:
            return {"graph": {**self._labelled_nodes, "edges": int32(m["edges"]).T}, "key": key}
        first, last = m["node_ptr"][i], m["node_ptr"][i + 1]
        edges = int32(m["edges"][m["edge_ptr"][i] : m["edge_ptr"][i + 1]] - first).T
        if edges.size and not 0 <= edges.min() <= edges.max() < last - first:
            raise BadSample(f"an edge leads out of a graph of {last - first} nodes", key)
        kinds = self._kinds[first:last]
        nodes = (kinds[:, None] == np.arange(self._kinds.max() + 1)).astype(np.float32)
        return {"graph": {"nodes": nodes, "edges": edges}, "label": int(m["labels"][i]), "key": key}

    @cached_property
    def _kinds(self) -> np.ndarray:
        """`[N]`: which feature of a node is 1."""
        m = self._members
        tags = m.get("node_tags")
        if self.features == "tags" and tags is None:
            raise ValueError(f"{self.path} has no member 'node_tags'")
        if tags is not None and (self.features == "tags" or (self.features == "auto" and tags.max() > 0)):
            return tags
        return np.bincount(m["edges"].ravel(), minlength=int(m["node_ptr"][-1]))

    @cached_property
    def _labelled_nodes(self) -> dict[str, np.ndarray]:
        m = self._members
        nodes = np.zeros(m["feat_shape"], np.float32)
        nodes[np.repeat(np.arange(len(nodes)), np.diff(m["feat_indptr"])), m["feat_indices"]] = m["feat_data"]
        split = np.full(len(nodes), -1, np.int32)
        for number, name in enumerate(SPLITS):
            split[m.get(f"{name}_idx", np.zeros(0, int))] = number
        return {"nodes": nodes, "node_label": int32(m["labels"]), "node_split": split}


def _check_members(m: dict[str, np.ndarray]) -> None:
    single = ("feat_data", "feat_indices", "feat_indptr", "feat_shape", "edges", "labels")
    many = ("node_ptr", "edge_ptr", "edges", "labels")
    if not set(single) <= m.keys() and not set(many) <= m.keys():
        raise ValueError(f"it has the members {sorted(m)}; it needs {', '.join(single)}, or {', '.join(many)}")
    for name, array in m.items():
        sides = 2 if name == "edges" else 1
        if array.ndim != sides or (array.dtype.kind not in "iu" and name != "feat_data"):
            raise ValueError(f"{name!r} is {shown(array)}; expected {sides} axes of integers")
    if m["edges"].shape[1:] != (2,):
        raise ValueError(f"'edges' has the shape {m['edges'].shape}; expected [E, 2]")
    if "feat_indptr" in m:
        if m["feat_shape"].shape != (2,) or min(m["feat_shape"]) < 1 or int(m["feat_shape"].prod()) > _LARGEST:
            raise ValueError(f"'feat_shape' {m['feat_shape'].tolist()} is none, or over {_LARGEST:,} numbers")
        graphs, (nodes, columns) = 1, map(int, m["feat_shape"])
        _check_rising("feat_indptr", m["feat_indptr"], nodes, len(m["feat_indices"]))
        _check_range("feat_indices", m["feat_indices"], columns)
        if m["feat_data"].shape != m["feat_indices"].shape or m["feat_data"].dtype.kind not in "biuf":
            raise ValueError("'feat_data' and 'feat_indices' differ in length")
        for name in SPLITS:
            _check_range(f"{name}_idx", m.get(f"{name}_idx", np.zeros(0, int)), nodes)
    else:
        nodes, graphs = int(m["node_ptr"][-1]) if len(m["node_ptr"]) else 0, len(m["node_ptr"]) - 1
        _check_rising("node_ptr", m["node_ptr"], graphs, nodes)
        _check_rising("edge_ptr", m["edge_ptr"], graphs, len(m["edges"]))
        if len(m.get("node_tags", range(nodes))) != nodes or nodes > _LARGEST:
            raise ValueError(f"'node_tags' are {len(m['node_tags'])}, the nodes {nodes}")
        _check_range("node_tags", m.get("node_tags", np.zeros(0, int)), 2**16)
    labelled = nodes if "feat_indptr" in m else graphs
    if len(m["labels"]) != labelled:
        raise ValueError(f"there are {len(m['labels'])} labels for {labelled} graphs or nodes")
    _check_range("edges", m["edges"], nodes)


def _check_rising(name: str, array: np.ndarray, count: int, last: int) -> None:
    if count < 1 or len(array) != count + 1 or array[0] != 0 or array[-1] != last or (array[1:] < array[:-1]).any():
        raise ValueError(f"{name!r} must be a rising row of {count + 1} numbers from 0 to {last}")


def _check_range(name: str, array: np.ndarray, stop: int) -> None:
    if array.size and not 0 <= array.min() <= array.max() < stop:
        raise ValueError(f"{name!r} has numbers from {array.min()} to {array.max()}; expected 0 to {stop - 1}")


@dataclass(frozen=True)
class Graph:
    """A graph padded to one shape: `{"nodes": float32 [nodes, features], "edges": int32 [2, edges], "node_mask": bool
    [nodes], "edge_mask": bool [edges]}`; padding is 0 and False.

    Values: dicts of `nodes` `[N, features]` and `edges` `[2, E]`, integers. With `undirected`, edge i becomes 2i and,
    in the other direction, 2i + 1: `edges` has room for half as many.

    Raises:
        BadSample: no such dict; another number of features; an edge to no node; larger than the shape, unless
            `too_large="sample"`.
    """

    nodes: int
    edges: int
    features: int
    undirected: bool = True
    too_large: Literal["bad", "sample"] = "bad"  # sample: nodes around a random one, and some edges
    row_sums: bool = False  # the features of a node are divided by their sum
    node_labels: bool = False  # also `node_label` and `node_split`, int32 [nodes], -1 in the padding

    def __post_init__(self) -> None:
        if min(self.nodes, self.edges, self.features) < 1 or (self.undirected and self.edges % 2):
            raise ValueError("Graph: nodes, edges and features must be at least 1, edges even if they are undirected")

    def __call__(self, value: Any, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        nodes, edges = self._checked(value)
        labels = self._labels(value, len(nodes)) if self.node_labels else {}
        room = self.edges // 2 if self.undirected else self.edges
        if len(nodes) > self.nodes or edges.shape[1] > room:
            if self.too_large == "bad":
                raise BadSample(
                    f"a graph of {len(nodes):,} nodes and {edges.shape[1]:,} edges is over the limit of {self.nodes:,} "
                    f"and {room:,} (Graph.nodes, Graph.edges)"
                )
            chosen, edges = around(edges, len(nodes), self.nodes, rng)
            nodes, labels = nodes[chosen], {name: array[chosen] for name, array in labels.items()}
            if edges.shape[1] > room:
                kept = np.arange(room) if rng is None else np.sort(rng.choice(edges.shape[1], room, replace=False))
                edges = edges[:, kept]
        if self.undirected:
            edges = np.stack([edges, edges[::-1]], -1).reshape(2, -1)
        if self.row_sums:
            sums = nodes.sum(1, keepdims=True)
            nodes = nodes / np.where(sums == 0, 1, sums)
        found = self.blank()
        for name, array in {"nodes": nodes, **labels}.items():
            found[name][: len(array)] = array
        found["edges"][:, : edges.shape[1]] = edges
        found["node_mask"][: len(nodes)] = True
        found["edge_mask"][: edges.shape[1]] = True
        return found

    def blank(self) -> dict[str, np.ndarray]:
        """A graph without nodes."""
        labels = {name: np.full(self.nodes, -1, np.int32) for name in ("node_label", "node_split") if self.node_labels}
        return {
            "nodes": np.zeros((self.nodes, self.features), np.float32),
            "edges": np.zeros((2, self.edges), np.int32),
            "node_mask": np.zeros(self.nodes, bool),
            "edge_mask": np.zeros(self.edges, bool),
            **labels,
        }

    def _checked(self, value: Any) -> tuple[np.ndarray, np.ndarray]:
        nodes, edges = graph_arrays(value)
        if nodes.shape[1] != self.features:
            raise BadSample(f"the nodes have {nodes.shape[1]} features, but Graph.features is {self.features}")
        return nodes, edges

    def _labels(self, value: Mapping[str, Any], count: int) -> dict[str, np.ndarray]:
        found = {name: np.asarray(value.get(name)) for name in ("node_label", "node_split")}
        for name, array in found.items():
            if array.shape != (count,) or array.dtype.kind not in "iu":
                raise BadSample(f"{name!r} of the graph is {shown(array)}; expected {count} integers, one a node")
        return found


def graph_arrays(value: Any) -> tuple[np.ndarray, np.ndarray]:
    """float32 nodes `[N, F]` and int32 edges `[2, E]` of a graph. Raises BadSample."""
    if not isinstance(value, Mapping) or not {"nodes", "edges"} <= value.keys():
        raise BadSample(f"'graph' is {shown(value)}; expected a dict of 'nodes' [N, F] and 'edges' [2, E]")
    nodes, edges = (np.asarray(value[name]) for name in ("nodes", "edges"))
    if nodes.ndim != 2 or not len(nodes) or nodes.dtype.kind not in "biuf":
        raise BadSample(f"'nodes' of the graph is {shown(nodes)}; expected numbers [N, F]")
    if edges.ndim != 2 or len(edges) != 2 or edges.dtype.kind not in "iu":
        raise BadSample(f"'edges' of the graph is {shown(edges)}; expected integers [2, E]")
    if edges.size and not 0 <= edges.min() <= edges.max() < len(nodes):
        raise BadSample(f"edges between the nodes {edges.min()} and {edges.max()}, but there are {len(nodes)} nodes")
    with np.errstate(over="ignore"):
        nodes = nodes.astype(np.float32, copy=False)
    if not np.isfinite(nodes).all():
        raise BadSample("features of the graph that are NaN, infinite or too large")
    return nodes, edges.astype(np.int32, copy=False)


def around(edges: np.ndarray, count: int, most: int, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` of `count` nodes, found breadth first from a random one, or without an `rng` from the best
    connected; and the edges between them, renumbered. Where the neighbours end, it starts anew."""
    ends = np.concatenate([edges, edges[::-1]], 1)
    order = np.argsort(ends[0], kind="stable")
    neighbours, starts = ends[1][order], np.searchsorted(ends[0][order], np.arange(count + 1))
    seeds = np.argsort(-np.diff(starts), kind="stable") if rng is None else rng.permutation(count)
    place = np.full(count, -1)
    found, front = 0, np.zeros(0, int)
    for seed in seeds:
        if found >= most:
            break
        front = np.array([seed]) if place[seed] < 0 else front[:0]
        while len(front) and found < most:
            front = (front if rng is None else rng.permutation(front))[: most - found]
            place[front] = found + np.arange(len(front))
            found += len(front)
            near = [neighbours[starts[node] : starts[node + 1]] for node in front]
            front = np.unique(np.concatenate(near))
            front = front[place[front] < 0]
    chosen = np.argsort(np.where(place < 0, count, place), kind="stable")[:found]
    inside = (place[edges] >= 0).all(0)
    return chosen, place[edges[:, inside]].astype(np.int32)
