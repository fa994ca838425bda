import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from shard_files import bomb, picture

from mmscale.data import images

MAX = 1 << 24


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(width=96, height=64) -> Image.Image:
    coarse = np.random.default_rng(3).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def psnr(a, b) -> float:
    error = np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-12))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_formats_decode_as_pil_does(kind):
    data = encoded(smooth(), kind)
    assert psnr(images.decode(data, MAX), Image.open(io.BytesIO(data)).convert("RGB")) > 50


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(), kind, exif=exif)
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    pixels = images.decode(data, MAX)
    assert pixels.shape[:2] == (upright.height, upright.width)
    assert psnr(pixels, upright) > 50


def test_alpha_is_laid_over_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    pixels = images.decode(encoded(image, "PNG"), MAX)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[0, 1].tolist() == [127, 127, 127]
    assert pixels[3, 3].tolist() == [255, 255, 255]


def test_palette_with_transparency_is_laid_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    pixels = images.decode(encoded(image, "PNG", transparency=0), MAX)
    assert pixels[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_grey_sixteen_bit_and_cmyk_become_rgb():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    deep = images.decode(encoded(Image.fromarray(ramp), "PNG"), MAX)
    assert np.array_equal(deep[..., 0], ramp >> 8) and deep.shape == (8, 8, 3)
    assert images.decode(encoded(smooth().convert("L"), "JPEG"), MAX).shape == (64, 96, 3)
    cmyk = encoded(smooth().convert("CMYK"), "JPEG")
    assert psnr(images.decode(cmyk, MAX), Image.open(io.BytesIO(cmyk)).convert("RGB")) > 50


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"\xff\xd8\xff", "cannot be decoded"),
        (b"GIF89a", "cannot be decoded"),
        (b"plain text, no picture", "not an image"),
        (picture(1)[:400], "cannot be decoded"),
        (encoded(smooth(), "PNG")[:300], "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_what_is_no_whole_image_is_refused_with_a_reason(data, reason):
    with pytest.raises(images.ImageError, match=reason):
        images.decode(data, MAX)


def test_a_jpeg_of_a_sampling_that_simplejpeg_cannot_name_is_decoded():
    data = simplejpeg.encode_jpeg(np.full((32, 32, 3), (200, 100, 50), dtype=np.uint8), colorsubsampling="411")
    frame = data.index(b"\xff\xc0") + 11
    assert data[frame] == 0x41
    tall = data[:frame] + b"\x14" + data[frame + 1 :]  # 4:4:1: as many blocks in as many MCUs, above each other
    for fast in (False, True):
        view = images.training_view(tall, lambda *_: images.Box(0, 0, 32, 32), 16, MAX, fast)
        assert np.abs(view.astype(int) - (200, 100, 50)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_bomb_is_refused_by_its_header(kind):
    with pytest.raises(images.ImageError, match="pixels"):
        images.decode(bomb(kind), 100_000_000)


def test_resize_agrees_with_pil_bicubic():
    for size, box in [((224, 224), None), ((40, 72), (10, 20, 300, 150))]:
        image = smooth(512, 384)
        part = image.crop(box) if box else image
        expected = part.resize(size[::-1], Image.Resampling.BICUBIC)
        assert psnr(images.resize(np.asarray(part).copy(), *size), expected) > 45


def test_the_fast_decode_is_close_to_pil_on_the_same_crop():
    data = encoded(smooth(512, 384), "JPEG", quality=90)
    assert images.decode_scaled(data, MAX, min_size=168)[0].shape == (192, 256, 3)
    expected = (
        Image.fromarray(images.decode(data, MAX)).crop((20, 10, 380, 370)).resize((224, 224), Image.Resampling.BICUBIC)
    )
    for fast, least in ((False, 45), (True, 35)):
        view = images.training_view(data, lambda *_: images.Box(10, 20, 360, 360), 224, MAX, fast)
        assert psnr(view, expected) > least


def test_a_line_of_pixels_that_is_mirrored_is_resized_too():
    rng = np.random.default_rng(0)
    for shape in ((1, 30, 3), (30, 1, 3)):
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        for turned in (pixels[::-1], pixels[:, ::-1], pixels.transpose(1, 0, 2)[::-1]):
            assert np.array_equal(images.resize(turned, 8, 8), images.resize(turned.copy(), 8, 8))


@pytest.mark.parametrize("shape", [(480, 640), (640, 480), (37, 500), (224, 224), (1, 3000), (5, 4)])
def test_center_view_is_square_and_central(shape):
    pixels = np.zeros((*shape, 3), dtype=np.uint8)
    pixels[shape[0] // 2, shape[1] // 2] = 255
    view = images.center_view(pixels, 64)
    assert view.shape == (64, 64, 3)
    if max(shape) < 1000:
        row, column = np.unravel_index(view[..., 0].argmax(), (64, 64))
        # The middle pixel ends up in the middle, within the size that one pixel of the original has.
        assert max(abs(row - 32), abs(column - 32)) <= 1 + 64 / min(shape)


def test_training_crops_keep_their_area_and_aspect_and_lie_inside():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width = rng.integers(1, 900, 2).tolist()
        box = images.training_crop(height, width, (0.4, 1.0), (0.75, 4 / 3), rng.random(16).tolist())
        assert box.top >= 0 and box.top + box.height <= height and box.left >= 0 and box.left + box.width <= width
        assert box.height > 0 and box.width > 0
        if min(height, width) > 100 and max(height, width) < 2 * min(height, width):
            assert 0.74 < box.width / box.height < 1.35
            assert box.height * box.width >= 0.39 * height * width
    whole = images.training_crop(300, 300, (1.0, 1.0), (1.0, 1.0), [0.5] * 16)
    assert whole == images.Box(0, 0, 300, 300)
