"""One HTML page of a run, complete in one file, to send to somebody: figures, curves, diagnostics, pictures, config."""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from etils import epath

from ssljax.api import Pretrained, load
from ssljax.bounded import read_json
from ssljax.checkpoint import CheckpointError, CheckpointStore
from ssljax.config import TYPES, ConfigError
from ssljax.data import Source
from ssljax.metrics import read_records
from ssljax.report import numbers, pictures
from ssljax.report.health import Finding, verdict
from ssljax.report.page import Html, document, el, join, section
from ssljax.report.samples import Samples, Skip, open_source, open_training
from ssljax.summary import figures

__all__ = ["Finding", "verdict", "write_report"]

log = logging.getLogger(__name__)


def write_report(
    workdir: epath.PathLike, source: str | Source | None = None, types: Mapping[str, type] | None = None
) -> epath.Path:
    """Writes `<workdir>/report.html` and returns its path.

    The page loads nothing: pictures are inside it, and there are no scripts. What the run cannot show (its data are
    gone, its method has no patches) gives way to the reason. So does a part that fails: a report never costs a run.

    Args:
      source: the pictures to show, e.g. `"folder:/my/images"`; by default the first test source of the run's
        evaluations that can be opened, else its training source.
      types: classes of your own that the run's config names, by class name.

    Raises:
      FileNotFoundError: there is no `metrics.jsonl` in `workdir`. ValueError: it or `config.json` is damaged.
        ValueError, OSError: `source` cannot be opened.
    """
    workdir = epath.Path(workdir)
    types = dict(types or {})
    records = sorted(read_records(workdir), key=lambda record: record["step"])
    config = _config(workdir)
    measured = figures([workdir])
    parameters = path.read_text() if (path := workdir / "parameters.txt").exists() else ""
    named = config.get("method")
    method = str(named.get("type", "Run") if isinstance(named, Mapping) else "Run")
    paper = getattr({**TYPES, **types}.get(method), "paper", "")
    shown = None if source is None else open_source(config, source, types)  # a wrong one raises
    page = document(
        f"{method}: {workdir.name}",
        _part("Run", lambda: numbers.header(method, paper, config, records, parameters)),
        _part("Results", lambda: numbers.results(records, measured)),
        _part("Curves", lambda: numbers.curves(records)),
        _part("Collapse diagnostics", lambda: numbers.diagnostics(records)),
        _part("Where the time went", lambda: numbers.time_spent(workdir)),
        _part("Incidents", lambda: numbers.incidents(workdir)),
        _part("Pictures", lambda: _pictures(load(workdir, types=types), config, shown, types)),
        _part("Bad samples", lambda: numbers.bad_samples(workdir)),
        _part("Config", lambda: numbers.configuration(config, parameters)),
    )
    path = workdir / "report.html"
    path.write_text(page)
    return path


def _pictures(
    pretrained: Pretrained, config: Mapping[str, Any], shown: tuple[Source, str] | None, types: Mapping[str, type]
) -> Html:
    """All parts that need the encoder."""

    def of_samples() -> Html:
        samples = Samples(pretrained, *(shown or open_source(config, None, types)))
        _ = samples.trained  # without features none of these parts is possible
        return join(
            _part("Nearest neighbours", lambda: pictures.neighbours(samples)),
            _part("Captions of pictures", lambda: pictures.captions(samples)) if "text" in samples.trained else None,
            _part("Patch features", lambda: pictures.patch_maps(samples)),
            _part("Map of the features", lambda: pictures.feature_map(samples)),
        )

    @cache
    def training() -> pictures.Training:
        return pictures.training_batches(pretrained, open_training(config, types))

    parts = [
        _part("Pictures", of_samples),
        _part("Augmentations", lambda: pictures.augmentations(pretrained, training())),
    ]
    if hasattr(pretrained.experiment.method, "pictures"):
        parts.append(_part("The method's pictures", lambda: pictures.of_method(pretrained, training())))
    return join(*parts)


def _part(title: str, write: Callable[[], Html | None]) -> Html | None:
    """A part of the page, or the reason why it is not there."""
    try:
        return write()
    except (Skip, CheckpointError, ConfigError) as reason:
        return section(title, el("p", str(reason), class_="skipped"))
    except Exception as error:
        log.exception("the part %r of the report failed", title)
        return section(title, el("p", f"This part failed: {type(error).__name__}: {error}", class_="failed"))


def _config(workdir: epath.Path) -> dict[str, Any]:
    """The resolved config of a run; empty where nothing tells it."""
    path = workdir / "config.json"
    if path.exists():
        try:
            config = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{path} is damaged: it is not a JSON object")
        return config
    try:
        store = CheckpointStore(workdir)
        return store.newest_good(store.record, log.warning).metadata["config"]
    except CheckpointError:
        return {}
