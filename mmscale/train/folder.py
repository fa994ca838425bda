"""What a run leaves in its folder besides checkpoints, and how a second call goes on with it."""

import errno
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmscale.checkpoint import FOLDER, write_whole
from mmscale.config import Config
from mmscale.errors import UserError


class JsonLines:
    """A file of one JSON object a line. Lines that do not fit on the disk are kept until they do: training goes on."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []

    def append(self, record: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        size = os.fstat(self._file.fileno()).st_size
        try:
            for line in list(self._waiting):
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                size += len(line)
                self._waiting.pop(0)
        except OSError as error:
            self._file.truncate(size)  # no half lines
            print(f"{self._path}: {error.strerror}; {len(self._waiting)} lines wait in memory", file=sys.stderr)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


# Keys of the sections that may not change whose change does not change the run.
FREE = {
    "data": {
        *("train", "sources", "val", "counts", "workers", "max_bad_fraction", "slow_sample_s", "allow_change"),
        *("allow_pipe", "index_dir", "cache_dir", "cache_gib"),
    },
    "model": {"checkpoint", "compile", "init_from", "vision.init_from"},
}


class RunFolder:
    """`run.dir`: config.yaml, status.json, and metrics, evaluations, examples, events and bad_samples as .jsonl.

    Every rank holds one; only rank 0 (`writes`) touches the files. All lines carry `samples`, so that those past a
    checkpoint can be cut when the run goes on from it.
    """

    def __init__(self, path: str | Path, writes: bool):
        self.path = Path(path)
        self.checkpoints = self.path / FOLDER
        self.writes = writes
        self._files: dict[str, JsonLines] = {}

    def create(self) -> None:
        """Raises UserError when the folder cannot be made or written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir: {self.path}: {error.strerror}") from None

    def check_shared(self, processes: Any, patience_s: float = 30.0) -> None:
        """Raises UserError, on all ranks, when what rank 0 writes here cannot be read by another one."""
        nonce = processes.broadcast(uuid.uuid4().hex)
        file = self.path / ".nonce"
        if self.writes:
            write_whole(file, nonce, replace=True)
        deadline = time.monotonic() + patience_s  # network file systems take a while to show what others wrote
        while (found := _read_text(file)) != nonce and time.monotonic() < deadline:
            time.sleep(0.1)
        blind = [host for host in processes.gather(None if found == nonce else processes.host) if host is not None]
        if blind:
            processes.refuse(
                f"run.dir: {self.path} is not the same folder on every machine ({', '.join(sorted(set(blind)))}); "
                f"put it on a file system that all of them share"
            )

    def write_config(self, config: Config) -> None:
        if self.writes:
            write_whole(self.path / "config.yaml", config.dump(), replace=True)

    def write_status(self, status: str, samples: int, step: int, reason: str = "", *, any_rank: bool = False) -> None:
        """`running`, `finished`, `preempted`, `refused`, `stopped` (a guard) or `failed`: what scripts read."""
        if (self.writes or any_rank) and self.path.is_dir():
            facts = {"status": status, "samples": samples, "step": step, "reason": reason, "time": time.time()}
            try:
                write_whole(self.path / "status.json", json.dumps(facts) + "\n", replace=True)
            except OSError as error:  # a full disk is no reason to end a run, nor to hide what has ended it
                print(f"{self.path / 'status.json'}: {error.strerror}; it should say: {facts}", file=sys.stderr)

    def append(self, name: str, record: dict[str, Any]) -> None:
        """One more line of a .jsonl file, at once visible to readers."""
        if not self.writes:
            return
        if name not in self._files:
            self._files[name] = JsonLines(self.path / name)
        self._files[name].append(record)

    def event(self, kind: str, step: int, samples: int, **facts: Any) -> None:
        """What happened besides training: a resume, a save, a signal, a skipped update."""
        self.append("events.jsonl", {"event": kind, "step": step, "samples": samples, "time": time.time(), **facts})

    def evaluations(self, samples: int) -> list[dict[str, Any]]:
        """The lines of evaluations.jsonl up to a number of samples."""
        text = _read_text(self.path / "evaluations.jsonl") or ""
        lines = []
        for line in text.splitlines():
            with suppress(json.JSONDecodeError):  # the last line of a killed run
                lines.append(json.loads(line))
        return [line for line in lines if line["samples"] <= samples]

    def sync(self) -> None:
        """Puts the lines on disk; a checkpoint that is committed after this never lacks the lines before it."""
        for file in self._files.values():
            file.sync()

    def cut(self, samples: int) -> None:
        """Drops the lines past a checkpoint: those updates will be made, and logged, once more."""
        if self.writes:
            for name in ("metrics.jsonl", "evaluations.jsonl", "examples.jsonl"):
                _keep_lines(self.path / name, lambda line: line["samples"] <= samples)
            _keep_lines(self.path / "bad_samples.jsonl", lambda line: line["position"] < samples)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # the last line of a killed run
        if text.endswith("\n") and keep(line):
            kept.append(text)
    write_whole(path, "".join(kept), replace=True)


def compare_configs(before: dict[str, Any], now: Config) -> list[str]:
    """The settings that changed since the checkpoint, as `key: old -> new`.

    Raises UserError for one that may not: the model, the tokenizer, the seed and the data are what the run is. Shards
    and tokenizer may have moved; whether they are the same is seen from their fingerprints.
    """
    with suppress(ValueError):  # settings that are newer than the checkpoint stood at their defaults then
        before = type(now).model_validate(before).model_dump(mode="json")
    old, new = flatten(before), flatten(now.model_dump(mode="json"))
    changes = []
    for key in sorted(old.keys() | new.keys()):
        was, value = old.get(key), new.get(key)
        if was == value or key == "run.dir":
            continue
        section, _, rest = key.partition(".")
        fixed = key == "run.seed" or (section in ("data", "model") and rest not in FREE[section])
        if fixed:
            raise UserError(
                f"{key}: {was} in the checkpoint, {value} now; it cannot change within a run. Set it back, or start a "
                f"new run with another run.dir (model.init_from takes the weights over)"
            )
        changes.append(f"{key}: {was} -> {value}")
    return changes


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
