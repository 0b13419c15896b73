"""Graphs from archives to views: counts, features, padding, masks; what points outside is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import quick_compilation  # noqa: F401
from source_helpers import assert_is_a_good_source

from ssljax.config import build
from ssljax.data import BadSample, Graph, Graphs, HostTransform, Loader, Reader, inspect, parse_source, train_batches
from ssljax.data.graphs import around
from ssljax.views import GraphView, PerExample, grace, graphcl

MANY = {
    "node_ptr": np.array([0, 3, 5, 9]),
    "edge_ptr": np.array([0, 3, 4, 7]),
    "edges": np.array([[0, 1], [1, 2], [0, 2], [3, 4], [5, 6], [6, 7], [6, 8]]),
    "node_tags": np.array([0, 1, 2, 0, 0, 1, 1, 1, 0]),
    "labels": np.array([0, 1, 1]),
}
ONE = {
    "feat_data": np.array([1.0, 2, 3, 4], np.float32),
    "feat_indices": np.array([0, 2, 1, 2]),
    "feat_indptr": np.array([0, 2, 2, 3, 4]),
    "feat_shape": np.array([4, 3]),
    "edges": np.array([[0, 1], [1, 2], [2, 3]]),
    "labels": np.array([0, 1, 1, -1]),
    "train_idx": np.array([0]),
    "test_idx": np.array([1, 2]),
}


def archive(tmp_path, members) -> str:
    np.savez(tmp_path / "g.npz", **members)
    return str(tmp_path / "g.npz")


def test_many_graphs(tmp_path):
    source = Graphs(archive(tmp_path, MANY))
    assert len(source) == 3
    assert source.classes == ("0", "1")
    np.testing.assert_array_equal(source.labels, [0, 1, 1])
    record = source[2]
    assert (record["label"], record["key"]) == (1, "g.npz[2]")
    np.testing.assert_array_equal(record["graph"]["edges"], [[0, 1, 1], [1, 2, 3]])
    np.testing.assert_array_equal(record["graph"]["nodes"], np.eye(3)[[1, 1, 1, 0]])
    degrees = Graphs(archive(tmp_path, {**MANY, "node_tags": np.zeros(9, int)}))[2]["graph"]["nodes"]
    np.testing.assert_array_equal(degrees, np.eye(4)[[1, 3, 1, 1]])
    assert Graphs(archive(tmp_path, MANY), "degree")[0]["graph"]["nodes"].shape == (3, 4)
    np.testing.assert_array_equal(parse_source(f"graphs:{tmp_path}/g.npz").labels, source.labels)


def test_one_graph(tmp_path):
    source = Graphs(archive(tmp_path, ONE))
    graph = source[0]["graph"]
    np.testing.assert_array_equal(graph["nodes"], [[1, 0, 2], [0, 0, 0], [0, 3, 0], [0, 0, 4]])
    np.testing.assert_array_equal(graph["node_split"], [0, 2, 2, -1])
    sample = Graph(6, 8, 3, node_labels=True)(graph, None)
    np.testing.assert_array_equal(sample["node_label"], [0, 1, 1, -1, -1, -1])
    np.testing.assert_array_equal(sample["edges"][:, :6], [[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    np.testing.assert_array_equal(sample["edge_mask"], [1] * 6 + [0] * 2)
    np.testing.assert_array_equal(sample["node_mask"], [1] * 4 + [0] * 2)
    one_way = Graph(6, 3, 3, undirected=False, row_sums=True)(graph, None)
    np.testing.assert_array_equal(one_way["edges"], graph["edges"])
    np.testing.assert_allclose(one_way["nodes"].sum(1), [1, 0, 1, 1, 0, 0])
    shapes = {name: (x.shape, x.dtype) for name, x in sample.items()}
    assert shapes == {name: (x.shape, x.dtype) for name, x in Graph(6, 8, 3, node_labels=True).blank().items()}
    assert build(Reader, {"type": "Graph", "nodes": 6, "edges": 8, "features": 3}) == Graph(6, 8, 3)


@pytest.mark.parametrize(
    ("name", "counts"),
    [("cora", (1, 2708, 1433, 5278, 7)), ("citeseer", (1, 3327, 3703, 4552, 6)),
     ("MUTAG", (188, 3371, 7, 3721, 2)), ("IMDBBINARY", (1000, 19773, 136, 96531, 2))],
)  # fmt: skip
def test_published_counts(real_data, name, counts):
    source = Graphs(str(real_data / "graphs" / f"{name}.npz"))
    graphs = [source[i]["graph"] for i in range(len(source))]
    nodes, edges = sum(len(graph["nodes"]) for graph in graphs), sum(graph["edges"].shape[1] for graph in graphs)
    assert (len(source), nodes, graphs[0]["nodes"].shape[1], edges, len(source.classes)) == counts
    if len(source) == 1:
        split, label = graphs[0]["node_split"], graphs[0]["node_label"]
        assert np.bincount(split[split >= 0]).tolist() == [20 * counts[-1], 500, 1000]
        assert (np.bincount(label[split == 0]) == 20).all()
    else:
        assert all((graph["nodes"].sum(1) == 1).all() for graph in graphs)


def test_real_graphs_become_views(real_data, tmp_path):
    source = Graphs(str(real_data / "graphs" / "MUTAG.npz"))
    assert len(assert_is_a_good_source(Few(source))) == 8
    transform = HostTransform(readers={"graph": Graph(28, 66, 7)})
    batch = next(train_batches(source, transform, seed=0, batch_size=16, steps=1, loader=Loader(threads=0)))
    assert (batch["replaced"] == 0).all()
    views = build(PerExample, {"views": graphcl()})
    seen = jax.jit(views)(jax.random.key(0), {k: batch[k] for k in ("nodes", "edges", "node_mask", "edge_mask")})
    assert sorted(seen) == ["x1", "x2"]
    assert seen["x1"]["nodes"].shape == (16, 28, 7)
    assert not inspect(source, str(tmp_path / "sheet.png"), 6)["unreadable"]
    large = Graphs(str(real_data / "graphs" / "cora.npz"))
    found = inspect(large, str(tmp_path / "sheet.png"))
    assert not found["unreadable"]
    assert found["keys"]["graph"].startswith("dict, 2708 nodes, 5278 edges, 1433 features")
    part = Graph(200, 1000, 1433, too_large="sample", node_labels=True)(large[0]["graph"], np.random.default_rng(0))
    assert part["node_mask"].all()
    assert part["edge_mask"].sum() > 400  # neighbours, not strangers


class Few:
    """The first eight, flat: comparing nested records is not what the test is about."""

    def __init__(self, source):
        self.source, self.classes = source, source.classes

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if not -8 <= index < 8:
            raise IndexError
        record = self.source[index % 8]
        return {**record["graph"], "label": record["label"], "key": record["key"]}


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_neighbourhoods(seed):
    rng = np.random.default_rng(3)
    edges = rng.integers(0, 40, (2, 60))
    draw = None if seed is None else np.random.default_rng(seed)
    for most in (1, 7, 39, 40, 60):
        chosen, inside = around(edges, 40, most, draw)
        assert len(set(chosen.tolist())) == len(chosen) == min(most, 40)
        kept = np.isin(edges, chosen).all(0)
        np.testing.assert_array_equal(chosen[inside], edges[:, kept])  # renumbered, in their order
    reader = Graph(10, 6, 2, too_large="sample")
    sample = reader({"nodes": np.ones((40, 2)), "edges": edges}, draw)
    assert sample["node_mask"].all()
    assert sample["edges"].max() < 10


# --- views ----------------------------------------------------------------------------------------

EDGES = np.array([[i, (i * 3 + 1) % 10] for i in range(10)] + [[0, 5], [2, 9]]).T
SAMPLE = Graph(12, 40, 5)({"nodes": np.random.default_rng(0).random((10, 5)) + 0.5, "edges": EDGES}, None)
INPUTS = [jnp.asarray(SAMPLE[name]) for name in ("nodes", "edges", "node_mask", "edge_mask")]


def seen(view: GraphView, draws: int = 300) -> dict[str, np.ndarray]:
    found = jax.jit(jax.vmap(lambda key: view(key, *INPUTS)))(jax.random.split(jax.random.key(0), draws))
    return {name: np.asarray(array) for name, array in found.items()}


def test_dropped_edges_go_in_pairs():
    found = seen(GraphView(drop_edges=0.3))
    kept = found["edge_mask"]
    np.testing.assert_array_equal(kept[:, ::2], kept[:, 1::2])
    assert not kept[:, 24:].any()
    assert abs(kept[:, :24].mean() - 0.7) < 0.03
    np.testing.assert_array_equal(found["node_mask"], np.broadcast_to(SAMPLE["node_mask"], (300, 12)))
    np.testing.assert_array_equal(found["nodes"], np.broadcast_to(SAMPLE["nodes"], (300, 12, 5)))
    apart = seen(GraphView(drop_edges=0.3, paired=False))["edge_mask"]
    assert (apart[:, ::2] != apart[:, 1::2]).any()


def test_dropped_nodes_take_their_edges():
    found = seen(GraphView(drop_nodes=0.4))
    alive, edges = found["node_mask"], SAMPLE["edges"]
    ends = alive[:, edges[0]] & alive[:, edges[1]]
    np.testing.assert_array_equal(found["edge_mask"], ends & SAMPLE["edge_mask"])
    assert not (found["nodes"] * ~alive[..., None]).any()
    assert not alive[:, 10:].any()
    assert abs(alive[:, :10].mean() - 0.6) < 0.03
    assert seen(GraphView(drop_nodes=0.99))["node_mask"].any(1).all()


def test_masked_features_and_nodes():
    columns = seen(GraphView(mask_features=0.4))["nodes"][:, :10] != 0
    assert (columns == columns[:, :1]).all()  # the same in all nodes
    assert abs(columns.mean() - 0.6) < 0.05
    rows = seen(GraphView(mask_nodes=0.4))
    assert ((rows["nodes"] != 0) == (rows["nodes"][..., :1] != 0)).all()
    assert rows["edge_mask"].all(0)[:24].all()
    plain = GraphView(drop_edges=0.5, mask_features=0.5)(None, *INPUTS)
    for name, given in zip(("nodes", "edges", "node_mask", "edge_mask"), INPUTS, strict=True):
        np.testing.assert_array_equal(plain[name], given)
    assert build(PerExample, {"views": grace()}).views["x2"] == GraphView(drop_edges=0.4, mask_features=0.4)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "change", "message"),
    [
        (MANY, {"edges": np.array([[0, 9]] * 7)}, "from 0 to 9; expected 0 to 8"),
        (MANY, {"edges": np.zeros((7, 3), int)}, r"expected \[E, 2\]"),
        (MANY, {"edges": np.zeros((7, 2))}, "axes of integers"),
        (MANY, {"node_ptr": np.array([0, 5, 3, 9])}, "rising row"),
        (MANY, {"node_ptr": np.array([0, 3, 5, 2**60])}, "'node_tags' are 9|over"),
        (MANY, {"node_ptr": np.array([], int)}, "rising row|expected"),
        (MANY, {"edge_ptr": np.array([0, 3, 4, 8])}, "rising row"),
        (MANY, {"labels": np.array([0])}, "1 labels for 3"),
        (MANY, {"node_tags": np.array([2**40] * 9)}, "node_tags"),
        (MANY, {"labels": None}, "it needs feat_data"),
        (ONE, {"feat_shape": np.array([2**30, 2**30])}, "over 268,435,456"),
        (ONE, {"feat_shape": np.array([4, 2])}, "'feat_indices' has numbers"),
        (ONE, {"feat_indptr": np.array([0, 2, 2, 3, 9])}, "rising row"),
        (ONE, {"feat_data": np.ones(3)}, "differ in length"),
        (ONE, {"train_idx": np.array([4])}, "train_idx"),
        (ONE, {"labels": np.array([0])}, "1 labels for 4"),
    ],
)
def test_archives_that_lie(tmp_path, members, change, message):
    left = {name: array for name, array in {**members, **change}.items() if array is not None}
    with pytest.raises(ValueError, match=message):
        Graphs(archive(tmp_path, left))


def test_an_edge_into_another_graph(tmp_path):
    edges = MANY["edges"].copy()
    edges[1] = [1, 8]
    source = Graphs(archive(tmp_path, {**MANY, "edges": edges}))
    with pytest.raises(BadSample, match="leads out of a graph of 3 nodes"):
        source[0]
    assert len(source[1]["graph"]["nodes"]) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "expected a dict"),
        ({"nodes": np.ones((3, 2))}, "expected a dict"),
        ({"nodes": np.ones(3), "edges": np.zeros((2, 0), int)}, r"expected numbers \[N, F\]"),
        ({"nodes": np.ones((0, 2)), "edges": np.zeros((2, 0), int)}, r"expected numbers \[N, F\]"),
        ({"nodes": np.ones((3, 2)), "edges": np.zeros((5, 2), int)}, r"expected integers \[2, E\]"),
        ({"nodes": np.ones((3, 2)), "edges": np.zeros((2, 5))}, r"expected integers \[2, E\]"),
        ({"nodes": np.ones((3, 2)), "edges": np.array([[0], [3]])}, "there are 3 nodes"),
        ({"nodes": np.ones((3, 2)), "edges": np.array([[0], [-1]])}, "there are 3 nodes"),
        ({"nodes": np.full((3, 2), np.nan), "edges": np.zeros((2, 0), int)}, "NaN"),
        ({"nodes": np.full((3, 2), 1e300), "edges": np.zeros((2, 0), int)}, "too large"),
        ({"nodes": np.ones((3, 4)), "edges": np.zeros((2, 0), int)}, "have 4 features"),
        ({"nodes": np.ones((9, 2)), "edges": np.zeros((2, 0), int)}, "9 nodes and 0 edges is over the limit"),
        ({"nodes": np.ones((4, 2)), "edges": np.zeros((2, 3), int)}, "4 nodes and 3 edges is over the limit"),
    ],
)
def test_graphs_that_lie(value, message):
    with pytest.raises(BadSample, match=message):
        Graph(4, 4, 2)(value, np.random.default_rng(0))


def test_labels_must_be_there():
    graph = {"nodes": np.ones((3, 2)), "edges": np.zeros((2, 0), int)}
    with pytest.raises(BadSample, match="'node_label' of the graph"):
        replace(Graph(4, 4, 2), node_labels=True)(graph, None)
    with pytest.raises(ValueError, match="even"):
        Graph(4, 3, 2)
