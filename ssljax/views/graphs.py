"""Views of graphs: `GraphView`, for `PerExample`; and what published methods make of it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@dataclass(frozen=True)
class GraphView:
    """One view of a padded graph: a dict of `nodes` float32 `[N, F]`, `edges` int32 `[2, E]`, `node_mask` bool `[N]`,
    `edge_mask` bool `[E]`. What is dropped only leaves its mask: shapes and numbers of nodes stay.

    Every edge goes with its two nodes, and features are 0 outside `node_mask`. Without a key nothing is dropped.
    """

    drop_edges: float = 0.0  # share, each by itself; with `paired`, an edge and its reverse together
    drop_nodes: float = 0.0  # share, each by itself; a graph keeps one node at least
    mask_features: float = 0.0  # share of the columns of `nodes` that become 0 in all nodes (GRACE)
    mask_nodes: float = 0.0  # share of the nodes all of whose features become 0 (GraphCL)
    paired: bool = True  # edges 2i and 2i + 1 are one edge in both directions, as `Graph` gives them
    inputs: tuple[str, ...] = ("nodes", "edges", "node_mask", "edge_mask")

    def __post_init__(self):
        for name in ("drop_edges", "drop_nodes", "mask_features", "mask_nodes"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"GraphView.{name} is a share from 0 to below 1, got {getattr(self, name)}")

    def __call__(
        self,
        key: Key[Array, ""] | None,
        nodes: Float[Array, "n f"],
        edges: Int[Array, "2 e"],
        node_mask: Bool[Array, "n"],
        edge_mask: Bool[Array, "e"],
    ) -> dict[str, Array]:
        if key is not None:
            of_nodes, of_edges, of_columns, of_rows = jax.random.split(key, 4)
            if self.drop_nodes:
                drawn = jnp.where(node_mask, jax.random.uniform(of_nodes, node_mask.shape), -1)
                node_mask = node_mask & ((drawn >= self.drop_nodes) | (jnp.arange(len(drawn)) == drawn.argmax()))
            if self.drop_edges:
                edge_mask = edge_mask & (self._per_edge(of_edges, len(edge_mask)) >= self.drop_edges)
            if self.mask_features:
                nodes = nodes * (jax.random.uniform(of_columns, nodes.shape[1:]) >= self.mask_features)
            if self.mask_nodes:
                nodes = nodes * (jax.random.uniform(of_rows, (len(nodes), 1)) >= self.mask_nodes)
        edge_mask = edge_mask & node_mask[edges[0]] & node_mask[edges[1]]
        return {"nodes": nodes * node_mask[:, None], "edges": edges, "node_mask": node_mask, "edge_mask": edge_mask}

    def _per_edge(self, key, count: int):
        if not self.paired:
            return jax.random.uniform(key, (count,))
        if count % 2:
            raise ValueError(f"{count} edges do not come in pairs: set GraphView.paired=False")
        return jnp.repeat(jax.random.uniform(key, (count // 2,)), 2)


def grace(edges: tuple[float, float] = (0.2, 0.4), features: tuple[float, float] = (0.3, 0.4)) -> dict[str, Any]:
    """GRACE (Zhu et al. 2020, by default the official code's shares for Cora): views "x1" and "x2" of a graph, each
    with its own shares of edges removed and columns of features masked; `PerExample(views=...)` in a config.

    Citeseer: edges=(0.2, 0.0), features=(0.3, 0.2). The official code removes the directions of an edge separately.
    """
    shares = zip(("x1", "x2"), edges, features, strict=True)
    return {name: {"type": "GraphView", "drop_edges": drop, "mask_features": mask} for name, drop, mask in shares}


def graphcl(ratio: float = 0.2, first: str = "drop_nodes", second: str = "drop_edges") -> dict[str, Any]:
    """GraphCL (You et al. 2020, section 3.1): views "x1" and "x2", each changed in one way, of 20 % of the graph:
    `drop_nodes`, `drop_edges` or `mask_nodes` (their attribute masking); `PerExample(views=...)` in a config.

    Their fourth, subgraphs by random walk, is left out; edges are removed and none are added.
    """
    return {name: {"type": "GraphView", how: ratio} for name, how in (("x1", first), ("x2", second))}
