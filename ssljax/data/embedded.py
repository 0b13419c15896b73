"""Real pictures that arrive with a dependency, so that everything runs without a download: `Digits`."""

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from ssljax.data.sources.arrays import Arrays
from ssljax.data.sources.base import Record


@dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits of 43 writers (Alpaydin and Kaynak, UCI, 1998; 8x8 grey, inside scikit-learn).

    The fixed split takes 50 of each class for test, evenly spaced in the original order, so that both parts have all
    writers: 1,297 train, 500 test. Record: `image` (uint8 `[size,size,3]`, 0..255), `label`, `key`.
    """

    split: Literal["train", "test"] = "train"
    size: int = 16  # pixels; the originals are 8x8

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"size={self.size} is smaller than the originals; use 8 or more")
        if self.split not in ("train", "test"):
            raise ValueError(f"there is no split {self.split!r}; choose 'train' or 'test'")

    def __getstate__(self) -> dict[str, Any]:
        return {"split": self.split, "size": self.size}

    @cached_property
    def _arrays(self) -> Arrays:
        pixels, labels = _read_digits()
        test = np.zeros(len(labels), bool)
        for digit in range(10):
            (of_class,) = np.nonzero(labels == digit)
            test[of_class[np.linspace(0, len(of_class) - 1, 50).round().astype(int)]] = True
        (chosen,) = np.nonzero(test if self.split == "test" else ~test)
        grey = np.round(pixels[chosen] * (255 / 16)).astype(np.uint8)
        grey = np.stack([cv2.resize(g, (self.size, self.size), interpolation=cv2.INTER_CUBIC) for g in grey])
        images = np.repeat(grey[..., None], 3, axis=-1)
        keys = [f"digits[{i}]" for i in chosen]
        return Arrays({"image": images, "label": labels[chosen], "key": keys}, tuple("0123456789"))

    @property
    def classes(self) -> tuple[str, ...]:
        return self._arrays.classes

    @property
    def labels(self) -> np.ndarray:
        """int32 `[n]`"""
        return np.asarray(self._arrays.columns["label"])

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, index: int) -> Record:
        return self._arrays[index]


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(pixels `[1797, 8, 8]` from 0 to 16, int32 labels) as `sklearn.datasets.load_digits` has them."""
    spec = find_spec("sklearn")
    file = Path(spec.origin).parent / "datasets/data/digits.csv.gz" if spec and spec.origin else Path()
    if file.is_file():
        table = np.loadtxt(file, delimiter=",")
    else:  # kept elsewhere; importing sklearn takes more than a second
        from sklearn.datasets import load_digits

        data: Any = load_digits()
        table = np.column_stack([data.data, data.target])
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int32)
