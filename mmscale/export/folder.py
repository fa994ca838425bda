"""An output folder that is whole or is not there, and weights that are written without being held in memory."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmscale.errors import UserError

SHARD_BYTES = 5 * 10**9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PIECE = 1 << 24


@contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends well, and vanishes otherwise.

    Raises:
        UserError: `out` exists and is not empty, or cannot be written (a full disk, missing rights).
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: already exists and is not an empty folder; choose another, or remove it")
    partial = out.absolute().parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        partial.replace(out)
        _sync(out.absolute().parent)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class Entry:
    """A tensor that is yet to be read: its shape, and the function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()


def write_weights(
    folder: Path, tensors: Mapping[str, Entry], dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> int:
    """Writes `model.safetensors`, or numbered parts with an index when it would be larger than `shard_bytes`.

    One tensor is in memory at a time. The layout is that of `PreTrainedModel.save_pretrained`.

    Returns:
        The bytes of all tensors together.
    """
    width = torch.empty(0, dtype=dtype).element_size()
    shards: list[dict[str, Entry]] = [{}]
    filled = total = 0
    for name, entry in tensors.items():
        size = entry.num_elements * width
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += size
        total += size
    if len(shards) == 1:
        _write_safetensors(folder / "model.safetensors", shards[0], dtype)
        return total
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / file, shard, dtype)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _write_safetensors(path: Path, tensors: Mapping[str, Entry], dtype: torch.dtype) -> None:
    """Writes https://github.com/huggingface/safetensors#format tensor by tensor."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in tensors.items():
        size = entry.num_elements * torch.empty(0, dtype=dtype).element_size()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(entry.shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for entry in tensors.values():
            data = entry.read().detach().to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(data), _PIECE):
                file.write(memoryview(data[start : start + _PIECE]))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
