"""One GPU in one call of under ten minutes: training steps, the loader's share, the losses, captions, and a trace.

    python -m benchmarks.gpu [--minutes 9.5] [--parts steps,loader] [--output FILE.json] [--trace TRACE.json.gz]
    python -m benchmarks.gpu --dry          every part once on the CPU, with a tiny model: does it run?

Parts:
    steps     time, MFU and memory of B/32, L/14 and g/14 in bf16 (fp32 weights, autocast): compile on and off,
              activation checkpointing on and off, several batches; one that does not fit is halved until it does
    loader    B/32 fed by the loader from JPEG shards beside the same steps with batches that are there, in turns
    loss      time and memory of the contrastive losses over a large global batch, tile by tile
    generate  captions: tokens a second, with the cache
    trace     a Chrome trace of ten steps, for chrome://tracing or Perfetto: TRACE.json.gz

The most telling cases come first; those that the time did not suffice for are counted in the result.
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from benchmarks.common import RESULTS, Report, parser, ratios
from benchmarks.fleet import Fleet
from benchmarks.loader import write_photos
from benchmarks.model import VOCABULARY, batch_of
from mmscale.config import DataConfig, ModelConfig, ObjectiveConfig
from mmscale.data.samples import iter_captions
from mmscale.data.tokenizer import train_tokenizer
from mmscale.model.configuration_mmscale import MMScaleConfig
from mmscale.model.flops import training_flops
from mmscale.model.presets import build_model, build_model_config
from mmscale.objectives.contrastive import contrastive_loss
from mmscale.objectives.pretraining import PretrainingObjective, forward_backward
from mmscale.train.metrics import peak_flops

GIB = 2**30
WARMUP = 3


@dataclass(frozen=True)
class Step:
    preset: str
    batch: int
    checkpoint: str = "none"
    compile: bool = False
    captions: str = "12 words"


@dataclass(frozen=True)
class Plan:
    """What to run where. `seconds`: of timed steps a case, after the warm-up."""

    device: torch.device
    seconds: float
    steps: tuple[Step, ...]
    loader: Step
    decodes: tuple[str, ...]
    loader_rounds: int
    losses: tuple[int, ...]
    generate: tuple[str, int]
    trace: Step


def gpu_plan() -> Plan:
    grid = [
        Step(preset, batch * (1 if checkpoint == "none" else 2), checkpoint, compiled)
        for preset, batch in (("b32", 512), ("l14", 256), ("g14", 128))
        for checkpoint in ("none", "full")
        for compiled in (False, True)
    ]
    sweep = [
        Step(preset, batch, "none", True)
        for preset, batches in (("b32", (128, 1024, 2048)), ("l14", (64, 128)), ("g14", (32, 64)))
        for batch in batches
    ]
    full = [Step("l14", 256, "none", True, "full")]
    return Plan(
        device=torch.device("cuda"),
        seconds=4,
        steps=(*grid, *full, *sweep),
        loader=Step("b32", 256),
        decodes=("exact", "fast"),
        loader_rounds=15,
        losses=(8192, 32768, 131072),
        generate=("b32", 256),
        trace=Step("b32", 256),
    )


def dry_plan() -> Plan:
    step = Step("tiny", 4)
    return Plan(
        device=torch.device("cpu"),
        seconds=0.1,
        steps=(step, Step("tiny", 4, "full")),
        loader=step,
        decodes=("exact",),
        loader_rounds=2,
        losses=(64,),
        generate=("tiny", 4),
        trace=step,
    )


PARTS = ("loader", "trace", "generate", "loss", "steps")  # `steps` last: it takes all the time that is left


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    options.add_argument("--minutes", type=float, default=9.5, help="no case begins later than a minute before")
    options.add_argument("--dry", action="store_true", help="every part once on the CPU, with a tiny model")
    options.add_argument("--trace", type=Path, default=RESULTS / "gpu_trace.json.gz", help="the Chrome trace")
    args = options.parse_args(argv)
    chosen = args.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        options.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not args.dry and not torch.cuda.is_available():
        options.error("there is no GPU here; --dry tries every part on the CPU")
    plan = dry_plan() if args.dry else gpu_plan()
    deadline = time.monotonic() + 60 * args.minutes - 60
    report = Report("gpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    parts: dict[str, Callable[[], None]] = {
        "loader": lambda: measure_loader(report, plan),
        "trace": lambda: write_trace(plan, args.trace),
        "generate": lambda: measure_generate(report, plan),
        "loss": lambda: measure_losses(report, plan),
        "steps": lambda: measure_steps(report, plan, deadline),
    }
    for part in PARTS:
        if part in chosen:
            begun = time.monotonic()
            parts[part]()
            print(f"{part}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    report.finish(args.output)


def measure_steps(report: Report, plan: Plan, deadline: float) -> None:
    left_out = 0
    for case in plan.steps:
        if time.monotonic() > deadline:
            left_out += 1
            continue
        batch, times, memory, flops = steps_that_fit(plan, case)
        facts = {"size": case.preset, "captions": case.captions, "batch": batch, "checkpoint": case.checkpoint}
        facts |= {"compile": case.compile, "precision": "bf16"}
        if not times:
            continue
        report.add("step", "s", times, **facts)
        report.add("throughput", "samples/s", [batch / each for each in times], "higher", **facts)
        report.add("peak memory", "GiB", [memory], **facts)
        if peak := peak_flops(plan.device):
            report.add("MFU", "%", [100 * flops / each / peak for each in times], "higher", **facts)
    report.add("step cases left out for want of time", "cases", [left_out], "neither")


def steps_that_fit(plan: Plan, case: Step) -> tuple[int, list[float], float, float]:
    """The batch, halved until it fits; its step times, its peak memory [GiB] and its FLOPs."""
    batch = case.batch
    while batch:
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            step, flops = training_step(plan.device, case, batch)
            for _ in range(WARMUP):
                step()
            times: list[float] = []
            begun = time.perf_counter()
            while len(times) < 3 or time.perf_counter() - begun < plan.seconds:
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
            return batch, times, peak_gib(plan.device), flops
        except torch.OutOfMemoryError:
            step = None
            batch //= 2
        finally:
            if case.compile:
                torch._dynamo.reset()
    return 0, [], 0.0, 0.0


def training_step(device: torch.device, case: Step, batch_size: int) -> tuple[Callable[[], None], float]:
    """What does one optimizer step and waits for it, and the step's FLOPs (recomputation is not counted)."""
    with device:
        sizes = build_model_config(ModelConfig(preset=case.preset), VOCABULARY)
        model = build_model(sizes, case.checkpoint, case.compile).train()
    objective = PretrainingObjective(model, ObjectiveConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = fitted(batch_of(case.captions, batch_size), sizes, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            forward_backward(objective, [batch], lambda loss: loss.backward())
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)

    return step, batch_size * training_flops(sizes, float(batch.lengths.float().mean()))


def fitted(batch: SimpleNamespace, sizes: MMScaleConfig, device: torch.device) -> SimpleNamespace:
    """The batch cut to a smaller model's picture and context, its pictures on the device."""
    length, size = sizes.text_config.context_length, sizes.vision_config.image_size
    batch.input_ids, batch.lengths = batch.input_ids[:, :length], batch.lengths.clamp(max=length)
    batch.pixel_values = batch.pixel_values[:, :, :size, :size].to(device)
    return batch


def measure_loader(report: Report, plan: Plan) -> None:
    """mmscale's own step loop with its own stream, and with the first batches again and again."""
    case, workers = plan.loader, 12 if plan.device.type == "cuda" else 1
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        shards = write_photos(Path(scratch), num_shards=4, num_samples=250 if plan.device.type == "cuda" else 8)
        train_tokenizer(iter_captions(shards, DataConfig()), f"{scratch}/tokenizer.model", 300)

        def job(decode: str) -> dict:
            return {
                "run": {"dir": f"{scratch}/run"},
                "data": {"train": shards, "workers": workers, "decode": decode},
                "tokenizer": {"path": f"{scratch}/tokenizer.model"},
                "model": {"preset": case.preset},
                "train": {"samples": 10**9, "global_batch": case.batch, "precision": "bf16"},
            }

        fleets = {"synthetic": stack.enter_context(Fleet(job("fast"), synthetic=True))}
        for decode in plan.decodes:
            fleets[f"loader, {decode}"] = stack.enter_context(Fleet(job(decode)))
        times: dict[str, list[float]] = {name: [] for name in fleets}
        for _ in range(plan.loader_rounds):
            for name, fleet in fleets.items():
                times[name] += fleet.steps(6)[1:]
    facts = {"size": case.preset, "batch": case.batch, "workers": workers, "precision": "bf16"}
    for name, seconds in times.items():
        report.add(f"step, {name}", "s", seconds, **facts)
        if name != "synthetic":
            report.add(f"{name} / synthetic, step time", "ratio", ratios(seconds, times["synthetic"]), **facts)


def measure_losses(report: Report, plan: Plan) -> None:
    """Forward and backward over all pairs of one rank; of W ranks each does 1/W of the tiles."""
    for kind in ("clip", "siglip"):
        for size in plan.losses:
            with plan.device:
                image, text = (F.normalize(torch.randn(size, 512), dim=1).requires_grad_() for _ in range(2))
                scale_bias = torch.tensor([14.3, -10.0 if kind == "siglip" else 0.0])
                valid = torch.ones(size, dtype=torch.bool)
            base = peak_gib(plan.device, reset=True)
            times = []
            for _ in range(4):
                start = time.perf_counter()
                (contrastive_loss(kind, image, text, scale_bias, valid) / size).backward()
                synchronize(plan.device)
                times.append(time.perf_counter() - start)
            facts = {"loss": kind, "global_batch": size, "dim": 512}
            report.add("loss, forward and backward", "s", times[1:], **facts)
            report.add("loss, peak memory above its inputs", "GiB", [peak_gib(plan.device) - base], **facts)


@torch.no_grad()
def measure_generate(report: Report, plan: Plan) -> None:
    preset, batch = plan.generate
    tokens = 20
    with plan.device:
        sizes = build_model_config(ModelConfig(preset=preset), VOCABULARY)
        model = build_model(sizes).eval()
        pictures = torch.randn(batch, 3, sizes.vision_config.image_size, sizes.vision_config.image_size)
    rates = []
    for _ in range(6):
        start = time.perf_counter()
        with torch.autocast(plan.device.type, torch.bfloat16):
            # An end mark that is no token: all captions are as long as asked for.
            model.generate(pixel_values=pictures, do_sample=False, max_new_tokens=tokens, eos_token_id=VOCABULARY)
        synchronize(plan.device)
        rates.append(batch * tokens / (time.perf_counter() - start))
    facts = {"size": preset, "batch": batch, "tokens": tokens, "precision": "bf16"}
    report.add("generation, pictures encoded", "tokens/s", rates[1:], "higher", **facts)


def write_trace(plan: Plan, path: Path) -> None:
    """A Chrome trace of ten steps after the warm-up."""
    from torch.profiler import ProfilerActivity, profile

    step, _ = training_step(plan.device, plan.trace, plan.trace.batch)
    for _ in range(WARMUP):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (plan.device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(10):
            step()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gib(device: torch.device, reset: bool = False) -> float:
    """Peak of tensors on the GPU since the last reset; 0 on a CPU, where nobody counts them."""
    if device.type != "cuda":
        return 0.0
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / GIB


if __name__ == "__main__":
    main()
