"""The compiled decoder of jpeg.c: common JPEGs at 1/2, 1/4 or 1/8 of their size, at two thirds of libjpeg-turbo's cost.

It gives libjpeg-turbo's pixels to the last bit and leaves to it whatever is not a plain, sound file. Where there was no
compiler when mmscale was installed, it is missing, which costs nothing but time: see `AVAILABLE`.
"""

import ctypes
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

INTERFACE = 1  # jpeg.c's: one that was built from other sources than these is not used
_ALIGNMENT = 64


def _load() -> ctypes.CDLL | None:
    folder = Path(__file__).parent
    path = next((p for suffix in EXTENSION_SUFFIXES if (p := folder / f"_jpeg{suffix}").exists()), None)
    try:
        library = ctypes.CDLL(str(path)) if path else None
        if library is None or library.mmscale_jpeg_interface() != INTERFACE:
            return None
    except (OSError, AttributeError):  # built for another machine, or something else by that name
        return None
    size, number, pointer = ctypes.c_size_t, ctypes.c_uint, ctypes.c_void_p
    library.mmscale_jpeg_decoder_size.restype = size
    library.mmscale_jpeg_open.argtypes = (pointer, pointer, size, pointer)
    library.mmscale_jpeg_open.restype = ctypes.c_bool
    library.mmscale_jpeg_decode.argtypes = (pointer, pointer, size, *5 * (number,), pointer)
    library.mmscale_jpeg_decode.restype = ctypes.c_bool
    return library


_library = _load()
AVAILABLE = _library is not None


class Decoder:
    """Decodes one file after another, in one thread.

    Attributes (after `open`):
        height, width: pixels of the whole picture as stored, before EXIF's orientation.
        has_app1: there is a segment that may hold EXIF.
    """

    def __init__(self):
        memory = np.zeros(_library.mmscale_jpeg_decoder_size() + _ALIGNMENT, dtype=np.uint8)
        self._memory = memory[-memory.ctypes.data % _ALIGNMENT :]
        self._address = self._memory.ctypes.data
        self._facts = (ctypes.c_uint * 3)()
        self._data: np.ndarray | None = None

    def open(self, data: bytes | memoryview) -> bool:
        """False for what libjpeg-turbo has to judge."""
        self._data = np.frombuffer(data, dtype=np.uint8)
        if not _library.mmscale_jpeg_open(self._address, self._data.ctypes.data, self._data.size, self._facts):
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
        return _library.mmscale_jpeg_decode(
            self._address, data.ctypes.data, data.size, scale, top, left, height, width, out.ctypes.data
        )


_threads = threading.local()


def decoder() -> Decoder | None:
    """This thread's decoder; None where it was not built."""
    if _library is None:
        return None
    if not hasattr(_threads, "decoder"):
        _threads.decoder = Decoder()
    return _threads.decoder
