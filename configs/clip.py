"""CLIP (Radford et al., ICML 2021) and SigLIP (Zhai et al., ICCV 2023).

ssljax train --config configs/clip.py:scenes --workdir runs/scenes           # rendered pictures, minutes on two cores
ssljax train --config configs/clip.py:scenes_siglip --workdir runs/siglip    # the sigmoid loss
ssljax train --config configs/clip.py:emoji --workdir runs/emoji             # SSLJAX_DATA/emoji, four languages
ssljax train --config configs/clip.py:paper --workdir runs/clip data.train='tar:/data/pairs/{00000..41455}.tar'
"""

from ml_collections import ConfigDict

from ssljax.views import CLIP_MEAN, CLIP_STD, clip, evaluation


def scenes() -> ConfigDict:
    """Rendered scenes; tested on combinations that training never shows. 48 classes: chance is 2.1 %."""
    test = {"type": "Scenes", "count": 1024, "split": "test", "size": 32, "holdout": True}
    tokenizer = {"type": "ByteTokenizer", "length": 64}
    config = _small(
        {"type": "Scenes", "count": 20_000, "split": "train", "size": 32, "holdout": True}, tokenizer, 32, steps=800
    )
    config.evals = {
        "zeroshot": {
            "type": "ZeroShot",
            "test": test,
            "tokenizer": tokenizer,
            "templates": ("a {}", "a picture of a {}", "this shows a {}"),
        },
        "retrieval": {"type": "Retrieval", "query": test},
    }
    return config


def scenes_siglip() -> ConfigDict:
    """As `scenes` with the pairwise sigmoid loss."""
    config = scenes()
    config.method.objective = "sigmoid"
    return config


def emoji() -> ConfigDict:
    """2,400 emoji in two drawing styles with names in four languages; tested on 580 others: chance of R@1 is 0.17 %."""

    def pictures(style: str, split: str, *languages: str) -> dict:
        return {
            "type": "Captions",
            "file": "$SSLJAX_DATA/emoji/captions.csv",
            "images": f"$SSLJAX_DATA/emoji/style_{style}.tar",
            "image_column": "id",
            "text_columns": languages,
            "where": {"split": split},
        }

    languages = ("en", "de", "es", "fr")
    train = {"type": "Concat", "sources": (pictures("3d", "train", *languages), pictures("flat", "train", *languages))}
    config = _small(train, {"type": "ByteTokenizer", "length": 64}, 48, steps=700)
    views = clip(48)
    views["image"] |= {"scale": (0.5, 1.0), "ratio": (0.9, 1.1), "flip": 0.5}
    config.data.views.views = views
    config.data.loader = {"cache": True}
    config.evals = {
        "english": {"type": "Retrieval", "query": pictures("3d", "test", "en")},
        "german": {"type": "Retrieval", "query": pictures("3d", "test", "de")},
        "styles": {
            "type": "Retrieval",
            "query": pictures("3d", "test", "en"),
            "key": pictures("flat", "test", "en"),
            "features": ("image", "image"),
        },
    }
    return config


def emoji_siglip() -> ConfigDict:
    """As `emoji` with the pairwise sigmoid loss."""
    config = emoji()
    config.method.objective = "sigmoid"
    return config


def paper() -> ConfigDict:
    """CLIP ViT-B/32: batch 32,768, 32 epochs of 400 million pairs; 63.2 % zero-shot on ImageNet in the paper.

    Give `data.train` (pairs of pictures and captions) and `data.tokenizer.vocab_path` (the published merges file).
    """
    epoch = 400_000_000 // 32_768
    tower = {
        "activation": "quick_gelu",
        "norm_eps": 1e-5,
        "projection": 512,
        "kernel_init": "clip",
        "scan": True,
        "remat": "full",
    }
    return ConfigDict(
        {
            "method": {
                "type": "CLIP",
                "image": {"type": "ViT", "size": "B", "patch": 32, "pre_norm": True, **tower},
                "text": {"type": "TextTransformer", "width": 512, "depth": 12, "heads": 8, **tower},
            },
            "data": {
                "train": None,
                "tokenizer": {"type": "ClipBPE", "vocab_path": "bpe_simple_vocab_16e6.txt.gz"},
                "views": {"type": "Views", "views": clip(224), "host": "crop"},
                "eval_view": {
                    "type": "Views",
                    "views": evaluation(224, fraction=1.0, mean=CLIP_MEAN, std=CLIP_STD),
                    "host": "crop",
                },
                "loader": {"workers": 32},
            },
            "steps": 32 * epoch,
            "batch_size": 32_768,
            "precision": "bf16",
            "optim": {
                "name": "adamw",
                "lr": 5e-4,
                "warmup": 2_000,
                "weight_decay": 0.2,
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-6,
            },
            "checkpoint": {"every": 2_000, "keep_every": epoch},
        }
    )


def paper_b16() -> ConfigDict:
    """As `paper` with ViT-B/16: 68.6 % zero-shot on ImageNet in the paper."""
    config = paper()
    config.method.image.patch = 16
    return config


def paper_l14() -> ConfigDict:
    """As `paper` with ViT-L/14 and a text tower of width 768 (the paper's table 20): 75.3 % zero-shot on ImageNet."""
    config = paper()
    config.method.image.update({"size": "L", "patch": 14, "projection": 768})
    config.method.text.update({"width": 768, "heads": 12, "projection": 768})
    config.optim.lr = 4e-4
    return config


def _small(train: dict, tokenizer: dict, size: int, *, steps: int) -> ConfigDict:
    """A small ResNet and a small text transformer: the miniature of the method."""
    views = clip(size)
    return ConfigDict(
        {
            "method": {
                "type": "CLIP",
                "image": {"type": "ResNet", "depth": 8, "stem": "cifar", "projection": 64},
                "text": {
                    "type": "TextTransformer",
                    "vocab_size": 259,
                    "context_length": tokenizer["length"],
                    "width": 64,
                    "depth": 2,
                    "heads": 2,
                    "projection": 64,
                },
            },
            "data": {
                "train": train,
                "size": size,
                "tokenizer": tokenizer,
                "views": {"type": "Views", "views": views},
                "eval_view": {"type": "Views", "views": evaluation(size, fraction=1.0, mean=CLIP_MEAN, std=CLIP_STD)},
            },
            "steps": steps,
            "batch_size": 128,
            "optim": {"name": "adamw", "lr": 2e-3, "warmup": steps // 10, "weight_decay": 0.1, "b2": 0.98, "eps": 1e-6},
        }
    )


VARIANTS = {
    "scenes": scenes,
    "scenes_siglip": scenes_siglip,
    "emoji": emoji,
    "emoji_siglip": emoji_siglip,
    "paper": paper,
    "paper_b16": paper_b16,
    "paper_l14": paper_l14,
}
