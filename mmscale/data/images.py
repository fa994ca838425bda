"""From an encoded picture to uint8 pixels of the model's size.

JPEGs go through libjpeg-turbo, or where a fraction of their size will do through a decoder of our own with the same
pixels (`mmscale.data.jpeg`); everything else, and what libjpeg-turbo refuses, through PIL. Resizing is PyTorch's
antialiased bicubic on uint8 in channels-last layout: it agrees with PIL's to within rounding at a quarter of its cost.
Arrays are [height, width, 3], uint8, RGB.
"""

import io
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image

from mmscale.data import jpeg

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_MAX_ASPECT = 8  # a longer picture is cut before it is resized, or a line of pixels would become gigabytes
_KERNELS = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}


class ImageError(Exception):
    """A picture that cannot be used; the message is the reason."""


class _Scratch(threading.local):
    """Each thread's memory for what does not outlive a call: fresh pages would cost as much as the copying."""

    LARGEST = 1 << 26

    def __init__(self):
        self._memory: dict[str, np.ndarray] = {}

    def take(self, use: str, *shape: int) -> np.ndarray:
        size = math.prod(shape)
        memory = self._memory.get(use)
        if memory is None or memory.size < size:
            memory = np.empty(size, dtype=np.uint8)
            if size <= self.LARGEST:
                self._memory[use] = memory
        return memory[:size].reshape(shape)


_scratch = _Scratch()


@dataclass(frozen=True)
class Box:
    top: int
    left: int
    height: int
    width: int


def decode(data: bytes | memoryview, max_pixels: int) -> np.ndarray:
    """Pixels of an encoded picture, upright, alpha over white, any mode as RGB.

    Raises ImageError: not an image, truncated, or more than max_pixels.
    """
    return decode_scaled(data, max_pixels)[0]


def decode_scaled(
    data: bytes | memoryview, max_pixels: int, min_size: int | None = None, shared: bool = False
) -> tuple[np.ndarray, int]:
    """As `decode`, but a JPEG may come at 1/2, 1/4 or 1/8 of its size, if its shorter side keeps `min_size` pixels.

    shared: the pixels may lie in memory that this thread's next call writes over.
    Returns the pixels and what their sizes were divided by.
    """
    if not data:
        raise ImageError("the image has no bytes")
    if data[:3] == b"\xff\xd8\xff":
        found = _decode_jpeg(data, max_pixels, min_size, shared)
        if found is not None:
            return found
    return _decode_any(data, max_pixels), 1


def training_view(
    data: bytes | memoryview,
    crop: Callable[[int, int], Box],
    size: int,
    max_pixels: int,
    fast: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """A picture's training crop at size x size: [size, size, 3], uint8; in `out` where it is given.

    crop: from the picture's height and width to the box. fast: decode no more than the size asks for, widen the box to
    whole pixels of that, and resize bilinearly. Raises ImageError.
    """
    if out is None:
        out = np.empty((size, size, 3), dtype=np.uint8)
    min_size, mode = (size * 3 // 4, "bilinear") if fast else (None, "bicubic")
    part = _decode_crop(data, crop, min_size, max_pixels) if fast else None
    if part is not None:
        return resize(part, size, size, mode, out)
    pixels, scale = decode_scaled(data, max_pixels, min_size, shared=True)
    box = _widened(crop(pixels.shape[0] * scale, pixels.shape[1] * scale), scale)
    return crop_and_resize(pixels, box, size, mode, out)


def training_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Sequence[float]
) -> Box:
    """A random box of a share `scale` of the picture's area with an aspect in `ratio` (log-uniform).

    draws: ten uniform numbers in [0, 1): four tries of (area, aspect), then where the box lies. When no try fits, the
    largest centred box of an allowed aspect is taken.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, 8, 2):
        area = height * width * (scale[0] + draws[i] * (scale[1] - scale[0]))
        aspect = math.exp(log_low + draws[i + 1] * (log_high - log_low))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(draws[8] * (height - box_height + 1)), int(draws[9] * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width, box_height = max(1, min(width, round(height * aspect))), max(1, min(height, round(width / aspect)))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def resize(
    pixels: np.ndarray,
    height: int,
    width: int,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Antialiased resize: [h, w, 3] -> [height, width, 3], uint8; in `out` (contiguous) where it is given."""
    if pixels.shape[:2] == (height, width):
        if out is None:
            return pixels
        out[:] = pixels
        return out
    if pixels.strides != (3 * pixels.shape[1], 3, 1):
        # PyTorch would copy it too, with a team of threads for each loader thread.
        part = _scratch.take("resize", *pixels.shape)
        part[:] = pixels
        pixels = part
    if out is None:
        out = np.empty((height, width, 3), dtype=np.uint8)
    # The kernel behind torch.nn.functional.interpolate, which itself cannot write into given memory.
    _KERNELS[mode](_channels_last(pixels), (height, width), False, out=_channels_last(out))
    return out


def crop_and_resize(
    pixels: np.ndarray, box: Box, size: int, mode: str = "bicubic", out: np.ndarray | None = None
) -> np.ndarray:
    """The box of a picture at size x size."""
    return resize(pixels[box.top : box.top + box.height, box.left : box.left + box.width], size, size, mode, out)


def center_view(pixels: np.ndarray, size: int) -> np.ndarray:
    """The evaluation transform: shorter side to `size` (bicubic), then the centred size x size square."""
    height, width = pixels.shape[:2]
    longest = _MAX_ASPECT * min(height, width)
    if max(height, width) > longest:
        top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
        pixels = pixels[top : top + longest, left : left + longest]
        height, width = pixels.shape[:2]
    short, long = min(height, width), max(height, width)
    long = size * long // short
    height, width = (size, long) if height <= width else (long, size)
    pixels = resize(pixels, height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def _channels_last(pixels: np.ndarray) -> torch.Tensor:
    """[height, width, 3] -> a view [1, 3, height, width]."""
    # The batch dimension comes first: only then does PyTorch see channels-last strides, and keep them.
    return torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)


def _widened(box: Box, scale: int) -> Box:
    """A box of the picture as one of whole pixels of the picture divided by `scale`."""
    # Outwards: rounding each edge by itself could shift the whole view, and a shift costs more than a wider view.
    top, left = box.top // scale, box.left // scale
    bottom, right = -(-(box.top + box.height) // scale), -(-(box.left + box.width) // scale)
    return Box(top, left, bottom - top, right - left)


def _scale(height: int, width: int, min_size: int | None) -> int:
    """The largest of 1, 2, 4 and 8 whose division leaves the shorter side `min_size` pixels."""
    scale = 1
    while min_size is not None and scale < 8 and min(height, width) >= 2 * scale * min_size:
        scale *= 2
    return scale


def _decode_crop(
    data: bytes | memoryview, crop: Callable[[int, int], Box], min_size: int, max_pixels: int
) -> np.ndarray | None:
    """The crop of an upright JPEG at a fraction of its size, without the pixels around it, in this thread's memory.

    None where our own decoder is missing or leaves the file to libjpeg-turbo. Raises ImageError.
    """
    decoder = jpeg.decoder()
    if decoder is None or data[:3] != b"\xff\xd8\xff" or not decoder.open(data):
        return None
    _check_size(decoder.height, decoder.width, max_pixels)
    scale = _scale(decoder.height, decoder.width, min_size)
    if scale == 1 or (decoder.has_app1 and _jpeg_orientation(data) != 1):
        return None
    height, width = -(-decoder.height // scale), -(-decoder.width // scale)
    box = _widened(crop(height * scale, width * scale), scale)
    part = _scratch.take("resize", box.height, box.width, 3)
    return part if decoder.decode(scale, box.top, box.left, part) else None


def _decode_jpeg(data: bytes, max_pixels: int, min_size: int | None, shared: bool) -> tuple[np.ndarray, int] | None:
    """None when libjpeg-turbo does not take it: PIL has the last word."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width, max_pixels)
        if colorspace not in ("YCbCr", "RGB", "Gray", "GRAY"):
            return None
        scale = _scale(height, width, min_size)
        height, width = -(-height // scale), -(-width // scale)
        pixels = _scratch.take("decode", height, width, 3) if shared else np.empty((height, width, 3), dtype=np.uint8)
        decoder = jpeg.decoder() if scale > 1 else None
        if scale == 1:
            simplejpeg.decode_jpeg(data, "RGB", buffer=pixels)
        elif decoder is None or not decoder.open(data) or not decoder.decode(scale, 0, 0, pixels):
            # Without `fastdct`, whose 16-bit arithmetic the decoder in jpeg.c could not match on every processor.
            simplejpeg.decode_jpeg(data, "RGB", False, True, height, width, min_factor=scale, buffer=pixels)
    except (ValueError, KeyError):  # KeyError: it has no name for the sampling
        return None
    return _upright(pixels, _jpeg_orientation(data)), scale


def _decode_any(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(image.height, image.width, max_pixels)
            orientation = image.getexif().get(0x0112, 1)
            image.load()
            pixels = np.array(_to_rgb(image))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError("the image has too many pixels") from None
    except Exception as error:  # PIL's plugins raise what they like on broken files
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
        raise ImageError(f"the image cannot be decoded: {reason[:100] or type(error).__name__}") from None
    return _upright(pixels, orientation)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise ImageError(f"the image has {width} x {height} pixels, more than data.max_pixels ({max_pixels:,})")
    if height == 0 or width == 0:
        raise ImageError("the image has no pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        high = np.asarray(image).astype(np.int64) >> 8  # 16-bit grey: the high byte
        return Image.fromarray(high.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _jpeg_orientation(data: bytes) -> int:
    """EXIF's orientation, 1 (upright) to 8; 1 when there is none. Walks the segments before the image data."""
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        length = data[position + 2] << 8 | data[position + 3]
        if data[position + 1] == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            return _tiff_orientation(data[position + 10 : position + 2 + length])
        position += 2 + max(length, 2)
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 1
    directory = int.from_bytes(tiff[4:8], order)
    for entry in range(int.from_bytes(tiff[directory : directory + 2], order)):
        at = directory + 2 + 12 * entry
        if int.from_bytes(tiff[at : at + 2], order) == 0x0112:
            return int.from_bytes(tiff[at + 8 : at + 10], order)
    return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes EXIF's orientation (2-4 mirrored or turned, 5-8 with the axes swapped)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
