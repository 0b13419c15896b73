"""Published recipes: functions that return a plain dict, view name -> fields of a view.

To put in a config and to change there, or to build at once:

    config.data.views = {"type": "Views", "views": simclr(32, strength=0.5, blur=False)}
    views = Views({name: View(**fields) for name, fields in simclr(224).items()})
    batch = jax.jit(views)(key, {"image": images, "label": labels})       # "x1", "x2", "label"
"""

from typing import Any

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def simclr(size: int, strength: float = 1.0, blur: bool = True) -> dict[str, dict[str, Any]]:
    """SimCLR (Chen et al. 2020, appendix A): views "x1" and "x2", in [0, 1]. CIFAR: strength 0.5, no blur.

    Brightness is multiplicative, as in the v2 code and torchvision (the v1 code adds it).
    """
    view = {
        "size": size,
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.8 * strength,
        "contrast": 0.8 * strength,
        "saturation": 0.8 * strength,
        "hue": 0.2 * strength,
        "grayscale": 0.2,
        "blur": 0.5 if blur else 0.0,
    }
    return {"x1": view, "x2": dict(view)}


def moco_v2(size: int) -> dict[str, dict[str, Any]]:
    """MoCo v2 (Chen et al. 2020, the official `--aug-plus`): views "query" and "key"."""
    view = {
        "size": size,
        "scale": (0.2, 1.0),
        "interpolation": "bilinear",
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,
        "grayscale": 0.2,
        "blur": 0.5,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
    return {"query": view, "key": dict(view)}


def byol(size: int) -> dict[str, dict[str, Any]]:
    """BYOL (Grill et al. 2020, appendix B): views "x1" (always blurred) and "x2" (rarely; solarised at times).

    Brightness is multiplicative, as in torchvision (the official code adds it).
    """
    view = _byol_colors(size, scale=(0.08, 1.0))
    return {"x1": view | {"blur": 1.0}, "x2": view | {"blur": 0.1, "solarize": 0.2}}


def multi_crop(
    global_size: int = 224,
    local_size: int = 96,
    local_count: int = 8,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
) -> dict[str, dict[str, Any]]:
    """DINO (Caron et al. 2021, the official defaults): views "global1", "global2" and `local_count` draws of "local".

    Without local crops the authors advise global_scale=(0.14, 1.0). Colours are BYOL's. The official blur is Pillow's
    approximation; here it is `ops.gaussian_blur`.
    """
    crop = _byol_colors(global_size, global_scale)
    views = {"global1": crop | {"blur": 1.0}, "global2": crop | {"blur": 0.1, "solarize": 0.2}}
    if local_count:
        views["local"] = _byol_colors(local_size, local_scale) | {"count": local_count, "blur": 0.5}
    return views


def mae(size: int) -> dict[str, dict[str, Any]]:
    """MAE (He et al. 2022, appendix A.1): view "image", random crop and flip only."""
    return {"image": {"size": size, "scale": (0.2, 1.0), "flip": 0.5, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}}


def clip(size: int) -> dict[str, dict[str, Any]]:
    """CLIP (Radford et al. 2021, section 2.4): view "image", a random crop of 90-100 % of the image's area.

    The paper's is a random square of the resized image; this is open_clip's, which also fits pictures that are not
    square: they are cut to a ratio of at least 3:4 and at most 4:3.
    """
    return {"image": {"size": size, "scale": (0.9, 1.0), "mean": CLIP_MEAN, "std": CLIP_STD}}


def evaluation(
    size: int,
    fraction: float = 0.875,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> dict[str, dict[str, Any]]:
    """View "image", deterministic: the largest central square times `fraction` (224 / 256), resized."""
    return {"image": {"size": size, "crop": "center", "fraction": fraction, "mean": mean, "std": std}}


def video_mae(size: int) -> dict[str, dict[str, Any]]:
    """Spatiotemporal MAE (Feichtenhofer et al. 2022): view "video", one random crop and flip a clip.

    For `Views(views, image="video")`.
    """
    return {"video": {"size": size, "scale": (0.5, 1.0), "flip": 0.5, "mean": (0.45,), "std": (0.225,)}}


def rspnet(size: int) -> dict[str, dict[str, Any]]:
    """RSPNet (Chen et al. 2021, the official code): view "video", crop, grey, colours and flip drawn once a clip.

    For `Views(views, image="video")`; with several clips a video, each has draws of its own. (The official code turns
    clips grey before it changes colours.)
    """
    view = {
        "size": size,
        "scale": (0.4, 1.0),
        "flip": 0.5,
        "jitter": 1.0,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.4,
        "grayscale": 0.2,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
    return {"video": view}


def _byol_colors(size: int, scale: tuple[float, float]) -> dict[str, Any]:
    return {
        "size": size,
        "scale": scale,
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "grayscale": 0.2,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
