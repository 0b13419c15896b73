"""Host input, decode included: images per second of one core, ours and theirs on the same JPEGs, in turn.

    python -m bench.input --tar $SSLJAX_DATA/caltech101/train.tar

In an environment with lightly, torchvision and kornia beside ssljax. CPU seconds of the process, every library held to
one thread; each round gives every contender the same pictures, and ratios are taken within a round.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "NPROC": "1", "JAX_PLATFORMS": "cpu"}

import argparse
import io
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from ssljax.data import HostTransform, Tar
from ssljax.views import View, multi_crop, simclr

Contender = Callable[[Sequence[bytes]], None]  # makes the views of each picture


def ours(recipe: dict, augment: bool) -> Contender:
    transform = HostTransform(crops={name: View(**fields) for name, fields in recipe.items()}, augment=augment)
    rng = np.random.default_rng(0)

    def run(images: Sequence[bytes]) -> None:
        for image in images:
            transform({"image": image}, rng)

    return run


def with_pillow(transform: Callable, views: int = 1) -> Contender:
    from PIL import Image

    def run(images: Sequence[bytes]) -> None:
        for image in images:
            picture = Image.open(io.BytesIO(image)).convert("RGB")
            for _ in range(views):
                transform(picture)

    return run


def with_tensors(transform: Callable, views: int) -> Contender:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    def run(images: Sequence[bytes]) -> None:
        for image in images:
            picture = decode_jpeg(torch.frombuffer(bytearray(image), dtype=torch.uint8), mode=ImageReadMode.RGB)
            for _ in range(views):
                transform(picture)

    return run


def torchvision_simclr(size: int, tensors: bool):
    """SimCLR's appendix A by torchvision's own transforms; what lightly's differ in: 23 taps instead of sigma's."""
    import torch
    from torchvision.transforms import v2

    blur = v2.RandomApply([v2.GaussianBlur(size // 20 * 2 + 1, (0.1, 2.0))], p=0.5)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(0.2),
            *([] if tensors else [v2.PILToTensor()]),
            blur,
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def kornia_simclr(size: int, batch: int = 32) -> Contender:
    """Decoding and random crops picture by picture, all else of a batch at once, as kornia is meant to be used."""
    import torch
    from kornia import augmentation as k
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True)
    rest = torch.nn.Sequential(
        k.RandomHorizontalFlip(p=0.5),
        k.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        k.RandomGrayscale(p=0.2),
        k.RandomGaussianBlur((23, 23), (0.1, 2.0), p=0.5),
    )

    def run(images: Sequence[bytes]) -> None:
        for start in range(0, len(images), batch):
            crops = []
            for image in images[start : start + batch]:
                picture = decode_jpeg(torch.frombuffer(bytearray(image), dtype=torch.uint8), mode=ImageReadMode.RGB)
                crops += [crop(picture), crop(picture)]
            with torch.inference_mode():
                rest(torch.stack(crops).float() / 255)

    return run


def contenders(recipe: str) -> dict[str, Contender]:
    """By name; the first is what the ratios refer to."""
    from lightly.transforms import DINOTransform, SimCLRTransform

    if recipe == "simclr":
        return {
            "lightly SimCLRTransform": with_pillow(SimCLRTransform(224)),
            "torchvision v2, Pillow": with_pillow(torchvision_simclr(224, tensors=False), 2),
            "torchvision v2, tensors": with_tensors(torchvision_simclr(224, tensors=True), 2),
            "kornia, batches of 32": kornia_simclr(224),
            "ours, all on the host": ours(simclr(224), augment=True),
            "ours, colour and blur on the device": ours(simclr(224), augment=False),
        }
    return {
        "lightly DINOTransform": with_pillow(DINOTransform(n_local_views=8)),
        "ours, all on the host": ours(multi_crop(), augment=True),
        "ours, colour and blur on the device": ours(multi_crop(), augment=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tar", required=True, help="shards with JPEGs")
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    warnings.filterwarnings("ignore")
    source = Tar(options.tar)
    places = np.linspace(0, len(source) - 1, options.pictures).astype(int).tolist()
    images = [source[i]["image"] for i in places]
    shapes = [cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR).shape[:2] for image in images]
    height, width = np.median(shapes, axis=0)
    console = Console(width=140)
    console.print(
        f"{len(images)} JPEGs of {np.mean([len(image) for image in images]) / 1e3:.0f} kB, median {width:.0f} x "
        f"{height:.0f}; Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("lightly", "torch", "torchvision", "kornia", "simplejpeg"))
    )
    for recipe, title in (("simclr", "SimCLR, two views of 224"), ("dino", "DINO, two views of 224 and eight of 96")):
        runs = contenders(recipe)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(options.rounds + 1):
            for name, run in runs.items():
                began = time.process_time()
                run(images)
                if number:  # the first warms up
                    times[name].append(time.process_time() - began)
        table = Table("", "images/s of one core", "ratio", "least", "most", title=title, title_justify="left")
        base = times[next(iter(runs))]
        for name, seconds in times.items():
            ratios = [theirs / mine for theirs, mine in zip(base, seconds, strict=True)]
            rate = len(images) / statistics.median(seconds)
            figures = (statistics.median(ratios), min(ratios), max(ratios))
            table.add_row(name, f"{rate:,.0f}", *(f"{ratio:.2f}" for ratio in figures))
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)


if __name__ == "__main__":
    main()
