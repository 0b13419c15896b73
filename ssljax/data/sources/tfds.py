"""Data sets prepared by tensorflow-datasets, read without TensorFlow: `TFDS`."""

import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ssljax.bounded import read_json
from ssljax.data.errors import BadSample
from ssljax.data.sources.base import Record, check_index, expand


@dataclass(frozen=True)
class TFDS:
    """A tensorflow-datasets set in its ArrayRecord format. Nothing is downloaded here: prepare the set once with

        python -c "import tensorflow_datasets as tfds; tfds.builder('cifar10',
        file_format='array_record').download_and_prepare()"

    `split` takes the usual slices (`train[:90%]`). Record: `image` (encoded bytes), `label` (int), `text` (str),
    `key`, and every other feature under its own name. A set whose `features.json` names a class outside of
    tensorflow-datasets is refused unless that class's module has been imported already: reading it would import it.
    """

    name: str
    split: str = "train"
    data_dir: str | None = None  # None: where tensorflow-datasets keeps its sets

    def __post_init__(self) -> None:
        _ = self._data

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "split": self.split, "data_dir": self.data_dir}

    @cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds  # slow to import
        from tensorflow_datasets.core.constants import DATA_DIR

        folder = None if self.data_dir is None else str(expand(self.data_dir))
        where = Path(folder or DATA_DIR)
        for file in sorted((where / re.split("[/:]", self.name)[0]).glob("**/features.json")):
            _refuse_foreign_classes(file)
        try:
            return tfds.builder(self.name, data_dir=folder)
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(
                f"tensorflow-datasets has no set {self.name!r}, and none is prepared in "
                f"{folder or 'its default folder'}"
            ) from error
        except OSError:
            raise
        except Exception as error:  # whatever its parsers raise
            raise ValueError(f"{self.name} in {where} is damaged ({error}); prepare it again") from error

    @cached_property
    def _data(self) -> Any:
        import tensorflow_datasets as tfds

        builder = self._builder
        if not builder.info.splits:
            folder = str(builder.data_path.parent.parent)
            raise FileNotFoundError(
                f"{self.name} is not prepared in {builder.data_path}. Prepare it once with: "
                f"import tensorflow_datasets as tfds; tfds.builder({self.name!r}, data_dir={folder!r}, "
                "file_format='array_record').download_and_prepare()"
            )
        # Pictures stay encoded: decoding is work for the parallel host transform.
        skip = {
            k: tfds.decode.SkipDecoding()
            for k, f in builder.info.features.items()
            if isinstance(f, tfds.features.Image)
        }
        try:
            return builder.as_data_source(split=self.split, decoders=skip or None)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.name} in {builder.data_path} is not in the ArrayRecord format, which random access needs; "
                "prepare it again with file_format='array_record'"
            ) from error
        except ValueError as error:
            raise ValueError(f"{self.name} has no split {self.split!r}; it has {list(builder.info.splits)}") from error

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        label = dict(self._builder.info.features.items()).get("label")
        return tuple(getattr(label, "names", None) or ())

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        i = check_index(index, len(self))
        name = f"{self.name}/{self.split}[{i}]"
        try:
            record = {key: _plain(key, value) for key, value in self._data[i].items()}
        except OSError:
            raise
        except Exception as error:  # whatever the parsers of its records raise
            raise BadSample(f"{name} is damaged ({error})", name) from error
        return {**record, "key": name}


def _refuse_foreign_classes(file: Path) -> None:
    try:
        nodes = [read_json(file)]
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); prepare the set again") from error
    while nodes:
        node: Any = nodes.pop()
        nodes += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        for key in ("pythonClassName", "python_class_name", "type"):
            name = str(node.get(key)) if isinstance(node, dict) else ""
            module = name.rpartition(".")[0]
            if module and not module.startswith("tensorflow_datasets.") and module not in sys.modules:
                raise ValueError(
                    f"{file} names the class {name!r}, which is not one of tensorflow-datasets; if you trust it, "
                    f"import {module} first"
                )


def _plain(key: str, value: Any) -> Any:
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bytes) and key != "image":
        try:
            return value.decode()  # tensorflow-datasets keeps text as bytes
        except UnicodeDecodeError:
            return value
    return value
