"""The JSON of a checkpoint."""

from dataclasses import asdict, dataclass
from typing import Any

from etils import epath
from orbax.checkpoint.metadata import get_step_metadata

from ssljax.bounded import check_small
from ssljax.digest import json_digest

_FILE = "_CHECKPOINT_METADATA"  # Orbax keeps it there


@dataclass(frozen=True)
class Record:
    """What a checkpoint holds beside the state: JSON.

    Attributes:
      progress: what the loop needs to continue, beside the state: its position in the data, ...
      metadata: what the run says of itself: the resolved config, ...
      arrays: [kind, digest] of every array of the state, by name; the kind as in `float32[768,3072]`.
    """

    progress: dict[str, Any]
    metadata: dict[str, Any]
    arrays: dict[str, list[str]]

    def __post_init__(self):
        for part in (self.progress, self.metadata, self.arrays):
            if not isinstance(part, dict):
                raise TypeError(f"a part is {type(part).__name__}, not a dict")
        for name, value in self.arrays.items():
            if not (isinstance(value, list) and len(value) == 2 and all(isinstance(x, str) for x in value)):
                raise TypeError(f"arrays[{name!r}] is not [kind, digest]")

    def sealed(self, step: int) -> dict[str, Any]:
        """As it is written into the checkpoint of a step, with a digest."""
        record = asdict(self)
        return {"record": record, "digest": json_digest([step, record])}


def read_record(folder: epath.Path, step: int) -> Record:
    """The record in the checkpoint `folder` of a step.

    Raises:
      ValueError: it is not what was written; says why.
    """
    try:
        check_small(folder / _FILE)
        saved: Any = get_step_metadata(folder).custom_metadata
        record, digest = Record(**saved["record"]), saved["digest"]
    except Exception as error:
        raise ValueError(f"its metadata cannot be read: {error!r}") from error
    if digest != json_digest([step, asdict(record)]):
        raise ValueError("its metadata do not have their own digest")
    return record
