"""Rules over parameter names: the one mechanism behind sharding, decay, learning rates and freezing.

A rule is `(pattern, value)`; a pattern is a regular expression searched for in the `/`-joined name of a leaf.
The first rule that matches decides, and every leaf must be matched.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax


def leaf_name(path: tuple) -> str:
    """`("encoder", "block_0", "kernel")` as `encoder/block_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: Any) -> Any:
    """A tree like `tree` whose leaves are their own names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaf_name(path), tree)


def assign(tree: Any, rules: Sequence[tuple[str, Any]], what: str) -> Any:
    """A tree like `tree` whose leaves are the values of the first matching rule.

    Raises:
      ValueError: leaves that no rule covers, or a rule that no leaf matches (most likely a typing error).
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    used, uncovered = set(), []

    def value_of(path, _):
        name = leaf_name(path)
        for i, (pattern, value) in enumerate(compiled):
            if pattern.search(name):
                used.add(i)
                return value
        uncovered.append(name)
        return None

    values = jax.tree_util.tree_map_with_path(value_of, tree)
    if uncovered:
        raise ValueError(
            f"no {what} rule covers {_shown(uncovered)}; add a rule, for example ('.*', default) as the last one"
        )
    unused = [rules[i][0] for i in range(len(rules)) if i not in used and rules[i][0] != ".*"]
    if unused:
        every = jax.tree.leaves(names(tree))
        raise ValueError(f"{what} rule {unused[0]!r} matches no parameter; the names are {_shown(every)}")
    return values


def _shown(items: list[str], most: int = 12) -> str:
    more = f", ... ({len(items) - most} more)" if len(items) > most else ""
    return ", ".join(items[:most]) + more
