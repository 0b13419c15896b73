"""Trained encoders in Python: `ssljax.load(workdir).features(images)`."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
from etils import epath

from ssljax.checkpoint import CheckpointError, CheckpointStore
from ssljax.config import Experiment, build
from ssljax.data import Source, parse_source
from ssljax.encode import FrozenEncoder
from ssljax.mesh import abstract_like
from ssljax.run import Run


@dataclass(frozen=True)
class Pretrained:
    """An encoder of a finished (or running) run.

    Attributes:
      run: what the run's config determines: mesh, transforms, shapes.
      step: the step of the checkpoint.
      encoder: the frozen encoder, for sources and evaluations.
    """

    run: Run
    step: int
    encoder: FrozenEncoder

    @property
    def experiment(self) -> Experiment:
        """The run's config as objects."""
        return self.run.experiment

    def random_encoder(self) -> FrozenEncoder:
        """The same network as it was before training."""
        with jax.set_mesh(self.run.mesh):
            state = self.run.init()
        return self.encoder.encoder.at(state.params, state.method)

    def features(self, images: np.ndarray | Iterable[np.ndarray | bytes], name: str = "image") -> np.ndarray:
        """Float32 features `[n, ...]` of images: uint8 `[n, H, W, 3]`, or any mix of arrays and encoded files (bytes).

        Args:
          name: which features; `"image"` is one vector an image, `"patches"` a map `[n, h, w, d]`.
        """
        transform = self.encoder.encoder.transform
        prepared = [transform({"image": image}, None)["image"] for image in images]
        if not prepared:
            raise ValueError("no images given")
        return self.encoder.images(np.stack(prepared), (name,))[name]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Float32 features `[n, D]` of strings, for methods with a text tower."""
        tokenizer = self.experiment.data.tokenizer
        if tokenizer is None:
            raise ValueError("this run has no tokenizer (data.tokenizer): it was not trained on texts")
        return self.encoder.texts(texts, tokenizer)

    def embed(self, source: Source | str, names: Sequence[str] = ("image",)) -> dict[str, np.ndarray]:
        """Features, labels and indices of a whole source, e.g. `"folder:/my/images"`."""
        return self.encoder.features(parse_source(source) if isinstance(source, str) else source, names)


def load(
    workdir: epath.PathLike, step: int | None = None, types: Mapping[str, type] | None = None, with_evals: bool = False
) -> Pretrained:
    """The encoder of a run, from its newest checkpoint or that of `step`, on one device, without its training data.

    A damaged checkpoint is never used: the newest one gives way to the one before, with a warning; `step` raises.

    Args:
      types: classes of your own that the run's config names, by class name. (Nothing in a checkpoint is ever imported
        or executed.)
      with_evals: keep the run's evaluations; their sources must be there.

    Raises:
      CheckpointError: no such checkpoint, or it is damaged. ConfigError: the config names a class that is neither
        ssljax's nor in `types`.
    """
    if not epath.Path(workdir).is_dir():
        raise CheckpointError(f"no checkpoint in {workdir}: there is no such folder; give the --workdir of a run")
    store = CheckpointStore(workdir)

    def read(step: int) -> Pretrained:
        metadata = store.record(step).metadata
        config = metadata["config"]
        config["data"]["train"] = None
        config["mesh"] = {}
        if not with_evals:
            config["evals"] = {}
        shapes = {name: jax.ShapeDtypeStruct(tuple(shape), dtype) for name, (shape, dtype) in metadata["batch"].items()}
        run = Run(build(Experiment, config, "config", types), jax.local_devices()[:1], shapes)
        with jax.set_mesh(run.mesh):
            state = store.restore(abstract_like(run.state_shapes, run.state_shardings), step).state
        return Pretrained(run, step, run.encoder().at(state.eval_params, state.method))

    if step is not None:
        return read(step)
    return store.newest_good(read, lambda damage: warnings.warn(damage, stacklevel=2))


def write_features(path: epath.PathLike, features: Mapping[str, np.ndarray]) -> None:
    """Writes features (with `label`, `index`) as `.npz`, or as `.parquet` with a list column per feature."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **features)
    elif path.suffix == ".parquet":
        rows = {
            name: values.reshape(len(values), -1).tolist() if values.ndim > 1 else values
            for name, values in features.items()
        }
        pyarrow.parquet.write_table(pyarrow.table(rows), path)
    else:
        raise ValueError(
            f"{path}: features are written as .npz or .parquet, not {path.suffix or 'a file without ending'}"
        )
