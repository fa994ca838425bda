"""The numbers of a run: measured without waiting for the device, written to files, the terminal and wandb."""

import math
import os
import resource
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmscale.config import LogConfig
from mmscale.train.folder import RunFolder
from mmscale.train.guards import Exchange

GIB = 2**30

# Dense bf16 throughput of one device, FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "V100": 125e12}


@dataclass
class Meter:
    """Counts what happened since the last line. Pauses (evaluation, saving) are kept apart from training time."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    wait_s: float = 0.0
    slowest_wait: tuple[float, int] = (0.0, 0)
    pauses: dict[str, float] = field(default_factory=dict)

    def add(self, samples: int, seen: Exchange) -> None:
        self.steps += 1
        self.samples += samples
        self.tokens += seen.num_tokens
        self.padded_tokens += seen.num_padded_tokens
        self.wait_s += seen.data_wait_s
        self.slowest_wait = max(self.slowest_wait, (seen.data_wait_s, seen.data_wait_rank))

    @contextmanager
    def pause(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.pauses[name] = self.pauses.get(name, 0.0) + time.perf_counter() - start

    def rates(self, flops_per_sample: float | None, peak_flops: float | None) -> dict[str, Any]:
        """Per second of training time since the last line; `data_wait_s` and `step_s` are means per step."""
        seconds = max(time.perf_counter() - self.started - sum(self.pauses.values()), 1e-9)
        flops = flops_per_sample * self.samples / seconds if flops_per_sample else None
        return {
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "padded_tokens_per_s": self.padded_tokens / seconds,
            "step_s": seconds / max(self.steps, 1),
            "data_wait_s": self.wait_s / max(self.steps, 1),
            "data_wait_rank": self.slowest_wait[1],
            "mfu": flops / peak_flops if flops and peak_flops else None,
            **{f"{name}_s": pause for name, pause in self.pauses.items()},
        }


def peak_flops(device: torch.device) -> float | None:
    """Of the device, bf16; None on a CPU and for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def memory_gib(device: torch.device) -> float:
    """The most memory held so far: by tensors on the device, or by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def number(value: Tensor | float | None) -> float | None:
    """A plain number for JSON, which knows neither NaN nor infinity."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None


class Sinks:
    """Where a metrics line goes: .jsonl files always, wandb and TensorBoard where asked for.

    None of them can stop training: one that fails is reported and left out from then on.
    """

    def __init__(self, folder: RunFolder, log: LogConfig, settings: dict[str, Any], step: int):
        self._folder = folder
        self._others: dict[str, Any] = {}
        if folder.writes and log.wandb != "off":
            self._try("wandb", lambda: self._others.update(wandb=_Wandb(folder, log.wandb, settings)))
        if folder.writes and log.tensorboard:
            self._try("TensorBoard", lambda: self._others.update(TensorBoard=_TensorBoard(folder, step)))

    def line(self, record: dict[str, Any]) -> None:
        self._folder.append("metrics.jsonl", record)
        self._send(record, "train")

    def scores(self, record: dict[str, Any]) -> None:
        self._folder.append("evaluations.jsonl", record)
        self._send(record, "eval")

    def close(self) -> None:
        for name, sink in list(self._others.items()):
            self._try(name, sink.close)

    def _send(self, record: dict[str, Any], group: str) -> None:
        values = {f"{group}/{key}": value for key, value in record.items() if isinstance(value, int | float)}
        for name, sink in list(self._others.items()):
            self._try(name, lambda sink=sink: sink.log(values, record["step"]))

    def _try(self, name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # whatever a tracking service may raise
            self._others.pop(name, None)
            print(f"{name} is off for the rest of this run: {type(error).__name__}: {error}", file=sys.stderr)


class _Wandb:
    """A wandb run; a resumed training goes on with the one whose id the folder holds."""

    def __init__(self, folder: RunFolder, mode: str, settings: dict[str, Any]):
        import wandb

        id_file = folder.path / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            id=id_file.read_text(), resume="allow", mode=mode, dir=str(folder.path), config=settings, project="mmscale"
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    """Event files in run.dir/tensorboard; what a run that goes on after `step` repeats is hidden there."""

    def __init__(self, folder: RunFolder, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Progress:
    """Log lines, under which a terminal shows a bar; plain lines otherwise."""

    def __init__(self, total: int, done: int, shows: bool):
        self._shows, self._bar = shows, None
        if shows and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = RichProgress(*columns, transient=True)
            self._task = self._bar.add_task("samples", total=total, completed=done)
            self._bar.start()

    def advance(self, samples: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=samples)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._shows:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe(record: dict[str, Any], last_step: int, eta_s: float) -> str:
    """One line for people: `step 1200/50000 | loss 3.412 (con 1.204 cap 2.208) | gnorm 0.83 | ...`."""

    def show(key: str, form: str, missing: str = "n/a") -> str:
        value = record.get(key)
        return missing if value is None else format(value, form)

    short = {"contrastive": "con", "caption": "cap"}
    losses = [key.removeprefix("loss_") for key in record if key.startswith("loss_")]
    terms = " ".join(f"{short.get(name, name)} {show(f'loss_{name}', '.3f')}" for name in losses)
    parts = [
        f"step {record['step']}/{last_step}",
        f"loss {show('loss', '.3f')} ({terms})",
        f"gnorm {show('grad_norm', '.2f')}",
        f"lr {show('lr', '.1e')}",
        f"{show('samples_per_s', ',.0f')} img/s",
        f"mfu {show('mfu', '.1%')}",
        f"mem {show('mem_gib', '.1f')} GiB",
        f"step {record['step_s'] * 1e3:.0f} ms",
        f"data {record['data_wait_s'] / record['step_s']:.1%} @r{record['data_wait_rank']}",
        f"skip {record['skipped']} bad {record['bad_samples']}",
        f"eta {duration(eta_s)}",
    ]
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """`1d04h`, `3h07m`, `2m05s`."""
    seconds = int(seconds)
    for unit, below, size, smaller in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // smaller:02d}{below}"
    return f"{seconds}s"
