"""The bytes of local shards, by offset."""

import os
import threading
from collections import OrderedDict


class LocalStore:
    """Reads ranges of local files from any number of threads, with the files last used kept open.

    Ranges are read with pread: a memory map of a file that is cut short while it is read kills the process.
    """

    def __init__(self, max_open: int = 128):
        self._files: OrderedDict[str, object] = OrderedDict()
        self._max_open = max_open
        self._lock = threading.Lock()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer where the file ends. Raises OSError."""
        file = self._open(path)
        data = os.pread(file.fileno(), size, offset)
        while len(data) < size and (more := os.pread(file.fileno(), size - len(data), offset + len(data))):
            data += more
        return data

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def _open(self, path: str):
        with self._lock:
            file = self._files.get(path)
            if file is None:
                # A file leaves here unclosed: a thread may still read it, and the last reference closes it.
                file = self._files[path] = open(path, "rb", buffering=0)  # noqa: SIM115
                if len(self._files) > self._max_open:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return file
