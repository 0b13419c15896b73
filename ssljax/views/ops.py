"""Image operations on batches: channels last, float32 in [0, 1], one explicit parameter per row.

Nothing here is random: the caller draws the parameters, so every operation can be checked against a closed form. The
definitions are torchvision's (`RandomResizedCrop`, antialiased `resize`, `ColorJitter`, `GaussianBlur` with reflected
borders), without its rounding to 8 bits between two operations.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

Interpolation = Literal["bilinear", "bicubic"]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the numbers that `color_jitter` takes in `order`
ATTEMPTS = 10  # of `random_boxes`


# ---------------------------------------------------------------------------------------------------------------- crops


def random_boxes(
    uniforms: Float[Array, "b 22"], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Float[Array, "b 4"]:
    """Boxes (top, left, height, width) in whole pixels, distributed as torchvision's `RandomResizedCrop`.

    The area is uniform in `scale` (share of the image), the aspect width / height log-uniform in `ratio`; the first of
    ten attempts that fits is placed uniformly. If none fits: the largest central box whose aspect lies in `ratio`.
    (TensorFlow's `sample_distorted_bounding_box`, in SimCLR's and BYOL's code, draws the aspect uniformly instead.)

    `uniforms`, in [0, 1): the areas and the aspects of the ten attempts, then the place (vertical, horizontal).
    """
    areas, aspects, place = jnp.split(uniforms, [ATTEMPTS, 2 * ATTEMPTS], axis=1)
    areas = height * width * (scale[0] + areas * (scale[1] - scale[0]))
    aspects = ratio[0] * jnp.exp(aspects * math.log(ratio[1] / ratio[0]))
    sides = jnp.round(jnp.stack([jnp.sqrt(areas / aspects), jnp.sqrt(areas * aspects)], axis=-1))
    image = jnp.asarray([height, width], jnp.float32)
    fits = ((sides > 0) & (sides <= image)).all(-1)
    first = jnp.take_along_axis(sides, fits.argmax(1)[:, None, None], axis=1)[:, 0]

    aspect = min(max(width / height, ratio[0]), ratio[1])
    fallback = [max(1, min(height, round(width / aspect))), max(1, min(width, round(height * aspect)))]
    found = fits.any(1)[:, None]
    box = jnp.where(found, first, jnp.asarray(fallback, jnp.float32))
    corner = jnp.floor(jnp.where(found, place * (image - box + 1), (image - box) / 2))
    return jnp.concatenate([corner, box], axis=1)


def center_box(height: int, width: int, fraction: float) -> tuple[int, int, int, int]:
    """Box (top, left, height, width) of the largest central square times `fraction`, in whole pixels."""
    side = max(1, round(fraction * min(height, width)))
    return round((height - side) / 2), round((width - side) / 2), side, side


def resize_crop(
    images: UInt8[Array, "b h w c"], boxes: Float[Array, "b n 4"], size: int, interpolation: Interpolation = "bicubic"
) -> Float[Array, "b n s s c"]:
    """Cut `n` boxes (top, left, height, width) out of each image and resize them to `size`, antialiased.

    Equal to Pillow's and torchvision's crop followed by resize: nothing outside the box is seen, and where the box
    is larger than `size` the kernel (bicubic: a = -0.5) is stretched to cover all its pixels. Values are divided by 255
    and clipped to [0, 1], because bicubic overshoots.
    """
    rows = _resize_weights(boxes[..., 0], boxes[..., 2], images.shape[1], size, interpolation) / 255
    columns = _resize_weights(boxes[..., 1], boxes[..., 3], images.shape[2], size, interpolation)
    # Dense products suit every device, gathers only some. HIGHEST: weights in bfloat16 would be off by a grey level.
    exact = jax.lax.Precision.HIGHEST
    stripes = jnp.einsum("bnsh,bhwc->bnswc", rows, images.astype(jnp.float32), precision=exact)
    return jnp.clip(jnp.einsum("bntw,bnswc->bnstc", columns, stripes, precision=exact), 0, 1)


def _resize_weights(start, length, pixels: int, size: int, interpolation: Interpolation):
    """Weights [..., size, pixels] of the source pixels in each output pixel, along one axis."""
    start, step = start[..., None, None], length[..., None, None] / size
    centre = start + (jnp.arange(size)[:, None] + 0.5) * step
    source = jnp.arange(pixels) + 0.5
    distance = jnp.abs(source - centre) / jnp.maximum(step, 1)  # in units of the stretched kernel
    if interpolation == "bilinear":
        weights = jnp.maximum(1 - distance, 0)
    else:  # Keys' cubic kernel, a = -0.5
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0))
    weights = jnp.where((source > start) & (source < start + length[..., None, None]), weights, 0)
    return weights / weights.sum(-1, keepdims=True)


def hflip(images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Mirror left and right."""
    return images[:, :, ::-1]


# --------------------------------------------------------------------------------------------------------------- colour


def adjust_brightness(images: Float[Array, "b h w 3"], factor: Float[Array, "b"]) -> Float[Array, "b h w 3"]:
    """Multiply by `factor`; clip."""
    return _stack(_blend(_planes(images), factor, 0, 0))


def adjust_contrast(images: Float[Array, "b h w 3"], factor: Float[Array, "b"]) -> Float[Array, "b h w 3"]:
    """Mix with the mean grey of the image: factor * x + (1 - factor) * mean; clip."""
    return _stack(_blend(_planes(images), factor, 0, 1 - factor))


def adjust_saturation(images: Float[Array, "b h w 3"], factor: Float[Array, "b"]) -> Float[Array, "b h w 3"]:
    """Mix with the grey of each pixel: factor * x + (1 - factor) * grey; clip."""
    return _stack(_blend(_planes(images), factor, 1 - factor, 0))


def adjust_hue(images: Float[Array, "b h w 3"], shift: Float[Array, "b"]) -> Float[Array, "b h w 3"]:
    """Rotate the hue of HSV by `shift` turns (-0.5 to 0.5); saturation and value stay."""
    red, green, blue = _planes(images)
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    scale = 1 / jnp.where(chroma == 0, 1, chroma)
    sextant = jnp.where(
        value == red,
        (green - blue) * scale,
        jnp.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    hue = sextant + 6 * _per_image(shift)

    def channel(offset):  # piecewise linear in the hue: full value minus chroma times a trapezium of period 6
        position = hue + offset
        position = position - 6 * jnp.floor(position / 6)  # `%` is not vectorised on CPUs: fifteen times slower
        return value - chroma * jnp.clip(jnp.minimum(position, 4 - position), 0, 1)

    return _stack((channel(5), channel(3), channel(1)))


def color_jitter(
    images: Float[Array, "b h w 3"],
    order: Int[Array, "b 4"],
    brightness: Float[Array, "b"],
    contrast: Float[Array, "b"],
    saturation: Float[Array, "b"],
    hue: Float[Array, "b"] | None = None,
) -> Float[Array, "b h w 3"]:
    """The four adjustments, each row in its own `order`: a permutation of BRIGHTNESS, CONTRAST, SATURATION and HUE.

    `hue=None` leaves hue out. Brightness, contrast and saturation are one operation, clip(a x + g grey + m mean(grey)),
    so a place in the order only selects three numbers. Hue is computed once, between the places that may come before it
    and those that may come after it, each of which is the identity (1, 0, 0) in the rows where it does not. That makes
    6 blends and 1 hue for all 24 orders.
    """
    zero = jnp.zeros_like(brightness)
    blends = jnp.stack(
        [
            jnp.stack([brightness, zero, zero], -1),
            jnp.stack([contrast, zero, 1 - contrast], -1),
            jnp.stack([saturation, 1 - saturation, zero], -1),
            jnp.stack([zero + 1, zero, zero], -1),  # at HUE: the identity
        ],
        axis=1,
    )
    turn = jnp.argmax(order == HUE, axis=1)

    def blend(x, place, active):
        operation = jnp.where(active, order[:, place], HUE)
        a, g, m = jnp.take_along_axis(blends, operation[:, None, None], axis=1)[:, 0].T
        # The barrier keeps XLA from computing all earlier places again for the mean of each later one.
        return jax.lax.optimization_barrier(_stack(_blend(_planes(x), a, g, m)))

    if hue is None:
        for place in range(4):
            images = blend(images, place, True)
        return images
    for place in range(3):
        images = blend(images, place, place < turn)
    images = jax.lax.optimization_barrier(adjust_hue(images, hue))
    for place in range(1, 4):
        images = blend(images, place, place > turn)
    return images


def grayscale(images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Grey of ITU-R 601 (0.2989, 0.587, 0.114) in all three channels."""
    return jnp.broadcast_to(_gray(_planes(images))[..., None], images.shape)


def solarize(images: Float[Array, "b h w c"], threshold: float = 0.5) -> Float[Array, "b h w c"]:
    """Invert the values that reach `threshold`."""
    return jnp.where(images >= threshold, 1 - images, images)


def normalize(
    images: Float[Array, "*b h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "*b h w c"]:
    """(x - mean) / std per channel."""
    return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def _per_image(parameter):
    return jnp.asarray(parameter)[..., None, None]


def _planes(images):
    return images[..., 0], images[..., 1], images[..., 2]


def _stack(planes):
    return jnp.stack(planes, axis=-1)


def _gray(planes):
    red, green, blue = planes
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _blend(planes, a, g, m):
    """clip(a x + g grey + m mean(grey)) of three planes [b, h, w]; a, g, m: [b] or a number."""
    gray = _gray(planes)
    offset = _per_image(g) * gray + _per_image(m) * gray.mean((1, 2), keepdims=True)
    return tuple(jnp.clip(_per_image(a) * plane + offset, 0, 1) for plane in planes)


# ----------------------------------------------------------------------------------------------------------------- blur


def blur_radius(size: int) -> int:
    """Radius of SimCLR's kernel: a tenth of the image wide, odd, at least 3 (23 taps at 224 pixels, 9 at 96)."""
    return max(1, size // 20)


def gaussian_blur(images: Float[Array, "b h w c"], sigma: Float[Array, "b"], radius: int) -> Float[Array, "b h w c"]:
    """Gaussian of `sigma` pixels cut at `radius`, the border reflected without repeating its last pixel.

    Two products with banded matrices, which suit a TPU better than shifted sums. Raises ValueError if a side of the
    image has not more than `radius` pixels.
    """
    if radius >= min(images.shape[1:3]):
        size = f"{images.shape[1]} x {images.shape[2]}"
        raise ValueError(f"a blur of radius {radius} needs more than {radius} pixels a side, the images have {size}")
    exact = jax.lax.Precision.HIGHEST
    images = jnp.einsum("bsh,bhwc->bswc", blur_weights(sigma, radius, images.shape[1]), images, precision=exact)
    return jnp.einsum("btw,bswc->bstc", blur_weights(sigma, radius, images.shape[2]), images, precision=exact)


def blur_weights(sigma, radius: int, pixels: int):
    """Matrices [b, pixels, pixels]: row i holds what each pixel gives to output i, directly or reflected at an end."""
    target, source = jnp.arange(pixels)[:, None], jnp.arange(pixels)[None]
    last = pixels - 1

    def taps(distance, exists):
        gauss = jnp.exp(-0.5 * (distance / _per_image(sigma)) ** 2)
        return jnp.where((jnp.abs(distance) <= radius) & exists, gauss, 0)

    weights = taps(source - target, True) + taps(source + target, source > 0)
    weights = weights + taps(2 * last - source - target, source < last)
    return weights / weights.sum(-1, keepdims=True)


# --------------------------------------------------------------------------------------------------------------- choice


def choose(
    mask: Bool[Array, "b"], yes: Float[Array, "b h w c"], no: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """The rows of `yes` where `mask`, else those of `no`."""
    return jnp.where(mask[:, None, None, None], yes, no)
