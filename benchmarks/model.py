"""Training steps beside open_clip's: time, memory, and whether the FLOPs that MFU is made of are true.

    python -m benchmarks.model [--quick] [--output FILE.json]     on the CPU, beside open_clip where it can be imported
    python -m benchmarks.model --gpu [--output FILE.json]         MFU of L/14 and g/14 in bf16, in under ten minutes

Both sides have the same weights, pictures, texts, threads, precision and optimizer; open_clip gets pictures that are
already normalised floats. Captions have 12 words on average (about 19 tokens) or fill the context. Memory is the peak
of a process of its own, above what its imports take and 16 bytes a parameter (weights, gradients, two moments).
"""

import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from benchmarks.common import Report, paired, parser, ratios
from mmscale.config import DecoderSizes, ModelConfig, ObjectiveConfig, TextSizes, VisionSizes
from mmscale.model.configuration_mmscale import MMScaleConfig
from mmscale.model.flops import training_flops
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.model.presets import build_model, build_model_config
from mmscale.objectives.pretraining import PretrainingObjective, forward_backward

VOCABULARY = 49408
SMALL = ModelConfig(
    preset="b32",
    embed_dim=256,
    vision=VisionSizes(width=384, layers=6, heads=6),
    text=TextSizes(width=256, layers=6, heads=4),
    decoder=DecoderSizes(layers=6, heads=4),
)
SIZES = {"small": SMALL, "b32": ModelConfig(preset="b32")}
BATCH = 8
CONTEXT = 76


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--gpu", action="store_true", help="MFU on the GPU instead")
    options.add_argument("--sizes", default="", help="of the side by side: small, b32; small alone when quick")
    options.add_argument("--captions", default="12 words,full", help="of the side by side")
    options.add_argument("--rounds", type=int, help="pairs of steps")
    options.add_argument("--parts", default="flops,steps,memory", help="what to measure")
    options.add_argument("--memory-of", nargs=3, metavar=("SIDE", "SIZE", "CAPTIONS"), help="used by itself")
    args = options.parse_args(argv)
    if args.memory_of:
        print(json.dumps(peak_memory(*args.memory_of)))
        return
    sizes = args.sizes or ("small" if args.quick else "small,b32")
    report = Report("model")
    if args.gpu:
        measure_mfu(report, seconds=3 if args.quick else 10)
    else:
        parts = args.parts.split(",")
        if "flops" in parts:
            measure_flops(report)
        for size in sizes.split(","):
            for captions in args.captions.split(","):
                if "steps" in parts:
                    measure_steps(report, size, captions, args.rounds or (3 if args.quick else 12))
                if "memory" in parts:
                    measure_memory(report, size, captions, rounds=1 if args.quick else 3)
    report.finish(args.output)


def batch_of(captions: str, size: int = BATCH) -> SimpleNamespace:
    """Random pictures and texts, trimmed as the loader does."""
    random.seed(0)
    generator = torch.Generator().manual_seed(0)
    draw = {"12 words": lambda: min(max(round(random.gauss(19, 4)), 8), CONTEXT), "full": lambda: CONTEXT}[captions]
    lengths = torch.tensor([draw() for _ in range(size)])
    length = min(CONTEXT, -(-(int(lengths.max()) + 1) // 8) * 8 - 1)
    input_ids = torch.randint(1, VOCABULARY, (size, length), generator=generator)
    input_ids[torch.arange(length) >= lengths[:, None]] = 0
    return SimpleNamespace(
        pixel_values=torch.randint(0, 256, (size, 3, 224, 224), generator=generator, dtype=torch.uint8),
        input_ids=input_ids,
        lengths=lengths,
        valid=torch.ones(size, dtype=torch.bool),
        positions=torch.arange(size),
    )


def our_step(size: str, captions: str) -> tuple[Callable[[], float], MMScaleModel]:
    """A function that does one optimizer step and returns the loss."""
    model = build_model(build_model_config(SIZES[size], VOCABULARY)).train()
    objective = PretrainingObjective(model, ObjectiveConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = batch_of(captions)

    def step() -> float:
        losses = forward_backward(objective, [batch], lambda loss: loss.backward())
        optimizer.step()
        optimizer.zero_grad()
        return float(losses["loss"])

    return step, model


def open_clips_step(
    size: str, captions: str, weights: dict | None = None
) -> tuple[Callable[[], float], torch.nn.Module]:
    from open_clip.coca_model import CoCa
    from open_clip.loss import CoCaLoss

    from mmscale.export.open_clip import open_clip_config

    settings = open_clip_config(build_model_config(SIZES[size], VOCABULARY))
    settings.pop("custom_text")
    model = CoCa(**settings).train()
    if weights is not None:
        model.load_state_dict(weights)
    loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = batch_of(captions)
    pictures = (batch.pixel_values / 255 - 0.45) / 0.27
    texts = torch.nn.functional.pad(batch.input_ids, (0, CONTEXT - batch.input_ids.shape[1]))

    def step() -> float:
        total = sum(loss(**model(pictures, texts)))
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step, model


def measure_steps(report: Report, size: str, captions: str, rounds: int) -> None:
    facts = {"size": size, "captions": captions, "batch": BATCH, "threads": torch.get_num_threads()}
    step, model = our_step(size, captions)
    cases = {"mmscale": step}
    if has_open_clip():
        from mmscale.export.open_clip import to_open_clip

        weights = {name: x.clone() for name, x in to_open_clip(model.state_dict(), model.config).items()}
        cases["open_clip"], _ = open_clips_step(size, captions, weights)
    readings = paired(cases, rounds=rounds, warmup=1)
    for name, seconds in readings.items():
        report.add(f"step: {name}", "s", seconds, **facts)
    if "open_clip" in readings:
        report.add("step: mmscale / open_clip", "ratio", ratios(readings["mmscale"], readings["open_clip"]), **facts)


def measure_memory(report: Report, size: str, captions: str, rounds: int) -> None:
    facts = {"size": size, "captions": captions, "batch": BATCH}
    found = {}
    for side in ("mmscale", "open_clip") if has_open_clip() else ("mmscale",):
        command = [sys.executable, "-m", "benchmarks.model", "--memory-of", side, size, captions]
        readings = []
        for _ in range(rounds):
            ended = subprocess.run(command, capture_output=True, text=True, check=True)
            readings.append(json.loads(ended.stdout.splitlines()[-1])["activations"] / 2**20)
        found[side] = readings
        report.add(f"memory: {side}", "MiB", readings, **facts)
    if "open_clip" in found:
        report.add("memory: mmscale / open_clip", "ratio", ratios(found["mmscale"], found["open_clip"]), **facts)


def peak_memory(side: str, size: str, captions: str) -> dict:
    """Bytes of this process at its peak over three steps, above imports and 16 bytes a parameter."""
    if side == "open_clip":
        import open_clip  # noqa: F401
    before = status("VmRSS")
    step, model = (our_step if side == "mmscale" else open_clips_step)(size, captions)
    for _ in range(3):
        step()
    parameters = sum(p.numel() for p in model.parameters())
    peak = status("VmHWM")
    return {"activations": peak - before - 16 * parameters, "peak": peak, "imports": before, "parameters": parameters}


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure_flops(report: Report) -> None:
    """The formula against PyTorch's counter, which sees every matrix product of a forward and backward pass."""
    for preset in ("tiny", "b32", "l14", "g14"):
        config = build_model_config(ModelConfig(preset=preset), VOCABULARY)
        for length in (23, config.text_config.context_length):
            formula = training_flops(config, length)
            report.add(
                "FLOPs: formula / counter",
                "ratio",
                [formula / counted_flops(config, length)],
                "neither",
                size=preset,
                text_length=length,
            )


def counted_flops(config: MMScaleConfig, length: int) -> float:
    """FLOPs of a sample's forward and backward pass by PyTorch's counter; shapes only, nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    size = config.vision_config.image_size
    # The counter does not know the CPU's fused attention; its plain form is made of products that it counts.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        objective = PretrainingObjective(build_model(config).train(), ObjectiveConfig())
        batch = {
            "pixel_values": torch.zeros(BATCH, 3, size, size, dtype=torch.uint8),
            "input_ids": torch.zeros(BATCH, length, dtype=torch.int64),
            "lengths": torch.full((BATCH,), length),
            "valid": torch.ones(BATCH, dtype=torch.bool),
            "positions": torch.arange(BATCH),
        }
        with FlopCounterMode(display=False) as counter:
            objective(**batch, num_valid=torch.ones(()), num_tokens=torch.ones(()))[0].backward()
    return counter.get_total_flops() / BATCH


# Dense bf16 peaks in FLOP/s, from the vendor's data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


# Preset, micro-batch to try first, captions, activation checkpointing, torch.compile.
GPU_CASES = (
    ("l14", 256, "12 words", "none", False),
    ("l14", 256, "12 words", "none", True),
    ("l14", 512, "12 words", "full", False),
    ("l14", 512, "12 words", "full", True),
    ("l14", 256, "full", "none", True),
    ("g14", 128, "12 words", "none", False),
    ("g14", 128, "12 words", "none", True),
    ("g14", 256, "12 words", "full", False),
    ("g14", 256, "12 words", "full", True),
)


def measure_mfu(report: Report, seconds: float) -> None:
    """Model FLOPs utilisation of whole steps in bf16 (fp32 weights, autocast); recomputation is not counted."""
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    if peak is None:
        sys.exit(f"{name}: its peak is not in PEAKS")
    torch.backends.cuda.matmul.allow_tf32 = True
    for preset, batch_size, captions, checkpoint, compiled in GPU_CASES:
        facts = {"size": preset, "captions": captions, "checkpoint": checkpoint, "compile": compiled, "gpu": name}
        fitting, times, flops = _steps_that_fit(preset, batch_size, captions, checkpoint, compiled, seconds)
        if times:
            facts |= {"micro_batch": fitting, "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)}
            report.add("MFU", "%", [100 * flops / each / peak for each in times], "higher", **facts)
            report.add("throughput", "samples/s", [fitting / each for each in times], "higher", **facts)


def _steps_that_fit(
    preset: str, batch_size: int, captions: str, checkpoint: str, compiled: bool, seconds: float
) -> tuple[int, list[float], float]:
    """The batch, halved until it fits; its step times, and its FLOPs."""
    while batch_size:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            with torch.device("cuda"):
                config = build_model_config(ModelConfig(preset=preset), VOCABULARY)
                model = build_model(config, checkpoint, compiled).train()
            objective = PretrainingObjective(model, ObjectiveConfig())
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
            batch = batch_of(captions, batch_size)
            times: list[float] = []
            begun = time.perf_counter()
            while len(times) < 5 or time.perf_counter() - begun < seconds:
                torch.cuda.synchronize()
                start = time.perf_counter()
                with torch.autocast("cuda", torch.bfloat16):
                    forward_backward(objective, [batch], lambda loss: loss.backward())
                optimizer.step()
                optimizer.zero_grad()
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            flops = batch_size * training_flops(config, float(batch.lengths.float().mean()))
            return batch_size, times[2:], flops
        except torch.OutOfMemoryError:
            model = objective = optimizer = None
            batch_size //= 2
    return 0, [], 0.0


def has_open_clip() -> bool:
    try:
        import open_clip  # noqa: F401
    except (ImportError, RuntimeError):  # torchvision on a CPU build of torch raises the latter
        return False
    return True


if __name__ == "__main__":
    main()
