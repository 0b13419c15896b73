"""Views of one example, mapped over a batch: keys, counts, what passes, several kinds of data together."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax.views import PerExample, Together, View, Views


@dataclass(frozen=True)
class Noise:
    """`x + scale * noise`, or `x` without a key."""

    scale: float = 1.0
    inputs: tuple[str, ...] = ("audio",)

    def __call__(self, key, x, *more):
        return x if key is None else x + self.scale * jax.random.normal(key, x.shape)


ROWS = {"audio": np.zeros((6, 5), np.float32), "label": np.arange(6, dtype=np.int32)}


def test_rows_views_and_draws_differ_and_the_rest_passes():
    views = PerExample({"x1": Noise(), "x2": Noise()}, count={"x2": 3})
    seen = jax.jit(views)(jax.random.key(0), ROWS)
    assert sorted(seen) == ["label", "x1", "x2"]
    assert seen["x1"].shape == (6, 5)
    assert seen["x2"].shape == (6, 3, 5)
    draws = np.concatenate([np.asarray(seen["x1"]), np.asarray(seen["x2"]).reshape(-1, 5)])
    assert len(np.unique(draws, axis=0)) == len(draws)


def test_a_row_depends_on_its_key_alone():
    views, keys = PerExample({"x": Noise()}), jax.random.split(jax.random.key(3), 6)
    whole = views(keys, ROWS)["x"]
    half = views(keys[3:], {name: x[3:] for name, x in ROWS.items()})["x"]
    np.testing.assert_array_equal(whole[3:], half)
    np.testing.assert_array_equal(views(jax.random.key(3), ROWS)["x"], whole)


def test_the_order_of_a_config_changes_nothing():
    two = {"a": Noise(), "b": Noise(2.0)}
    backwards = dict(reversed(two.items()))
    one, other = (PerExample(views)(jax.random.key(1), ROWS) for views in (two, backwards))
    np.testing.assert_array_equal(one["a"], other["a"])
    np.testing.assert_array_equal(one["b"], other["b"])


def test_evaluation_draws_nothing():
    np.testing.assert_array_equal(PerExample({"audio": Noise()})(None, ROWS)["audio"], ROWS["audio"])
    with pytest.raises(ValueError, match="count 1"):
        PerExample({"x": Noise()}, count={"x": 2})(None, ROWS)


def test_a_missing_input_is_named():
    with pytest.raises(KeyError, match=r"view 'x' reads 'audio', but the batch has only \['label'\]"):
        PerExample({"x": Noise()})(jax.random.key(0), {"label": ROWS["label"]})


@pytest.mark.parametrize("host", ["fit", "crop"])
def test_together_joins_pictures_and_sounds(host):
    parts = (Views({"image": View(4, flip=0.5)}, host=host), PerExample({"sound": Noise()}))
    both = Together(parts)
    assert both.host == host
    assert both.host_crops == parts[0].host_crops
    batch = {**ROWS, "image": np.full((6, 4, 4, 3), 255, np.uint8)}
    seen = jax.jit(partial(both))(jax.random.key(0), batch)
    assert sorted(seen) == ["image", "label", "sound"]
    assert seen["image"].dtype == jnp.float32
    # each part has keys of its own: alone, with the key that Together gives it, it draws the same
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(jax.random.split(jax.random.key(0), 6))
    np.testing.assert_allclose(seen["sound"], parts[1](keys, ROWS)["sound"], rtol=1e-6)


def test_together_passes_over_absent_inputs_in_evaluation_only():
    both = Together((Views({"image": View(4, crop="center")}), PerExample({"audio": Noise()})))
    assert sorted(both(None, ROWS)) == ["audio", "label"]
    with pytest.raises(KeyError, match="no 'image'"):
        both(jax.random.key(0), ROWS)
