"""Memory for batches of pixels that is used again: fresh pages cost more to map than a small picture costs to copy."""

import threading
import weakref

import numpy as np
import torch
from torch import Tensor


class PixelBuffers:
    """Hands out uint8 tensors whose memory comes back when the last tensor that shares it is gone.

    On a machine with GPUs they are pinned, and PyTorch's own allocator uses their memory again: it knows when a copy to
    the device has ended.
    """

    def __init__(self, most_kept: int = 16):
        self._free: dict[tuple[int, ...], list[np.ndarray]] = {}
        self._most_kept = most_kept
        self._lock = threading.RLock()  # a collection of garbage within take() may give memory back

    def take(self, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape."""
        if torch.cuda.is_available():
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        with self._lock:
            kept = self._free.get(shape)
            memory = kept.pop() if kept else None
        if memory is None:
            memory = np.empty(shape, dtype=np.uint8)
        lent = memory[:]
        # PyTorch holds on to the array that a tensor was made from, and so does every view of that tensor.
        weakref.finalize(lent, self._take_back, memory).atexit = False
        return torch.from_numpy(lent)

    def _take_back(self, memory: np.ndarray) -> None:
        with self._lock:
            kept = self._free.setdefault(memory.shape, [])
            if len(kept) < self._most_kept:
                kept.append(memory)
