"""The demo's photos are recognised, and pictures of any kind become inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from lasagna.errors import ModelError, UsageError
from lasagna.models.zoo import catalog
from lasagna.models.zoo.labels import best_guesses, imagenet_labels

Image = pytest.importorskip("PIL.Image")

from lasagna.models.zoo import photos  # noqa: E402 (needs Pillow)


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    try:
        photos.photo_path("cat")
        return ort.InferenceSession(catalog.load("efficientnet-lite0").SerializeToString())
    except ModelError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", photos.PHOTOS)
def test_the_first_answer_is_right(name: str, session: ort.InferenceSession) -> None:
    (probabilities,) = session.run(None, {"image": photos.photo_input(name)})
    best = best_guesses(probabilities)
    assert best[0].label in photos.PHOTOS[name].right, best


def test_right_answers_are_labels() -> None:
    for photo in photos.PHOTOS.values():
        assert photo.right <= set(imagenet_labels())


def test_labels_are_those_of_imagenet() -> None:
    labels = imagenet_labels()
    assert len(labels) == len(set(labels)) == 1000
    known = {0: "tench", 281: "tabby", 657: "missile", 967: "espresso", 999: "toilet tissue"}
    assert {index: labels[index] for index in known} == known


def test_best_guesses_are_ordered() -> None:
    probabilities = np.zeros((1, 1000), np.float32)
    probabilities[0, [281, 967]] = 0.25, 0.75
    espresso, tabby = best_guesses(probabilities, 2)
    assert (espresso.label, espresso.probability) == ("espresso", 0.75)
    assert (tabby.label, tabby.probability) == ("tabby", 0.25)
    with pytest.raises(UsageError, match="1000 numbers, not 7"):
        best_guesses(np.zeros(7))


def test_takes_the_centre_and_scales_as_trained() -> None:
    # A white picture with a black frame as wide as what is left out.
    pixels = np.full((512, 640, 3), 255, np.uint8)
    pixels[:32] = pixels[-32:] = 0
    pixels[:, :96] = pixels[:, -96:] = 0
    found = photos.image_input(Image.fromarray(pixels))
    assert found.shape == (1, 3, 224, 224)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:, :, 2:-2, 2:-2], 1)
    black = photos.image_input(Image.new("RGB", (300, 300)))
    np.testing.assert_array_equal(black, np.float32(-127 / 128))


def test_channels_are_red_green_blue() -> None:
    found = photos.image_input(Image.new("RGB", (50, 80), (255, 127, 0)))
    np.testing.assert_allclose(found[0, :, 0, 0], [1, 0, -127 / 128])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_takes_any_mode_and_format(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.tiff"
    Image.new("RGB", (100, 60), (255, 255, 255)).convert(mode).save(path)
    np.testing.assert_array_equal(photos.file_input(path), 1)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_refuses_what_is_no_picture(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="as a picture"):
        photos.file_input(path)
    with pytest.raises(UsageError, match="as a picture"):
        photos.file_input(tmp_path / "none.png")


def test_names_the_photos_there_are() -> None:
    with pytest.raises(UsageError, match="no photo 'dog': choose one of cat, coffee"):
        photos.photo_input("dog")
