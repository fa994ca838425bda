"""The exported processor's pixels are those of the evaluation transform, whatever the picture's format and shape."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmscale.data import images
from mmscale.model.processing_mmscale import MMScaleImageProcessor

SIZE = 64


def encoded(width, height, mode="RGB", kind="PNG", **options):
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = np.stack([255 * columns / width, 255 * rows / height, 127 + 127 * np.sin(columns / 5)], axis=-1)
    noise = np.random.default_rng(width * height).normal(0, 25, smooth.shape)
    image = Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray((255 * columns / width).astype(np.uint8)))
    data = io.BytesIO()
    image.convert(mode).save(data, kind, **options)
    return data.getvalue()


def rotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(90, 70, kind="JPEG", exif=exif)


PICTURES = {
    "square": encoded(64, 64),
    "smaller": encoded(31, 47),
    "much larger": encoded(801, 603),
    "very wide": encoded(1600, 90),
    "one pixel high": encoded(300, 1),
    "jpeg": encoded(301, 224, kind="JPEG", quality=90),
    "jpeg without subsampling": encoded(301, 224, kind="JPEG", quality=95, subsampling=0),
    "progressive jpeg": encoded(224, 301, kind="JPEG", progressive=True),
    "grey jpeg": encoded(100, 80, "L", "JPEG"),
    "cmyk jpeg": encoded(100, 80, "CMYK", "JPEG"),
    "webp": encoded(150, 100, kind="WEBP", lossless=True),
    "grey": encoded(100, 80, "L"),
    "palette": encoded(100, 80, "P"),
    "alpha": encoded(100, 80, "RGBA"),
    "grey and alpha": encoded(100, 80, "LA"),
    "black and white": encoded(100, 80, "1"),
    **{f"orientation {value}": rotated(value) for value in range(1, 9)},
}


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_equal_the_evaluation_transform(name):
    processor = MMScaleImageProcessor(image_size=SIZE)
    values = processor(Image.open(io.BytesIO(PICTURES[name])))["pixel_values"][0]
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    expected = images.center_view(images.decode(PICTURES[name], 1 << 26), SIZE)
    found = (values * std + mean).permute(1, 2, 0).numpy() * 255
    assert found.shape == expected.shape == (SIZE, SIZE, 3)
    assert np.abs(found - expected).max() < 1.001
