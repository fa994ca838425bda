"""The compiled JPEG decoder beside simplejpeg: the same pixels, or nothing."""

import io
import random
import shutil
import subprocess
import threading

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from mmscale.data import images, jpeg

SCALES = (2, 4, 8)
SAMPLINGS = ("4:4:4", "4:2:2", "4:2:0", "grey")


@pytest.fixture(autouse=True)
def _built():
    if not jpeg.AVAILABLE:
        compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
        if compiler:
            pytest.fail(f"{compiler} is here, but mmscale/data/jpeg.c was not built: pip install -e .")
        pytest.skip("mmscale/data/jpeg.c was not built, and there is no compiler")


def ours(data: bytes, scale: int, box: images.Box | None = None, decoder: jpeg.Decoder | None = None):
    """The pixels, or None where the decoder leaves the file alone."""
    decoder = decoder or jpeg.decoder()
    if not decoder.open(data) or decoder.height * decoder.width > 1 << 20:
        return None
    box = box or images.Box(0, 0, -(-decoder.height // scale), -(-decoder.width // scale))
    out = np.full((box.height, box.width, 3), 77, dtype=np.uint8)
    return out if decoder.decode(scale, box.top, box.left, out) else None


def theirs(data: bytes, scale: int):
    """What simplejpeg makes of it, as mmscale.data.images calls it; None where it refuses."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        height, width = -(-height // scale), -(-width // scale)
        return simplejpeg.decode_jpeg(data, "RGB", False, True, height, width, min_factor=scale)
    except ValueError:
        return None


def assert_same(data: bytes, scales=SCALES, decoder: jpeg.Decoder | None = None):
    for scale in scales:
        pixels = ours(data, scale, decoder=decoder)
        assert pixels is not None, "a plain file was not taken"
        assert np.array_equal(pixels, theirs(data, scale))


def encoded(pixels: np.ndarray, sampling: str = "4:2:0", **options) -> bytes:
    image, file = Image.fromarray(pixels), io.BytesIO()
    if sampling == "grey":
        image.convert("L").save(file, "JPEG", **options)
    else:
        image.save(file, "JPEG", subsampling=sampling, **options)
    return file.getvalue()


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth, with some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return (smooth + rng.integers(-9, 10, (height, width, 3))).clip(0, 255).astype(np.uint8)


def drawing(height: int, width: int) -> np.ndarray:
    """Flat colours with hard edges: long runs of blocks that have nothing but a DC."""
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    rows, columns = np.ogrid[:height, :width]
    pixels[(rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (min(height, width) / 3) ** 2] = (250, 200, 20)
    pixels[height // 3 : height // 3 + 5, width // 3 : width // 3 + 7] = 0
    return pixels


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("optimize", [False, True])
def test_every_quality_gives_libjpegs_pixels(sampling, optimize):
    for quality in (1, 10, 30, 50, 75, 90, 95, 100):
        for pixels in (photo(72, 104, quality), drawing(72, 104)):
            assert_same(encoded(pixels, sampling, quality=quality, optimize=optimize))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_size_gives_libjpegs_pixels(sampling):
    for side in range(1, 71):
        assert_same(encoded(photo(side, 71 - side, side), sampling))
        assert_same(encoded(photo(side, side + 130, side), sampling), (2,))


def test_tiny_pictures_give_libjpegs_pixels_or_are_left_to_it():
    """TurboJPEG takes another scale where several round to the same size."""
    for height in range(1, 17):
        for width in range(1, 17):
            data = encoded(photo(height, width), SAMPLINGS[(height + width) % 4])
            for scale in SCALES:
                pixels = ours(data, scale)
                if pixels is None:
                    assert height < 8 and width < 8
                else:
                    assert np.array_equal(pixels, theirs(data, scale))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_restart_markers_give_libjpegs_pixels(sampling):
    for interval in (1, 2, 5, 8, 13, 1000):
        assert_same(encoded(photo(60, 90), sampling, restart_marker_blocks=interval))
    assert_same(encoded(photo(60, 90), sampling, restart_marker_rows=1))


def test_large_pictures_and_noise_give_libjpegs_pixels():
    """More of a scan than is held at a time, values of many bits, blocks whose 64th coefficient is not zero."""
    assert_same(encoded(photo(384, 512), quality=90))
    noise = np.random.default_rng(0).integers(40, 216, (150, 200, 3), dtype=np.uint8)
    for sampling in SAMPLINGS:
        assert_same(encoded(noise, sampling, quality=98), (2, 4))


@pytest.mark.parametrize("sampling", SAMPLINGS[:3])
def test_every_component_has_its_own_steps_and_tables(sampling):
    data = bytearray(encoded(photo(60, 90), sampling, quality=60))
    frame = data.index(b"\xff\xc0")
    assert data[frame + 12 : frame + 19 : 3] == bytes([0, 1, 1])
    data[frame + 18] = 0
    assert_same(bytes(data))


def test_a_file_without_jfif_is_taken_by_its_component_numbers():
    data = encoded(photo(40, 50))
    start, length = data.index(b"\xff\xe0"), 18
    assert_same(data[:start] + data[start + length :])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_part_is_that_part_of_the_whole(sampling):
    draw = random.Random(0)
    for scale in SCALES:
        data = encoded(photo(150, 210), sampling, restart_marker_rows=1)
        whole = theirs(data, scale)
        for _ in range(60):
            top, left = draw.randrange(whole.shape[0]), draw.randrange(whole.shape[1])
            box = images.Box(top, left, draw.randint(1, whole.shape[0] - top), draw.randint(1, whole.shape[1] - left))
            assert np.array_equal(ours(data, scale, box), whole[top : top + box.height, left : left + box.width])


def test_a_part_outside_the_picture_is_refused():
    data = encoded(photo(40, 60))
    for box in (images.Box(0, 0, 21, 30), images.Box(0, 0, 20, 31), images.Box(20, 0, 1, 30), images.Box(0, 31, 1, 1)):
        assert ours(data, 2, box) is None


def unusual() -> dict[str, bytes]:
    pixels = photo(40, 60)
    plain, restarts = encoded(pixels), encoded(pixels, restart_marker_blocks=2)
    cmyk = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG")
    coarse = [[300] * 64, [300] * 64]
    scan = plain.index(b"\xff\xda")
    return {
        "progressive": encoded(pixels, progressive=True),
        "CMYK": cmyk.getvalue(),
        "RGB": encoded(pixels, "4:4:4", keep_rgb=True),
        "4:1:1": simplejpeg.encode_jpeg(pixels, colorsubsampling="411"),
        "4:4:0": simplejpeg.encode_jpeg(pixels, colorsubsampling="440"),
        "steps of 16 bits": encoded(pixels, qtables=coarse),
        "no end": plain[:-2],
        "bytes before the end": plain[:-2] + b"\0\0" + plain[-2:],
        "a second scan": plain[:-2] + plain[scan:],
        "a wrong restart marker": restarts.replace(b"\xff\xd3", b"\xff\xd4", 1),
        "a restart marker too many": plain[: scan + 300] + b"\xff\xd0" + plain[scan + 300 :],
        "JFIF of another version": plain.replace(b"JFIF\0\1", b"JFIF\0\2", 1),
        "no Huffman tables": plain.replace(b"\xff\xc4", b"\xff\xfe"),
        "no steps": plain.replace(b"\xff\xdb", b"\xff\xfe"),
        "a frame header too long": plain.replace(b"\xff\xc0\0\x11", b"\xff\xc0\0\x12", 1).replace(
            b"\3\x11\1\xff", b"\3\x11\1\0\xff", 1
        ),
        "12 bits": plain.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
        "no picture": b"\xff\xd8\xff",
    }


@pytest.mark.parametrize("kind", unusual())
def test_what_is_unusual_or_damaged_is_left_to_libjpeg(kind):
    assert ours(unusual()[kind], 2) is None


def test_not_even_one_byte_too_many_is_taken():
    for width in range(20, 60):
        data = encoded(photo(24, width))
        assert ours(data[:-2] + b"\0" + data[-2:], 2) is None


def test_no_truncated_file_is_taken():
    data = encoded(photo(24, 40), restart_marker_blocks=3)
    assert_same(data)
    assert all(ours(data[:length], 2) is None for length in range(1, len(data)))


def test_values_that_no_picture_has_are_left_to_libjpeg():
    """Coefficients whose products overflow 16 bits: libjpeg-turbo's result depends on the processor there."""
    data = bytearray(encoded(photo(40, 60), quality=100))
    at = data.index(b"\xff\xdb") + 5
    data[at : at + 64] = bytes([255]) * 64
    assert theirs(bytes(data), 2) is not None
    assert ours(bytes(data), 2) is None and ours(bytes(data), 8) is None


def mutants(count: int, seed: int):
    """Files with one to a few faults each: flipped bits, cut or joined files, markers and bytes put in or left out."""
    draw = random.Random(seed)
    markers = [bytes([0xFF, code]) for code in (0, 0xC0, 0xC2, 0xC4, 0xD0, 0xD1, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xFE)]
    sources = [
        encoded(pixels, sampling, quality=quality, **options)
        for number, sampling in enumerate(SAMPLINGS)
        for pixels in (photo(33, 47, number), drawing(40, 70))
        for quality in (20, 75, 100)
        for options in ({}, {"optimize": True}, {"restart_marker_blocks": 1 + number})
    ]
    for _ in range(count):
        data = bytearray(draw.choice(sources))
        scan = data.index(b"\xff\xda")
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            at = draw.randrange(2, draw.choice((scan + 14, len(data)))) % len(data)
            match draw.randrange(8):
                case 0 | 1:
                    data[at] ^= 1 << draw.randrange(8)
                case 2:
                    data[at] = draw.choice((0, 1, 127, 128, 255))
                case 3:
                    data[at:at] = draw.choice(markers)
                case 4:
                    data[at : at + 2] = draw.choice(markers)
                case 5:
                    del data[at : at + draw.randint(1, 3)]
                case 6:
                    other = draw.choice(sources)
                    data[at:] = other[draw.randrange(len(other)) :]
                case 7:
                    del data[at:]
            if len(data) < 20:
                break
        yield bytes(data)


def test_of_damaged_files_none_is_taken_that_libjpeg_refuses_or_decodes_otherwise():
    taken = left = 0
    for number, data in enumerate(mutants(20_000, seed=0)):
        scale = SCALES[number % 3]
        pixels = ours(data, scale)
        if pixels is None:
            left += 1
        else:
            taken += 1
            assert np.array_equal(pixels, theirs(data, scale)), number
    assert taken > 1000 and left > 10_000  # both happen, or nothing is tested


def test_the_portable_version_gives_the_same_pixels(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no compiler")
    source, library = str(images.__file__).replace("images.py", "jpeg.c"), tmp_path / "portable.so"
    options = ["-std=c11", "-O1", "-DPORTABLE", "-fPIC", "-shared"]
    subprocess.run([compiler, *options, source, "-o", library], check=True)
    decoder = jpeg.Decoder(jpeg._load(library))
    for sampling in SAMPLINGS:
        for quality in (10, 75, 100):
            assert_same(encoded(photo(45, 300, quality), sampling, quality=quality), decoder=decoder)


def test_a_build_of_other_sources_is_not_used(monkeypatch, tmp_path):
    assert jpeg._load(jpeg._built()) is not None
    monkeypatch.setattr(jpeg, "INTERFACE", jpeg.INTERFACE + 1)
    assert jpeg._load(jpeg._built()) is None
    assert jpeg._load(None) is None
    (tmp_path / "broken.so").write_bytes(b"no library")
    assert jpeg._load(tmp_path / "broken.so") is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_training_view_is_the_same_without_the_decoder(monkeypatch, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(140, 200), exif=exif)
    boxes = (
        images.Box(0, 0, 139, 139),
        images.Box(13, 1, 101, 99),
        images.Box(7, 5, 64, 128),
        images.Box(0, 0, 128, 128),
    )

    def views():
        return [
            images.training_view(memoryview(data), lambda *_, box=box: box, 64, 1 << 20, fast=True) for box in boxes
        ]

    with_decoder = views()
    monkeypatch.setattr(jpeg, "decoder", lambda: None)
    assert all(np.array_equal(a, b) for a, b in zip(with_decoder, views(), strict=True))


def test_the_fast_training_view_uses_the_decoder(monkeypatch):
    """Else every other test of it would pass without."""
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (encoded(photo(140, 200)), encoded(photo(140, 200), exif=exif)):
        images.training_view(data, lambda *_: images.Box(0, 0, 100, 100), 64, 1 << 20, fast=True)


def test_a_damaged_picture_is_refused_as_without_the_decoder(monkeypatch):
    data = encoded(photo(140, 200))
    reasons = []
    for _ in range(2):
        for damaged in (data[:3000], data[:-2] + b"\xff"):
            with pytest.raises(images.ImageError) as caught:
                images.training_view(damaged, lambda *_: images.Box(0, 0, 50, 50), 64, 1 << 20, fast=True)
            reasons.append(str(caught.value))
        with pytest.raises(images.ImageError, match="more than data"):
            images.training_view(data, lambda *_: images.Box(0, 0, 50, 50), 64, 1000, fast=True)
        monkeypatch.setattr(jpeg, "decoder", lambda: None)
    assert reasons[:2] == reasons[2:]


def test_threads_do_not_disturb_each_other():
    files = [encoded(photo(90, 120, seed), SAMPLINGS[seed % 4], optimize=seed % 2 == 0) for seed in range(8)]
    expected = [theirs(data, 2) for data in files]
    wrong = []

    def run(offset: int) -> None:
        for turn in range(60):
            number = (offset + turn) % len(files)
            if not np.array_equal(ours(files[number], 2), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
