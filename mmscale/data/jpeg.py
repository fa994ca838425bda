"""The compiled decoder of jpeg.c: common JPEGs at 1/2, 1/4 or 1/8 of their size, a third cheaper than libjpeg-turbo.

It gives libjpeg-turbo's pixels to the last bit, and leaves to it whatever is not a plain and sound file. Without a
compiler when mmscale is installed it is missing, which costs time and nothing else: see `AVAILABLE`.
"""

import ctypes
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

INTERFACE = 1  # of jpeg.c
MISSING = (
    "data.decode: fast costs a third more CPU time here, for the same pixels, since mmscale/data/jpeg.c was not built: "
    "install mmscale again where there is GCC or clang"
)
_ALIGNMENT = 64


def _load(path: Path | None) -> ctypes.CDLL | None:
    """None for what cannot be loaded (built for another machine), or comes from other sources than these."""
    try:
        library = ctypes.CDLL(str(path)) if path else None
        if library is None or library.mmscale_jpeg_interface() != INTERFACE:
            return None
    except (OSError, AttributeError):
        return None
    size, number, pointer = ctypes.c_size_t, ctypes.c_uint, ctypes.c_void_p
    library.mmscale_jpeg_decoder_size.restype = size
    library.mmscale_jpeg_open.argtypes = (pointer, pointer, size, pointer)
    library.mmscale_jpeg_open.restype = ctypes.c_bool
    library.mmscale_jpeg_decode.argtypes = (pointer, pointer, size, *5 * (number,), pointer)
    library.mmscale_jpeg_decode.restype = ctypes.c_bool
    return library


def _built() -> Path | None:
    paths = [Path(__file__).with_name(f"_jpeg{suffix}") for suffix in EXTENSION_SUFFIXES]
    return next((path for path in paths if path.exists()), None)


_library = _load(_built())
AVAILABLE = _library is not None


class Decoder:
    """Decodes one file after another, in one thread.

    Attributes (after `open`):
        height, width: pixels of the whole picture as stored, before EXIF's orientation.
        has_app1: there is a segment that may hold EXIF.
    """

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        memory = np.zeros(library.mmscale_jpeg_decoder_size() + _ALIGNMENT, dtype=np.uint8)
        self._memory = memory[-memory.ctypes.data % _ALIGNMENT :]
        self._address = self._memory.ctypes.data
        self._facts = (ctypes.c_uint * 3)()
        self._data: np.ndarray | None = None

    def open(self, data: bytes | memoryview) -> bool:
        """False for what libjpeg-turbo has to judge."""
        self._data = np.frombuffer(data, dtype=np.uint8)
        if not self._library.mmscale_jpeg_open(self._address, self._data.ctypes.data, self._data.size, self._facts):
            return False
        self.height, self.width, self.has_app1 = self._facts[0], self._facts[1], bool(self._facts[2])
        return True

    def decode(self, scale: int, top: int, left: int, out: np.ndarray) -> bool:
        """Writes a part of the picture that was opened last.

        The whole file is read and checked, whatever the part.

        Args:
            scale: 2, 4 or 8: what height and width are divided by, rounded up.
            top, left: where the part begins, in pixels of the scaled picture.
            out: [height, width, 3], uint8, contiguous: the part, RGB.

        Returns:
            False for what libjpeg-turbo has to judge; `out` then holds anything.
        """
        assert out.flags.c_contiguous and out.dtype == np.uint8 and out.shape[2] == 3
        height, width = out.shape[:2]
        data = self._data
        return self._library.mmscale_jpeg_decode(
            self._address, data.ctypes.data, data.size, scale, top, left, height, width, out.ctypes.data
        )


_threads = threading.local()


def decoder() -> Decoder | None:
    """This thread's decoder; None where it was not built."""
    if _library is None:
        return None
    if not hasattr(_threads, "decoder"):
        _threads.decoder = Decoder(_library)
    return _threads.decoder
