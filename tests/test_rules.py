import jax
import pytest

from ssljax.rules import assign, names

TREE = {"encoder": {"block_0": {"kernel": 1, "bias": 2}}, "head": {"kernel": 3}}


def test_names_are_joined_paths():
    assert jax.tree.leaves(names(TREE)) == ["encoder/block_0/bias", "encoder/block_0/kernel", "head/kernel"]


def test_first_match_wins():
    values = assign(TREE, (("head", 0.0), ("kernel$", 1.0), (".*", 2.0)), "test")
    assert values == {"encoder": {"block_0": {"kernel": 1.0, "bias": 2.0}}, "head": {"kernel": 0.0}}


def test_every_leaf_must_be_covered():
    with pytest.raises(ValueError, match=r"no decay rule covers encoder/block_0/bias"):
        assign(TREE, (("kernel$", 1.0),), "decay")


def test_a_rule_that_matches_nothing_is_a_mistake():
    with pytest.raises(ValueError, match=r"'hed' matches no parameter.*head/kernel"):
        assign(TREE, (("hed", 1.0), (".*", 0.0)), "freeze")
