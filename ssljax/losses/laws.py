"""What each family of contrastive losses sums over the table of similarities, and the gradient of those sums.

`ssljax.losses.sweep` walks the tiles. In a law what belongs to the rows of a tile is [r, 1] and what belongs to its
columns [1, c], so that both meet the logits [r, c] by broadcasting; sums over a tile keep their axis.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ssljax.losses.sweep import MASKED, LogSum, Nearest, Results, Tower, logits

Mask = Bool[Array, "r c"] | None


class Softmax(NamedTuple):
    """Per row: the log-sum-exp over the columns that count, and the sum and number of its positives' logits."""

    log_sum: Float[Array, " n"]  # -inf where no column counts
    positives: Any = None
    count: Any = None

    @property
    def mean_positive(self) -> Float[Array, " n"]:
        """The mean logit of the positives; 0 where there is none."""
        return self.positives / jnp.maximum(self.count, 1)


@dataclass(frozen=True)
class SoftmaxLaw:
    """Log-sum-exps of rows (and, with `columns`, of columns).

    Which columns count: `"all"`, all but the row itself (`"others"`, by position), or those of another id
    (`"different"`). With `positives`, the logits of the same id (but not of the row itself) are summed as well.
    """

    columns: bool
    counted: Literal["all", "others", "different"] = "all"
    positives: bool = False

    def partials(self, logits: Array, rows: Tower, columns: Tower) -> tuple[Any, Any]:
        counted, same = self._counted(rows, columns), self._same(rows, columns)

        def along(axis: int) -> tuple:
            sums = () if same is None else (_sum(where(same, logits, 0), axis), _sum(same.astype(jnp.float32), axis))
            return (_log_sum(where(counted, logits, MASKED), axis), *sums)

        return along(1), along(0) if self.columns else None

    def finish(self, partials: Any) -> Any:
        return None if partials is None else Softmax(partials[0].log(), *partials[1:])

    def gradient(self, logits: Array, rows: Tower, columns: Tower, of_rows: Results, of_columns: Results) -> Array:
        counted, same = self._counted(rows, columns), self._same(rows, columns)
        sides = [side for side in (of_rows, of_columns) if side.value is not None]
        d: Any = sum(side.cotangent.log_sum * jnp.exp(logits - side.value.log_sum) for side in sides)
        d = where(counted, d, 0)
        if same is not None:
            d += jnp.where(same, sum(side.cotangent.positives for side in sides), 0)
        return d

    def _counted(self, rows: Tower, columns: Tower) -> Mask:
        valid = _valid(rows, columns)
        if self.counted == "others":
            return _and(valid, _apart(rows.position, columns.position))
        if self.counted == "different":
            return _and(valid, _apart(rows.ids, columns.ids))
        return valid

    def _same(self, rows: Tower, columns: Tower) -> Mask:
        if not self.positives:
            return None
        same = _and(_valid(rows, columns), ~_apart(rows.ids, columns.ids))
        return same if rows.position is None else _and(same, _apart(rows.position, columns.position))


@dataclass(frozen=True)
class SigmoidLaw:
    """Per row: the sum over columns of -log sigmoid(z L), z = 1 where the ids are equal and -1 elsewhere."""

    def partials(self, logits: Array, rows: Tower, columns: Tower) -> tuple[Any, Any]:
        losses = jnp.where(_apart(rows.ids, columns.ids), jax.nn.softplus(logits), jax.nn.softplus(-logits))
        return _sum(where(_valid(rows, columns), losses, 0), 1), None

    def finish(self, partials: Any) -> Any:
        return partials

    def gradient(self, logits: Array, rows: Tower, columns: Tower, of_rows: Results, of_columns: Results) -> Array:
        pair = jnp.where(_apart(rows.ids, columns.ids), 0.0, 1.0)
        weight = of_rows.cotangent
        if of_columns.value is not None:
            weight = weight + of_columns.cotangent
        return where(_valid(rows, columns), weight * (jax.nn.sigmoid(logits) - pair), 0)


class Divergence(NamedTuple):
    """Per row: KL(teacher's softmax || student's), and what its gradient and a look at the teacher need."""

    kl: Float[Array, " n"]
    log_sum: Float[Array, " n"]
    teacher_log_sum: Float[Array, " n"]
    teacher_peak: Float[Array, " n"]  # the teacher's largest logit


@dataclass(frozen=True)
class DistillationLaw:
    """Divergence of the softmaxes of two tables of the same shape, over rows (and over columns).

    Gradients go to the student (the towers themselves) and through `kl` only, none to `Tower.teacher`.
    """

    columns: bool

    def partials(self, logits: Array, rows: Tower, columns: Tower) -> tuple[Any, Any]:
        valid = _valid(rows, columns)
        student, teacher = where(valid, logits, MASKED), where(valid, _teacher(rows, columns), MASKED)
        gap = where(valid, teacher - student, 0)

        def along(axis: int) -> tuple[LogSum, LogSum]:
            return _log_sum(student, axis), _log_sum(teacher, axis, gap)

        return along(1), along(0) if self.columns else None

    def finish(self, partials: Any) -> Any:
        if partials is None:
            return None
        student, teacher = partials
        kl = teacher.weighted / teacher.total - teacher.log() + student.log()
        return Divergence(kl, student.log(), teacher.log(), teacher.peak)

    def gradient(self, logits: Array, rows: Tower, columns: Tower, of_rows: Results, of_columns: Results) -> Array:
        teacher = _teacher(rows, columns)
        d: Any = 0
        for side in (of_rows, of_columns):
            if side.value is not None:
                p, q = jnp.exp(teacher - side.value.teacher_log_sum), jnp.exp(logits - side.value.log_sum)
                d += side.cotangent.kl * (q - p)
        return where(_valid(rows, columns), d, 0)


@dataclass(frozen=True)
class NearestLaw:
    """Per row: the most similar other row of the same id. For a search only: no gradient."""

    def partials(self, logits: Array, rows: Tower, columns: Tower) -> tuple[Any, Any]:
        assert columns.position is not None
        other = _apart(rows.position, columns.position) & ~_apart(rows.ids, columns.ids)
        similarity = where(_and(_valid(rows, columns), other), logits, MASKED)
        peak = jnp.max(similarity, axis=1, keepdims=True)
        return Nearest(peak, jnp.max(jnp.where(similarity == peak, columns.position, 0), axis=1, keepdims=True)), None

    def finish(self, partials: Any) -> Any:
        return partials

    def gradient(self, logits: Array, rows: Tower, columns: Tower, of_rows: Results, of_columns: Results) -> Array:
        raise TypeError("which row is the nearest has no gradient: stop it at the inputs of the search")


def where(mask: Mask, x: Array, other: float) -> Array:
    """`x` where the mask is true or there is none."""
    return x if mask is None else jnp.where(mask, x, other)


def _sum(x: Array, axis: int) -> Array:
    return jnp.sum(x, axis, keepdims=True)


def _log_sum(logits: Array, axis: int, weights: Array | None = None) -> LogSum:
    peak = jnp.max(logits, axis, keepdims=True)
    e = jnp.exp(logits - peak)
    return LogSum(peak, _sum(e, axis), None if weights is None else _sum(e * weights, axis))


def _teacher(rows: Tower, columns: Tower) -> Array:
    assert rows.teacher is not None
    assert columns.teacher is not None
    return logits(rows.teacher, columns.teacher)


def _apart(a: Array | None, b: Array | None) -> Bool[Array, "r c"]:
    assert a is not None
    assert b is not None
    return a != b


def _valid(rows: Tower, columns: Tower) -> Mask:
    return _and(rows.valid, columns.valid)


def _and(a: Mask, b: Mask) -> Mask:
    return b if a is None else a if b is None else a & b
