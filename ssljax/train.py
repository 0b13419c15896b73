"""The training loop. One for all methods; it knows none of them by name."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from ssljax.axes import in_logical_shards
from ssljax.checkpoint import CheckpointStore, abstract_like
from ssljax.config import Experiment, resolve, with_precision
from ssljax.data import Batches, HostTransform, train_batches
from ssljax.describe import describe
from ssljax.encode import Encoder, Pixels
from ssljax.evals.collapse import collapse
from ssljax.evals.online import Classification
from ssljax.mesh import batch_sharding, check_batch_size, global_batch, process_rows, shardings
from ssljax.method import Context
from ssljax.metrics import MetricLog, peak_flops
from ssljax.optim import make_optimizer
from ssljax.shards import check_mesh, compile_alike, views_of
from ssljax.state import TrainState

DIAGNOSED_ROWS = 256  # of a batch, for the collapse diagnostics


class NotFiniteError(ArithmeticError):
    """The loss or a metric became NaN or infinite; the message names the step and the term."""


@dataclass(frozen=True)
class Result:
    """What a run returns: the final state, and the last value of each `eval/...` (and `pixels/...`) metric."""

    state: TrainState
    metrics: dict[str, float]


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
        self.train_transform = HostTransform(e.data.size, e.data.views.host_crops, e.data.tokenizer)
        self.eval_transform = HostTransform(e.data.size, e.data.eval_view.host_crops, e.data.tokenizer)
        self.batch_shapes = batch_shapes or self._read_batch_shapes()
        self.init_key, self.step_key = jax.random.split(jax.random.key(e.seed))
        params = jax.eval_shape(self._init_method)[0]
        self.optimizer = make_optimizer(e.optim, params, e.steps, e.batch_size)
        self.state_shapes = jax.eval_shape(self._init)
        self.state_shardings = shardings(self.state_shapes, self.mesh, e.mesh.min_size)

    def init(self) -> TrainState:
        """A fresh state, each leaf made where it lives: no device or host ever holds the full tree."""
        # It runs once, and XLA:CPU takes seconds to optimise it.
        fast = {"xla_backend_optimization_level": 0} if self.mesh.devices.flat[0].platform == "cpu" else None
        return jax.jit(self._init, out_shardings=self.state_shardings, compiler_options=fast)()

    def batches(self, start: int, bad_log: epath.Path | None = None) -> Batches:
        """This process's rows of the training batches from sample position `start` on."""
        e = self.experiment
        return train_batches(
            e.data.train,
            self.train_transform,
            batch_size=e.batch_size,
            seed=e.seed,
            start=start,
            rows=self.rows,
            loader=e.data.loader,
            bad_log=bad_log,
        )

    def step(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, Any]]:
        """One optimisation step on a global batch (to be jitted): views, loss, gradient, update."""
        e = self.experiment
        view_key, loss_key = jax.random.split(jax.random.fold_in(self.step_key, state.step))
        ctx = Context(loss_key, state.step, state.step / e.steps, e.micro_batches)

        def loss_of(params):
            return e.method.loss(params, state.method, views, ctx)

        with in_logical_shards(e.deterministic):
            views = views_of(e.data.views, view_key, batch)
            (loss, (method_state, metrics)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt = self.optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        params, method_state = e.method.update(params, method_state, ctx)
        average: Any = None if state.ema is None else optax.incremental_update(params, state.ema, 1 - e.optim.ema)
        metrics = {
            **{name: value for name, value in metrics.items() if name != "embeddings"},
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": e.optim.lr_schedule(e.steps, e.batch_size)(state.step),
            "embeddings": tuple(_some_rows(x.astype(jnp.float32)) for x in metrics.get("embeddings", ())),
        }
        return TrainState(state.step + 1, params, opt, method_state, average), metrics

    def compile_step(self, platform: str | None = None) -> Any:
        """The compiled training step; the state is donated.

        `platform` (of `jax.lax.platform_dependent` code) is that of the devices unless it is given.
        """
        state = abstract_like(self.state_shapes, self.state_shardings)
        batch = abstract_like(self.batch_shapes, {name: batch_sharding(self.mesh) for name in self.batch_shapes})
        replicated = NamedSharding(self.mesh, PartitionSpec())
        step = jax.jit(self.step, donate_argnums=0, out_shardings=(self.state_shardings, replicated))
        lowered = step.trace(state, batch).lower(lowering_platforms=(platform,) if platform else None)
        return compile_alike(lowered, self.mesh) if self.experiment.deterministic else lowered.compile()

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
            sample = {**self.train_transform.blank(), "index": np.zeros((), np.int32)}
        else:
            serial = replace(e.data.loader, threads=0, workers=0, cache=False)
            batch = next(train_batches(e.data.train, self.train_transform, batch_size=1, seed=0, loader=serial))
            sample = {name: x[0] for name, x in batch.items()}
        return {name: jax.ShapeDtypeStruct((e.batch_size, *x.shape), x.dtype) for name, x in sample.items()}

    def _init_method(self):
        key = jax.random.key(0)
        views = jax.eval_shape(self.experiment.data.views, key, self.batch_shapes)
        one_row = {name: jnp.zeros((1, *x.shape[1:]), x.dtype) for name, x in views.items()}
        return self.experiment.method.init(self.init_key, one_row)

    def _init(self) -> TrainState:
        params, method_state = self._init_method()
        average = None if self.experiment.optim.ema is None else params
        return TrainState(jnp.int32(0), params, self.optimizer.init(params), method_state, average)


def train(
    experiment: Experiment,
    workdir: epath.PathLike,
    *,
    wandb: str | None = None,
    profile: tuple[int, int] | None = None,
    devices: Sequence[Any] | None = None,
) -> Result:
    """Runs an experiment to its last step, resuming from the newest checkpoint in `workdir` if there is one.

    Args:
      wandb: project to log to, if any.
      profile: (first, last) step to trace into `<workdir>/profile`.

    Raises:
      NotFiniteError: the loss or a metric is NaN or infinite; nothing from that step on is saved.
      CheckpointError, ConfigError, ValueError: with what to change.
    """
    workdir = epath.Path(workdir)
    if experiment.data.train is None:
        raise ValueError("data.train is not set: name your pictures, for example data.train=folder:/my/images")
    run = Run(experiment, devices)
    e = run.experiment
    with jax.set_mesh(run.mesh), CheckpointStore(workdir, e.checkpoint) as store:
        # 1. State: the newest checkpoint of this workdir, or a fresh one.
        if store.steps():
            saved, metadata = store.metadata()
            state, position = store.restore(abstract_like(run.state_shapes, run.state_shardings), saved)
        else:
            state, position, metadata = run.init(), 0, None
        start = int(state.step)
        with MetricLog(workdir, e.steps, start, wandb, run.config) as log:
            describe(log, run, workdir, start, metadata and metadata["config"])
            began = time.perf_counter()
            step_fn = run.compile_step()
            log.say(f"compiled the training step in {time.perf_counter() - began:.1f} s")
            evaluate, pending, meter = _Evaluator(run, log), _Pending(), _Meter(step_fn, e.batch_size, run.mesh)
            bad_log = workdir / "bad_samples.jsonl"
            batches = run.batches(position, bad_log)

            def log_pending() -> None:
                if (record := pending.take()) is not None:
                    log.step(record[0], record[1] | meter.read() | {"bad_samples": batches.bad})

            # 2. The loop. Its order is fixed: evaluation and checkpoint see exactly the state and the data position of
            #    `step`; only then is the next batch taken. A step's metrics are read when the next one is under way.
            for step in range(start, e.steps):
                if step == 0 or (e.eval_every and step % e.eval_every == 0 and step > start):
                    log_pending()
                    evaluate(step, state)
                    meter.restart()
                if e.checkpoint.every and step % e.checkpoint.every == 0 and step > start:
                    log_pending()
                    pending.check_finite()
                    store.save(state, step, position, run.metadata())
                _profile(profile, step, workdir)
                with jax.transfer_guard("disallow"):
                    with meter.waiting():
                        rows = next(batches)
                    state, metrics = step_fn(state, global_batch(rows, e.batch_size, run.mesh))
                    position += e.batch_size
                    log_pending()
                pending.add(step + 1, metrics, due=(step + 1) % e.log_every == 0 or step + 1 == e.steps)
                log.advance(step + 1)
            # 3. The end: what the loop does at its top, once more.
            log_pending()
            pending.check_finite()
            _profile(profile, e.steps, workdir)
            if start < e.steps:
                evaluate(e.steps, state)
                store.save(state, e.steps, position, run.metadata())
            if batches.bad:
                log.say(f"{batches.bad} of {batches.seen} samples were bad and replaced; see {bad_log}")
    return Result(state, evaluate.results)


def _some_rows(x: jax.Array) -> jax.Array:
    """Rows for the diagnostics, evenly spaced: every device has some at hand, where the first ones lie on few."""
    count = min(DIAGNOSED_ROWS, len(x))
    every = len(x) // count
    return x[: count * every].reshape(count, every, -1)[:, 0]


class _Pending:
    """Metrics of steps not read yet. Reading waits for the device, so it happens a step late, and only at log steps."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, dict[str, Any]]] = []
        self._due = False
        self._diagnose = jax.jit(collapse)

    def add(self, step: int, metrics: dict[str, Any], due: bool) -> None:
        # Embeddings are kept only where they will be looked at.
        self._steps.append((step, metrics if due else _scalars(metrics)))
        self._due = due

    def take(self) -> tuple[int, dict[str, float]] | None:
        """The newest step's values with collapse diagnostics, if due; every step since the last reading is checked."""
        if not self._due:
            return None
        step, metrics = self._steps[-1]
        self.check_finite()
        values = _scalars(metrics)
        if embeddings := metrics["embeddings"]:
            values |= {f"collapse/{name}": value for name, value in self._diagnose(*embeddings).items()}
        return step, {name: float(value) for name, value in jax.device_get(values).items()}

    def check_finite(self) -> None:
        """Raises if any step since the last reading has a metric that is not finite."""
        steps, self._steps, self._due = self._steps, [], False
        for (step, _), values in zip(steps, jax.device_get([_scalars(m) for _, m in steps]), strict=True):
            bad = [name for name, value in values.items() if not math.isfinite(value)]
            if bad:
                # The terms of the loss come first: they say where it began.
                bad.sort(key=lambda name: (not name.startswith("loss/"), name != "loss", name))
                also = f" (also {', '.join(bad[1:])})" if bad[1:] else ""
                raise NotFiniteError(
                    f"step {step}: {bad[0]} is {float(values[bad[0]])}{also}. Training stopped; checkpoints before "
                    "this step are good. Usual causes: a learning rate too high or without warm-up (optim.lr, "
                    "optim.warmup), no gradient clipping (optim.clip), or bad values in the input."
                )


def _scalars(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "embeddings"}


class _Meter:
    """Throughput between log steps: images/s, share of time spent waiting for data, model FLOP/s and MFU."""

    def __init__(self, step_fn: Any, batch_size: int, mesh: jax.sharding.Mesh):
        # XLA counts the program of one device.
        self._flops = float((step_fn.cost_analysis() or {}).get("flops", 0.0))
        self._figures: dict[str, float] = {}
        self._batch, self._devices, self._peak = batch_size, mesh.size, peak_flops(mesh.devices.flat[0])
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew: what came before (compilation, evaluation) is not training."""
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The figures since the last reading."""
        if not self._steps:  # read again within a step, before a checkpoint
            return self._figures
        elapsed = time.perf_counter() - self._since
        per_second = self._steps / elapsed
        figures = {
            "images_per_second": per_second * self._batch,
            "images_per_second_per_device": per_second * self._batch / self._devices,
            "data_wait": self._waited / elapsed,
            "flops_per_second_per_device": per_second * self._flops,
        }
        if self._peak:
            figures["mfu"] = per_second * self._flops / self._peak
        self.restart()
        self._figures = figures
        return figures


class _Evaluator:
    """Runs the config's evaluations. Those of step 0 are the random-initialisation figures all is compared with."""

    def __init__(self, run: Run, log: MetricLog):
        self._run, self._log = run, log
        self._encoder = run.encoder()
        self.results: dict[str, float] = {}

    def __call__(self, step: int, state: TrainState) -> None:
        evaluations = self._run.experiment.evals
        frozen = self._encoder.at(state.eval_params, state.method)
        pixels = self._run.encoder(Pixels()).at({}, {})
        values: dict[str, float] = {}
        for name, evaluation in evaluations.items():
            values |= {f"eval/{name}/{metric}": value for metric, value in evaluation.run(frozen).items()}
            if step == 0 and isinstance(evaluation, Classification):
                values |= {f"pixels/{name}/{metric}": value for metric, value in evaluation.run(pixels).items()}
        if values:
            self._log.write(step, values)
            shown = "  ".join(
                f"{name.removeprefix('eval/')} {value:.3f}"
                for name, value in values.items()
                if name.startswith("eval/")
            )
            self._log.say(f"step {step}: {shown}" + ("  (random initialisation)" if step == 0 else ""))
        self.results |= values


def _profile(steps: tuple[int, int] | None, step: int, workdir: epath.Path) -> None:
    if steps and step == steps[0]:
        jax.profiler.start_trace(str(workdir / "profile"))
    elif steps and step == steps[1]:
        jax.profiler.stop_trace()
