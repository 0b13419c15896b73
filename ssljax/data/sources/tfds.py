"""Data sets prepared by tensorflow-datasets, read without TensorFlow: `TFDS`."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ssljax.data.sources.base import Record, check_index, expand


@dataclass(frozen=True)
class TFDS:
    """A tensorflow-datasets set in its ArrayRecord format. Nothing is downloaded here: prepare the set once with

        python -c "import tensorflow_datasets as tfds; tfds.builder('cifar10',
        file_format='array_record').download_and_prepare()"

    `split` takes the usual slices (`train[:90%]`). Record: `image` (encoded bytes), `label` (int), `text` (str),
    `key`, and every other feature under its own name.
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

        folder = None if self.data_dir is None else str(expand(self.data_dir))
        try:
            return tfds.builder(self.name, data_dir=folder)
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(
                f"tensorflow-datasets has no set {self.name!r}, and none is prepared in "
                f"{folder or 'its default folder'}"
            ) from error

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
        record = {key: _plain(key, value) for key, value in self._data[i].items()}
        return {**record, "key": f"{self.name}/{self.split}[{i}]"}


def _plain(key: str, value: Any) -> Any:
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bytes) and key != "image":
        try:
            return value.decode()  # tensorflow-datasets keeps text as bytes
        except UnicodeDecodeError:
            return value
    return value
