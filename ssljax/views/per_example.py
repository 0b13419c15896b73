"""Views of anything but pictures: `PerExample` maps a view over the rows of a batch, `Together` joins several views."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jaxtyping import Array, Key

Batch = Mapping[str, Any]


class ExampleView(Protocol):
    """A view of one example: pure JAX, of fixed shape. A frozen dataclass, so that a config can name it.

    `inputs` names the entries of the batch it reads. With a random `key` it draws; without (evaluation) it must not.
    """

    @property
    def inputs(self) -> tuple[str, ...]: ...
    def __call__(self, key: Key[Array, ""] | None, *example: Array) -> Any: ...


@dataclass(frozen=True)
class PerExample:
    """`batch[name] = view(key, *inputs)` of every row, for each name: `views(key, batch) -> batch`, inside `jit`.

    What the views read is dropped unless a view has its name; all other entries pass unchanged. With `count` the view
    is drawn so many times, and a second axis holds the draws. A row's draws depend on (`key`, row, view, draw) alone.
    """

    views: Mapping[str, ExampleView]  # name in the output batch -> view
    count: Mapping[str, int] | None = None  # name -> draws, where there are several

    @property
    def inputs(self) -> tuple[str, ...]:
        """The entries of the batch that the views read."""
        return tuple(dict.fromkeys(name for view in self.views.values() for name in view.inputs))

    def __hash__(self):  # dicts have none, and `jax.jit(views)` asks for one
        return hash((tuple(sorted(self.views)), tuple(sorted((self.count or {}).items()))))

    def __call__(self, key: Key[Array, "..."] | None, batch: Batch) -> dict[str, Any]:
        output = {name: value for name, value in batch.items() if name not in self.inputs}
        # By name, not by position in the dict: configs do not keep the order.
        for position, (name, view) in enumerate(sorted(self.views.items(), key=lambda item: item[0])):
            if missing := [entry for entry in view.inputs if entry not in batch]:
                raise KeyError(f"view {name!r} reads {missing[0]!r}, but the batch has only {sorted(batch)}")
            inputs = [batch[entry] for entry in view.inputs]
            draw = _drawn(view, position, (self.count or {}).get(name, 1))
            if key is None:
                output[name] = jax.vmap(lambda *example, draw=draw: draw(None, *example))(*inputs)
            else:
                output[name] = jax.vmap(draw)(row_keys(key, len(inputs[0])), *inputs)
        return output


@dataclass(frozen=True)
class Together:
    """The views of several kinds of data in one batch, each on what the one before has left.

    Evaluation (no key) passes over those whose inputs the batch lacks: a source of sounds alone can be encoded by a
    method that was trained on films.
    """

    parts: tuple[Any, ...]  # (key, batch) -> batch, like `Views` and `PerExample`

    @property
    def host(self) -> str:
        """How far the host goes with pictures: what the part that views them says."""
        return next((host for part in self.parts if (host := getattr(part, "host", None))), "fit")

    @property
    def host_crops(self) -> Mapping[str, Any] | None:
        """The views that the host has to cut; None if the device does."""
        return next((crops for part in self.parts if (crops := getattr(part, "host_crops", None))), None)

    def __call__(self, key: Key[Array, "..."] | None, batch: Batch) -> dict[str, Any]:
        output = dict(batch)
        rows = len(next(iter(batch.values())))
        for position, part in enumerate(self.parts):
            if key is not None:
                keys = jax.vmap(lambda one, position=position: jax.random.fold_in(one, position))(row_keys(key, rows))
                output = part(keys, output)
            elif set(getattr(part, "inputs", ())) <= output.keys():
                output = part(None, output)
        return output


def row_keys(key: Key[Array, "..."], rows: int) -> Key[Array, " rows"]:
    """One key a row; a key for each row passes as it is."""
    return key if key.ndim else jax.random.split(key, rows)


def _drawn(view: ExampleView, position: int, count: int) -> Callable[..., Any]:
    def draw(key, *example):
        if count == 1:
            return view(None if key is None else jax.random.fold_in(key, position), *example)
        if key is None:
            raise ValueError(f"{count} draws of a view need a key: evaluation views have count 1")
        keys = jax.random.split(jax.random.fold_in(key, position), count)
        return jax.vmap(lambda one: view(one, *example))(keys)

    return draw
