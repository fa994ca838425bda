"""The checkpoint format: named tensors in fragments, and a manifest that makes them a checkpoint.

    run.dir/checkpoints/step_00000100/rank_00000.safetensors   what rank 0 held: flat fragments of tensors
                                      rank_00000.json          its size and checksum, and which fragments they are
                                      tokenizer.model          so that the folder stands alone
                                      manifest.json            written last: this file is the commit
    run.dir/checkpoints/latest                                 the newest folder's name, for people and scripts

A tensor is known by its kind (`param`, `exp_avg`, `exp_avg_sq`, ...) and the name that the bare model gives it. A
fragment is the run [start, stop) of its flattened elements, so that a checkpoint looks the same whatever the number of
ranks or the ZeRO stage that wrote it, and can be read by any other. Nothing here knows DeepSpeed, and nothing is ever
unpickled.

A folder without `manifest.json` is not a checkpoint. There is no rename to rely on, so this also holds on NFS and on
mounted object stores.
"""

import json
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mmscale.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
TOKENIZER = "tokenizer.model"
FOLDER = "checkpoints"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Fragment:
    """A run of a tensor's flattened elements: `data` is [stop - start], of a tensor whose whole shape is `shape`."""

    kind: str
    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    data: Tensor

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"


# --- writing ------------------------------------------------------------------------------------------------------


def write_fragments(folder: Path, rank: int, fragments: Sequence[Fragment], nonce: str) -> None:
    """Writes one rank's fragments, synced to disk, and then the file that says that they are complete.

    `nonce` names this attempt at saving: what an earlier, killed attempt left in the folder is never taken for it.
    Raises OSError (a full disk, a lost mount).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank:05d}.safetensors"
    size, checksum = _write_safetensors(path, {fragment.key: fragment.data for fragment in fragments})
    entries = [
        {"kind": f.kind, "name": f.name, "shape": list(f.shape), "start": f.start, "stop": f.stop} for f in fragments
    ]
    record = {"nonce": nonce, "file": path.name, "bytes": size, "crc32": checksum, "fragments": entries}
    write_whole(path.with_suffix(".json"), json.dumps(record))


def commit(
    folder: Path,
    world_size: int,
    nonce: str,
    facts: dict[str, Any],
    *,
    tokenizer: Path | None = None,
    abandoned: Callable[[], bool] = lambda: False,
    timeout_s: float = 1800.0,
) -> bool:
    """Waits for every rank's fragments, writes the manifest, and points `latest` at the folder. Rank 0 calls this.

    `facts` (step, samples, configuration, ...) goes into the manifest as it is. Returns False, with nothing committed,
    once `abandoned()` says that another rank's part failed. Raises TimeoutError naming the ranks that were waited for.
    """
    records = []
    deadline = time.monotonic() + timeout_s
    for rank in range(world_size):
        while (record := _read_record(folder / f"rank_{rank:05d}.json", nonce)) is None:
            if abandoned():
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"{folder}: rank {rank} has not written its part within {timeout_s:.0f} s")
            time.sleep(0.02)
        records.append(record)
    files = {record["file"]: {"bytes": record["bytes"], "crc32": record["crc32"]} for record in records}
    if tokenizer is not None:
        content = tokenizer.read_bytes()
        write_whole(folder / TOKENIZER, content)
        files[TOKENIZER] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    manifest = {"format": FORMAT, **facts, "files": files, "tensors": _tensor_table(records)}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))
    write_whole(folder.parent / LATEST, folder.name + "\n", replace=True)
    return True


def _tensor_table(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """kind -> name -> {shape, fragments: [[file, start, stop], ...]}; every element exactly once."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        for entry in record["fragments"]:
            tensor = table.setdefault(entry["kind"], {}).setdefault(
                entry["name"], {"shape": entry["shape"], "fragments": []}
            )
            assert tensor["shape"] == entry["shape"], entry
            tensor["fragments"].append([record["file"], entry["start"], entry["stop"]])
    for kind, tensors in table.items():
        for name, tensor in tensors.items():
            tensor["fragments"].sort(key=lambda fragment: fragment[1:])
            end = 0
            for _, start, stop in tensor["fragments"]:
                assert start == end, f"{kind}/{name}: elements {end} to {start} are missing or written twice"
                end = stop
            assert end == _numel(tensor["shape"]), f"{kind}/{name}: elements from {end} on are missing"
    return table


def _read_record(path: Path, nonce: str) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if record.get("nonce") == nonce else None


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Writes https://github.com/huggingface/safetensors#format tensor by tensor; returns (bytes, crc32).

    The library's own writer first builds the whole file in memory, and neither syncs nor sums it.
    """
    header, end = {}, 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    size, checksum = 0, 0
    with path.open("wb") as file:
        for chunk in _chunks(struct.pack("<Q", len(encoded)) + encoded, tensors.values()):
            file.write(chunk)
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
        file.flush()
        os.fsync(file.fileno())
    return size, checksum


def _chunks(head: bytes, tensors: Iterable[Tensor]) -> Iterable[bytes | memoryview]:
    yield head
    for tensor in tensors:
        if tensor.numel():
            flat = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            # Pieces keep the checksum in the processor's cache and let other threads in between.
            yield from (flat[i : i + (1 << 22)] for i in range(0, len(flat), 1 << 22))


def write_whole(path: Path, content: str | bytes, *, replace: bool = False) -> None:
    """Writes a small file and syncs it and its folder; with `replace`, readers see the old content or the new one."""
    target = path.with_name(f".{path.name}.tmp") if replace else path
    with target.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    if replace:
        target.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # mounted object stores know no folders
    finally:
        os.close(descriptor)


# --- finding ------------------------------------------------------------------------------------------------------


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def committed(checkpoints: Path) -> list[Path]:
    """The folders that hold a manifest, oldest first."""
    return sorted(path.parent for path in checkpoints.glob(f"step_*/{MANIFEST}"))


def find_checkpoint(path: str | Path, *, warn: Callable[[str], None] = lambda message: None) -> Path:
    """The checkpoint of a run folder to use, or the checkpoint folder itself when `path` is one.

    That is the one that the run chose as its best, where it chooses, else the newest whole one.
    A damaged one is named to `warn` and the one before it is taken. Raises UserError when `path` itself is a damaged
    checkpoint, or when there is no whole one.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        if damage := find_damage(path):
            raise UserError(f"{path}: damaged checkpoint: {damage}")
        return path
    checkpoints = path / FOLDER if (path / FOLDER).is_dir() else path
    for folder in _by_preference(checkpoints):
        damage = find_damage(folder)
        if damage is None:
            return folder
        warn(f"{folder}: damaged checkpoint, not used: {damage}")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    if path.name.startswith("step_"):
        raise UserError(f"{path}: an unfinished checkpoint, without {MANIFEST}")
    raise UserError(f"{path}: holds no whole checkpoint (looked for {checkpoints}/step_*/{MANIFEST})")


def _by_preference(checkpoints: Path) -> list[Path]:
    folders = committed(checkpoints)[::-1]
    try:
        best = (checkpoints / BEST).read_text().strip()
    except OSError:
        return folders
    return sorted(folders, key=lambda folder: folder.name != best)


def find_damage(folder: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Why a committed folder cannot be used, or None. Reads every byte.

    With `share` = (rank, world size), this rank sums only its part of the files; all look at manifest and sizes.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = sorted(manifest["files"].items())
        if manifest["format"] > FORMAT:
            return f"written by a newer version of mmscale (format {manifest['format']})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, facts in files:
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if size != facts["bytes"]:
            return f"{name} has {size} bytes instead of {facts['bytes']}"
    rank, world_size = share
    for name, facts in files[rank::world_size]:
        try:
            if _checksum(folder / name) != facts["crc32"]:
                return f"{name}: its checksum is wrong"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def remove_old(checkpoints: Path, keep_last: int, keep_every: int | None = None, best: int | None = None) -> list[Path]:
    """Removes what the keep policy does not cover, and returns it; call it after a commit, so that one whole remains.

    The newest `keep_last` stay, and of the older ones that of step `best` and the first at or past each multiple of
    `keep_every` samples.
    Leftovers of saves that were never committed go too, unless they are newer than the newest checkpoint.
    """
    whole = committed(checkpoints)
    keep = set(whole[-max(1, keep_last) :])
    if best is not None:
        keep.add(checkpoints / folder_name(best))
    if keep_every is not None:
        marks = set()
        for folder in whole:
            mark = json.loads((folder / MANIFEST).read_text())["samples"] // keep_every
            if mark and mark not in marks:
                marks.add(mark)
                keep.add(folder)
    newest = whole[-1] if whole else None
    removed = [
        folder
        for folder in sorted(checkpoints.glob("step_*"))
        if folder not in keep and newest is not None and folder < newest
    ]
    for folder in removed:
        (folder / MANIFEST).unlink(missing_ok=True)  # first it stops being a checkpoint, then it goes
        shutil.rmtree(folder, ignore_errors=True)
    return removed


# --- reading ------------------------------------------------------------------------------------------------------


class Checkpoint:
    """A committed checkpoint, read tensor by tensor; only the asked-for elements are ever in memory."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self._files: dict[str, Any] = {}

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """A checkpoint folder, or the newest whole one of a run folder. Raises UserError as `find_checkpoint` does."""
        folder = find_checkpoint(path)
        return cls(folder, json.loads((folder / MANIFEST).read_text()))

    @classmethod
    def open_verified(cls, folder: Path) -> "Checkpoint":
        """A folder that `find_damage` has just cleared, not read through again."""
        return cls(folder, json.loads((folder / MANIFEST).read_text()))

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def samples(self) -> int:
        return self.manifest["samples"]

    @property
    def config(self) -> dict[str, Any]:
        """The run's resolved configuration."""
        return self.manifest["config"]

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    def names(self, kind: str = "param") -> list[str]:
        return list(self.manifest["tensors"].get(kind, {}))

    def has(self, name: str, kind: str = "param") -> bool:
        return name in self.manifest["tensors"].get(kind, {})

    def shape(self, name: str, kind: str = "param") -> tuple[int, ...]:
        return tuple(self._entry(name, kind)["shape"])

    def read(self, name: str, kind: str = "param", start: int | None = None, stop: int | None = None) -> Tensor:
        """A whole tensor in its shape, or the flat run [start, stop) of its elements as [stop - start].

        Raises UserError when the checkpoint has no such tensor.
        """
        entry = self._entry(name, kind)
        shape = entry["shape"]
        whole = start is None and stop is None
        start, stop = start or 0, _numel(shape) if stop is None else stop
        pieces = []
        for file, piece_start, piece_stop in entry["fragments"]:
            low, high = max(start, piece_start), min(stop, piece_stop)
            if low < high:
                view = self._file(file).get_slice(f"{kind}/{name}")
                pieces.append(view[low - piece_start : high - piece_start])
        if not pieces:
            file = entry["fragments"][0][0]
            pieces = [self._file(file).get_slice(f"{kind}/{name}")[0:0]]
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        assert flat.numel() == stop - start
        return flat.reshape(shape) if whole else flat

    def _entry(self, name: str, kind: str) -> dict[str, Any]:
        try:
            return self.manifest["tensors"][kind][name]
        except KeyError:
            raise UserError(f"{self.path}: holds no {kind} `{name}`") from None

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.path / name, framework="pt")
        return self._files[name]


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
