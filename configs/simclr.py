"""SimCLR (Chen et al., ICML 2020).

ssljax train --config configs/simclr.py:digits --workdir runs/digits         # embedded data, a minute on two cores
ssljax train --config configs/simclr.py:cifar10_mini --workdir runs/cifar10  # SSLJAX_DATA/cifar10, minutes
ssljax train --config configs/simclr.py:images --workdir runs/mine data.train=folder:/my/images
ssljax train --config configs/simclr.py:paper --workdir runs/simclr          # ImageNet; 128 TPU v3 cores in the paper
"""

from ml_collections import ConfigDict

from ssljax.views import evaluation, simclr


def paper() -> ConfigDict:
    """ImageNet, ResNet-50, batch 4096, 100 epochs: about 64.5 % linear top-1 in the paper (69.3 % at 1,000 epochs)."""
    steps_per_epoch = 1_281_167 // 4096
    return ConfigDict(
        {
            "method": {
                "type": "SimCLR",
                "encoder": {"type": "ResNet", "depth": 50},
                "projector": {"type": "Projector", "hidden": (2048, 2048), "out_dim": 128, "kernel_init_std": 0.01},
                "temperature": 0.1,
            },
            "data": {
                "train": {"type": "TFDS", "name": "imagenet2012", "split": "train"},
                "views": {"type": "Views", "views": simclr(224), "host": "crop"},
                "eval_view": {"type": "Views", "views": evaluation(224), "host": "crop"},
                "loader": {"workers": 32},
            },
            "steps": 100 * steps_per_epoch,
            "batch_size": 4096,
            "precision": "bf16",
            "optim": {
                "name": "lars",
                "lr": 0.3,
                "lr_rule": "linear",
                "warmup": 10 * steps_per_epoch,
                "weight_decay": 1e-6,
                "momentum": 0.9,
            },
            "checkpoint": {"every": 10 * steps_per_epoch},
            "eval_every": 10 * steps_per_epoch,
            "evals": {
                "imagenet": {
                    "type": "Classification",
                    "train": {"type": "TFDS", "name": "imagenet2012", "split": "train[:10%]"},
                    "test": {"type": "TFDS", "name": "imagenet2012", "split": "validation"},
                },
            },
        }
    )


def images() -> ConfigDict:
    """Your own pictures: `data.train=folder:/my/images` (or tar:, parquet:, ...). ResNet-50, 224 pixels, one GPU."""
    config = paper()
    config.update(
        {
            "batch_size": 512,
            "steps": 100_000,
            "optim": {"warmup": 5_000},
            "checkpoint": {"every": 5_000},
            "data": {"loader": {"workers": 0, "threads": 16}},
        }
    )
    config.data.train = None
    config.evals = {}
    config.eval_every = 0
    return config


def cifar10() -> ConfigDict:
    """The README recipe of the official code: ResNet-18, batch 512, 1,000 epochs, tau 0.5; about 91 % linear there."""
    steps_per_epoch = 50_000 // 512
    config = _small("tfds:cifar10/train", "tfds:cifar10/test", steps=1000 * steps_per_epoch, batch_size=512)
    config.method.encoder = {"type": "ResNet", "depth": 18, "stem": "cifar"}
    config.method.projector = {"type": "Projector", "hidden": (512,), "out_dim": 128, "kernel_init_std": 0.01}
    config.optim = {
        "name": "lars",
        "lr": 0.5,
        "lr_rule": "linear",
        "warmup": 10 * steps_per_epoch,
        "weight_decay": 1e-4,
    }
    config.precision = "bf16"
    config.eval_every = 50 * steps_per_epoch
    config.checkpoint = {"every": 50 * steps_per_epoch}
    return config


def cifar10_mini() -> ConfigDict:
    """CIFAR-10 (`SSLJAX_DATA/cifar10`), small ResNet, about seven minutes on two CPU cores."""
    return _cifar10_mini(steps=800)


def cifar10_mini_vit() -> ConfigDict:
    """As `cifar10_mini` with a small ViT."""
    config = _cifar10_mini(steps=600)
    config.method.encoder = {
        "type": "ViT",
        "image_size": 32,
        "patch": 4,
        "width": 96,
        "depth": 4,
        "heads": 3,
        "pool": "mean",
        "class_token": False,
    }
    return config


def _cifar10_mini(steps: int) -> ConfigDict:
    data = "npz:$SSLJAX_DATA/cifar10"
    config = _small(f"{data}/train.npz", f"{data}/test.npz", steps=steps, batch_size=256)
    config.data.loader = {"cache": True}
    return config


def digits() -> ConfigDict:
    """scikit-learn's 1,797 handwritten digits: nothing to download, about a minute on two CPU cores."""
    config = _small("digits:train", "digits:test", steps=300, batch_size=128, size=16)
    crop = {"scale": (0.4, 1.0), "flip": 0.0, "hue": 0.0, "saturation": 0.0, "grayscale": 0.0}
    config.data.views.views = {name: view | crop for name, view in simclr(16, strength=0.5, blur=False).items()}
    config.evals.frozen.protocols = ("knn", "linear", "fewshot")
    return config


def _small(train: str, test: str, *, steps: int, batch_size: int, size: int = 32) -> ConfigDict:
    """An 8-layer ResNet (16-32-64 channels) on small images, Adam: the miniature of the method."""
    return ConfigDict(
        {
            "method": {
                "type": "SimCLR",
                "encoder": {"type": "ResNet", "depth": 8, "stem": "cifar"},
                "projector": {"type": "Projector", "hidden": (128,), "out_dim": 64},
                "temperature": 0.5,
            },
            "data": {
                "train": train,
                "size": size,
                "views": {"type": "Views", "views": simclr(size, strength=0.5, blur=False)},
                "eval_view": {"type": "Views", "views": evaluation(size, fraction=1.0)},
            },
            "steps": steps,
            "batch_size": batch_size,
            "optim": {"name": "adamw", "lr": 2e-3, "warmup": steps // 20, "weight_decay": 1e-4},
            "evals": {
                "frozen": {"type": "Classification", "train": train, "test": test, "protocols": ("knn", "linear")}
            },
        }
    )


VARIANTS = {
    "digits": digits,
    "cifar10_mini": cifar10_mini,
    "cifar10_mini_vit": cifar10_mini_vit,
    "cifar10": cifar10,
    "images": images,
    "paper": paper,
}
