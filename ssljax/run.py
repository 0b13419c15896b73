"""What a config determines: mesh, transforms, shapes, optimiser, and the step. It holds no training state."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from ssljax.config import Experiment, resolve, with_precision
from ssljax.data import Batches, train_batches, typical_sample
from ssljax.data.order import History
from ssljax.encode import Encoder
from ssljax.guard import choose
from ssljax.mesh import abstract_like, batch_sharding, check_batch_size, global_batch, process_rows, shardings
from ssljax.method import Context
from ssljax.optim import make_optimizer
from ssljax.shards import check_mesh, compiler_options, in_shards, views_of
from ssljax.state import TrainState

DIAGNOSED_ROWS = 256  # of a batch, for the collapse diagnostics
# Of a batch, beside the sample's arrays: bad records met before a row was filled, does its process want to stop.
_MESSAGES = ("replaced", "stop")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Notes:
    """What a step tells the loop beside its metrics."""

    tally: jax.Array  # int32 [3]: rows refused (all or none); records replaced; rows whose process wants to stop
    limits: dict[str, jax.Array]  # that loss and gradient norm were held against
    gradients: jax.Array  # float32 [leaves]: the norm of each parameter's gradient
    embeddings: tuple[jax.Array, ...]  # float32 [rows, D] each, for the collapse diagnostics


class Run:
    """Everything a config determines: mesh, transforms, shapes, optimiser, functions. Holds no training state."""

    def __init__(
        self,
        experiment: Experiment,
        devices: Sequence[Any] | None = None,
        batch_shapes: dict[str, jax.ShapeDtypeStruct] | None = None,
    ):
        self.config = resolve(experiment)
        self.experiment = e = with_precision(experiment, {"bf16": "bfloat16"}.get(experiment.precision))
        self.mesh = e.mesh.create(devices)
        check_batch_size(e.batch_size, self.mesh, e.micro_batches)
        if e.deterministic:
            check_mesh(e.deterministic, e.batch_size, e.micro_batches, self.mesh)
        self.rows = process_rows(e.batch_size, self.mesh)
        self.train_transform, self.eval_transform = map(e.data.transform, (e.data.views, e.data.eval_view))
        self.batch_shapes = batch_shapes or self._read_batch_shapes()
        self.init_key, self.step_key = jax.random.split(jax.random.key(e.seed))
        parts = jax.eval_shape(self._init_method)
        self.optimizer = make_optimizer(e.optim, parts[0], e.steps, e.batch_size)
        self.state_shapes = jax.eval_shape(self._assemble, *parts)
        self.state_shardings = shardings(self.state_shapes, self.mesh, e.mesh.min_size)

    def init(self) -> TrainState:
        """A fresh state, each leaf made where it lives: no device or host ever holds the full tree."""
        # It runs once, and XLA:CPU takes seconds to optimise it.
        fast = {"xla_backend_optimization_level": 0} if self.mesh.devices.flat[0].platform == "cpu" else None
        return jax.jit(self._init, out_shardings=self.state_shardings, compiler_options=fast)()

    def batches(self, start: int, bad_log: epath.Path | None = None, history: History = ()) -> Batches:
        """This process's rows of the training batches from sample position `start` on.

        `history` is that of `Progress.sampling`.
        """
        e = self.experiment
        return train_batches(
            e.data.train,
            self.train_transform,
            batch_size=e.batch_size,
            seed=e.seed,
            start=start,
            rows=self.rows,
            order=e.data.sampling.order(e.data.train, e.seed, history),
            loader=e.data.loader,
            like={
                name: x.update(shape=x.shape[1:])
                for name, x in _samples(self.batch_shapes).items()
                if name != "index"  # the stream's own
            },
            bad_log=bad_log,
        )

    def place(self, rows: dict[str, np.ndarray], stop: bool = False) -> dict[str, jax.Array]:
        """This process's rows (of `batches`) as the global batch on the devices.

        With `stop` the batch carries this process's wish to stop, so that all processes hear of it at the same step.
        """
        rows = {**rows, "stop": np.full(len(rows["index"]), stop)}
        return global_batch(rows, self.experiment.batch_size, self.mesh)

    def views(self, key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """What the method sees of a global batch."""
        return views_of(self.experiment.data.views, key, _samples(batch))

    def gradient(self, state: TrainState, batch: dict[str, jax.Array]) -> Any:
        """`((loss, (method state, metrics)), gradients)` of a global batch."""
        e = self.experiment
        view_key, loss_key = jax.random.split(jax.random.fold_in(self.step_key, state.step))
        ctx = self._context(state, loss_key)
        views = self.views(view_key, batch)

        def loss_of(params):
            return e.method.loss(params, state.method, views, ctx)

        return jax.value_and_grad(loss_of, has_aux=True)(state.params)

    def step(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array], Notes]:
        """One optimisation step on a global batch (to be jitted): views, loss, gradient, guard, update.

        A refused step returns the state as it was. The metrics are float scalars.
        """
        e = self.experiment
        gradient = in_shards(self.gradient, e.deterministic) if e.deterministic else self.gradient
        (loss, (method_state, found)), grads = gradient(state, batch)
        norms = jnp.stack([optax.tree.norm(x) for x in jax.tree.leaves(grads)])
        metrics = {
            **{name: value for name, value in found.items() if name != "embeddings"},
            "loss": loss,
            "grad_norm": jnp.sqrt(jnp.sum(norms**2)),
            "learning_rate": e.optim.lr_schedule(e.steps, e.batch_size)(state.step),
        }
        take, guard, limits = e.guard.judge(state.guard, loss, metrics["grad_norm"], metrics)
        updates, opt = self.optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        _, loss_key = jax.random.split(jax.random.fold_in(self.step_key, state.step))
        params, method_state = e.method.update(params, method_state, self._context(state, loss_key))
        average: Any = None if state.ema is None else optax.incremental_update(params, state.ema, 1 - e.optim.ema)
        following = TrainState(state.step + 1, params, opt, method_state, average, guard)
        # One sum over the rows, in one small collective.
        rows = jnp.stack([jnp.full(e.batch_size, ~take), batch["replaced"], batch["stop"]], axis=1)
        tally = jnp.sum(rows, axis=0, dtype=jnp.int32)
        embeddings = tuple(_some_rows(x.astype(jnp.float32)) for x in found.get("embeddings", ()))
        return choose(take, following, state), metrics, Notes(tally, limits, norms, embeddings)

    def _context(self, state: TrainState, key: jax.Array) -> Context:
        e = self.experiment
        return Context(key, state.step, state.step / e.steps, e.micro_batches)

    def compile_step(self, platform: str | None = None) -> Any:
        """The compiled training step; the state is donated.

        `platform` (of `jax.lax.platform_dependent` code) is that of the devices unless it is given.
        """
        state = abstract_like(self.state_shapes, self.state_shardings)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        step = jax.jit(self.step, donate_argnums=0, out_shardings=(self.state_shardings, replicated, replicated))
        options = compiler_options(self.mesh.devices.flat[0].platform) if self.experiment.deterministic else None
        with jax.set_mesh(self.mesh):  # every thread has its own
            lowered = step.trace(state, self._batch()).lower(lowering_platforms=(platform,) if platform else None)
            return lowered.compile(options)

    def compile_views(self, platform: str | None = None) -> Any:
        """The views alone, compiled likewise: to see what they cost."""
        views = jax.jit(self.views, out_shardings=batch_sharding(self.mesh))
        with jax.set_mesh(self.mesh):
            key = jax.ShapeDtypeStruct((), self.step_key.dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))
            traced = views.trace(key, self._batch())
            return traced.lower(lowering_platforms=(platform,) if platform else None).compile()

    def _batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch and where it lies."""
        return abstract_like(self.batch_shapes, {name: batch_sharding(self.mesh) for name in self.batch_shapes})

    def encoder(self, method: Any = None) -> Encoder:
        """The frozen encoder of the run's method (or of another with `features`)."""
        e = self.experiment
        loader = replace(e.data.loader, cache=False)
        size = min(256, e.batch_size)
        return Encoder(method or e.method, e.data.eval_view, self.eval_transform, self.mesh, size, loader)

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint records beside the state: the resolved config, and the shapes of a batch."""
        return {
            "config": self.config,
            "batch": {name: [list(x.shape), x.dtype.name] for name, x in self.batch_shapes.items()},
        }

    def _read_batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch as it reaches the device, from one sample of the source; without one, assumed."""
        e = self.experiment
        if e.data.train is None:
            sample = self.train_transform.blank()
        else:
            sample = typical_sample(e.data.train, self.train_transform)
        number = np.zeros((), np.int32)
        sample |= {"index": number, "replaced": number, "stop": np.zeros((), bool)}
        return {name: jax.ShapeDtypeStruct((e.batch_size, *x.shape), x.dtype) for name, x in sample.items()}

    def _init_method(self):
        key = jax.random.key(0)
        views = jax.eval_shape(self.experiment.data.views, key, _samples(self.batch_shapes))
        one_row = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), views)
        return self.experiment.method.init(self.init_key, one_row)

    def _init(self) -> TrainState:
        return self._assemble(*self._init_method())

    def _assemble(self, params: Any, method_state: Any) -> TrainState:
        """The state before the first step."""
        average = None if self.experiment.optim.ema is None else params
        guard = self.experiment.guard.init()
        return TrainState(jnp.int32(0), params, self.optimizer.init(params), method_state, average, guard)


def _some_rows(x: jax.Array) -> jax.Array:
    """Rows for the diagnostics, evenly spaced: every device has some at hand, where the first ones lie on few."""
    count = min(DIAGNOSED_ROWS, len(x))
    every = len(x) // count
    return x[: count * every].reshape(count, every, -1)[:, 0]


def _samples(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch without what only the loop reads."""
    return {name: x for name, x in batch.items() if name not in _MESSAGES}
