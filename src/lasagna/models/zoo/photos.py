"""Photos for the demo, and how a picture becomes an input of EfficientNet-Lite0.

The photos are those that scikit-image's wheel contains, all in the public domain or CC0. Only its
files are read: scikit-image itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lasagna.errors import UsageError
from lasagna.models.zoo.efficientnet import IMAGE_SIZE
from lasagna.models.zoo.installed import package_file

# Google's evaluation of these weights (efficientnet_lite_builder.py and preprocessing.py of the
# official TensorFlow implementation): this mean and deviation for all three channels, and of the
# central square a margin of 16 in 256 pixels left out on each side. Pillow's bicubic filter smooths
# when it shrinks, which TensorFlow's did not.
_MEAN: Final = np.float32(127.0)
_DEVIATION: Final = np.float32(128.0)
_KEPT: Final = IMAGE_SIZE / (IMAGE_SIZE + 32)


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo and what is on it.

    Attributes:
        name: how the demo calls it.
        file: its file in scikit-image's data folder.
        shows: what a person sees.
        right: the ImageNet labels that a person would accept as the first answer.
        box: the part to look at, in pixels (left, top, right, bottom); None for all of it.
    """

    name: str
    file: str
    shows: str
    right: frozenset[str]
    box: tuple[int, int, int, int] | None = None


_ALL: Final = (
    Photo(
        "cat",
        "chelsea.png",
        "a ginger tabby cat called Chelsea",
        frozenset({"tabby", "tiger cat", "Egyptian cat"}),
    ),
    Photo(
        "coffee",
        "coffee.png",
        "an espresso in a red cup",
        frozenset({"espresso", "cup", "coffee mug"}),
    ),
    Photo(
        "rocket",
        "rocket.jpg",
        "a Falcon 9 on its launch pad at dusk",
        frozenset({"missile", "projectile"}),
    ),
    # ImageNet has no class for motorcycles.
    Photo(
        "motorcycle",
        "motorcycle_left.png",
        "a red motorcycle in a garage",
        frozenset({"moped", "motor scooter"}),
    ),
    Photo(
        "cameraman",
        "camera.png",
        "a man with a camera on a tripod",
        frozenset({"tripod"}),
    ),
    # The astronaut herself fits no class of ImageNet; the model of a shuttle behind her does.
    Photo(
        "shuttle",
        "astronaut.png",
        "a model of a space shuttle, behind the astronaut Eileen Collins",
        frozenset({"space shuttle"}),
        box=(300, 0, 512, 300),
    ),
)
PHOTOS: Final[Mapping[str, Photo]] = MappingProxyType({photo.name: photo for photo in _ALL})
"""The photos by name."""


def photo_path(name: str) -> Path:
    """The file of a photo of ``PHOTOS``.

    Raises:
        UsageError: there is no photo of that name.
        ModelError: scikit-image is not installed.
    """
    photo = PHOTOS.get(name)
    if photo is None:
        raise UsageError(f"there is no photo {name!r}: choose one of {', '.join(PHOTOS)}")
    return package_file("skimage", f"data/{photo.file}", needs="scikit-image")


def photo_input(name: str) -> NDArray[np.float32]:
    """A photo of ``PHOTOS`` as the model's input, [1, 3, 224, 224].

    Raises:
        UsageError: there is no photo of that name.
        ModelError: scikit-image is not installed.
    """
    path = photo_path(name)
    with Image.open(path) as image:
        return image_input(image.crop(PHOTOS[name].box) if PHOTOS[name].box else image)


def file_input(path: Path) -> NDArray[np.float32]:
    """Any picture file as the model's input, [1, 3, 224, 224].

    Raises:
        UsageError: the file can't be read, or is no picture.
    """
    try:
        with Image.open(path) as image:
            return image_input(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"can't read {path} as a picture: {error}") from error


def image_input(image: Image.Image) -> NDArray[np.float32]:
    """A picture as the model's input: its centre, scaled, channels first, RGB.

    Args:
        image: any size and mode; turned upright if a camera noted how it was held.

    Returns:
        Array of shape [1, 3, 224, 224], values from -0.99 to 1.
    """
    image = ImageOps.exif_transpose(image).convert("RGB")
    side = min(image.size) * _KEPT
    left, top = (image.width - side) / 2, (image.height - side) / 2
    small = image.resize(
        (IMAGE_SIZE, IMAGE_SIZE),
        Image.Resampling.BICUBIC,
        box=(left, top, left + side, top + side),
    )
    pixels = (np.asarray(small, np.float32) - _MEAN) / _DEVIATION
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[np.newaxis])
