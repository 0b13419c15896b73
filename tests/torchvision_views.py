"""What torchvision (`transforms.v2.functional`) makes of two photographs over a grid of parameters.

`python tests/torchvision_views.py` (in an environment with torchvision) writes the answers to a file, which is what
`test_parity_views.py` compares with where torchvision is not installed.
"""

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_sample_images

FIXTURE = Path(__file__).parent / "fixtures" / "torchvision_views.npz"
FULL = 65_535  # of the uint16 numbers in the file

SIZE = 16, 24  # of the pictures in the file
BOXES = ((0, 0, 16, 24), (3, 5, 7, 8), (1, 2, 14, 12), (6, 10, 9, 12))  # top, left, height, width
FACTORS = (0.0, 0.2, 0.6, 1.0, 1.4, 1.8)
GRID: dict[str, list[dict[str, Any]]] = {
    "resize_crop": [
        {"box": box, "size": size, "interpolation": how}
        for box in BOXES
        for size in (5, 30)
        for how in ("bilinear", "bicubic")
    ],
    "brightness": [{"factor": factor} for factor in FACTORS],
    "contrast": [{"factor": factor} for factor in FACTORS],
    "saturation": [{"factor": factor} for factor in FACTORS],
    "hue": [{"shift": shift} for shift in (-0.5, -0.2, -0.05, 0.0, 0.1, 0.3, 0.5)],
    "grayscale": [{}],
    "solarize": [{"threshold": threshold} for threshold in (0.0, 0.25, 0.5, 1.0)],
    "blur": [{"sigma": sigma, "radius": radius} for sigma in (0.1, 0.5, 1.0, 2.0) for radius in (1, 4, 11)],
    "hflip": [{}],
}


def photographs(height: int, width: int) -> np.ndarray:
    """uint8 [2, height, width, 3]: a temple and a flower, of every n-th pixel, from scikit-learn."""
    images = np.stack(load_sample_images().images)
    step = min(images.shape[1] // height, images.shape[2] // width)
    return images[:, ::step, ::step][:, :height, :width]


def answer(operation: str, image: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    """torchvision's result for one picture, uint8 or float32 in [0, 1] as the picture is, [h, w, 3]."""
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    p, most = parameters, 255 if image.dtype == np.uint8 else 1
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0)))
    if operation == "resize_crop":
        how = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}[p["interpolation"]]
        y = functional.resized_crop(x, *p["box"], [p["size"]] * 2, interpolation=how, antialias=True)
        y = y.clamp(0, most)  # of floats torchvision leaves what bicubic interpolation overshoots
    elif operation == "blur":
        y = functional.gaussian_blur(x, [2 * p["radius"] + 1] * 2, [p["sigma"]] * 2)
    elif operation == "solarize":
        y = functional.solarize(x, p["threshold"] * most)
    elif operation == "grayscale":
        y = functional.rgb_to_grayscale(x, num_output_channels=3)
    elif operation == "hflip":
        y = functional.horizontal_flip(x)
    else:
        y = getattr(functional, f"adjust_{operation}")(x, *p.values())
    return np.moveaxis(y.numpy(), 0, -1)


def write() -> None:
    """Answers to the whole grid for both photographs, as uint16."""
    images = photographs(*SIZE).astype(np.float32) / 255
    answers = {
        f"{operation}/{i}": np.stack(
            [np.rint(answer(operation, image, p) * FULL).astype(np.uint16) for image in images]
        )
        for operation, grid in GRID.items()
        for i, p in enumerate(grid)
    }
    FIXTURE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FIXTURE, **answers)


if __name__ == "__main__":
    write()
