"""Samples a second from shard bytes to update: mmscale's training beside open_clip's.

    python -m benchmarks.end_to_end [--quick] [--cases b32,photos] [--output FILE.json]

Both sides run their own whole training loop on the same shards (photo-like JPEGs, captions of 12 words), the same model
with the same first weights, batch, threads, loader workers, precision (fp32), clipping, and a line of log every ten
steps. open_clip's side is its `train_one_epoch` over its `get_wds_dataset`, with its transform, model, loss and AdamW,
and its text padded to the context as it does. Its tokenizer is replaced by mmscale's, which is cheaper, so that the
token ids agree; its shuffle buffer does not grow during the run, which would cost it reads. Turns alternate, and a side
that waits for its turn is stopped. mmscale's loop has glibc keep freed memory (mmscale/train/host_memory.py);
open_clip's runs with malloc as it is. Without open_clip in the environment mmscale runs alone.

Cases:
    b32     CoCa B/32 on pictures of 512 x 384, where the model binds on a CPU
    photos  a CoCa of 0.6M parameters that drops three patches of four, on pictures of 1024 x 768: made so small that
            open_clip's loader binds even on a CPU, as it does on a fast GPU
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentencepiece import sentencepiece_model_pb2

from benchmarks.common import Report, parser, ratios
from benchmarks.fleet import Fleet, Gate
from benchmarks.loader import encode_jpeg, photo, write_shards
from benchmarks.model import has_open_clip
from mmscale.config import Config, DataConfig, validate
from mmscale.data.samples import iter_captions
from mmscale.data.tokenizer import Tokenizer, train_tokenizer
from mmscale.model.presets import build_model, build_model_config

PIECES = 293  # 256 bytes, the letters, and so few more that 12 words take about 19 tokens, as real captions do
LOG_EVERY = 10
DISTINCT_PHOTOS, NUM_SHARDS, NUM_SAMPLES = 32, 4, 100


@dataclass(frozen=True)
class Case:
    """A model and its data; `turn` is steps."""

    model: dict[str, Any]
    vocabulary: int
    photo: tuple[int, int]
    batch: int
    threads: int
    workers: int
    turn: int
    rounds: int
    decode: tuple[str, ...] = ("exact",)


CASES = {
    "b32": Case({"preset": "b32"}, 49408, (512, 384), batch=8, threads=2, workers=2, turn=1, rounds=50),
    "photos": Case(
        {
            "preset": "tiny",
            "embed_dim": 64,
            "patch_dropout": 0.75,
            "vision": {"image_size": 224, "patch_size": 32, "width": 64},
            "text": {"context_length": 76, "width": 64, "layers": 1},
            "decoder": {"layers": 1},
        },
        512,
        (1024, 768),
        batch=64,
        threads=1,
        workers=1,
        turn=4,
        rounds=50,
        decode=("exact", "fast"),
    ),
}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--cases", help=f"comma-separated, of: {', '.join(CASES)} (default: all; quick: photos)")
    options.add_argument("--rounds", type=int, help="turns of each side (default: 50; quick: 5)")
    options.add_argument("--seconds", type=float, help="of each case: fewer rounds when they take longer")
    options.add_argument("--side", choices=("mmscale", "open_clip"), help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.side:
        job = json.loads(os.environ["MMSCALE_BENCHMARK_JOB"])["config"]
        {"mmscale": train_ours, "open_clip": train_theirs}[args.side](validate(job))
        return
    report = Report("end_to_end")
    chosen = (args.cases or ("photos" if args.quick else ",".join(CASES))).split(",")
    for name in chosen:
        rounds = args.rounds or (5 if args.quick else CASES[name].rounds)
        compare(report, name, CASES[name], rounds, args.seconds or (60 if args.quick else 1800))
    report.finish(args.output)


def compare(report: Report, name: str, case: Case, rounds: int, seconds: float) -> None:
    """Samples a second of every side and the ratio to open_clip's, turn by turn."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        jobs = {f"mmscale {decode}": make_job(Path(folder), case, decode) for decode in case.decode}
        if has_open_clip():
            jobs["open_clip"] = jobs["mmscale exact"]
        fleets = {}
        for side, job in jobs.items():
            command = [sys.executable, "-m", "benchmarks.end_to_end", "--side", side.split()[0]]
            fleets[side] = stack.enter_context(Fleet(job, threads=case.threads, command=command))
        rates: dict[str, list[float]] = {side: [] for side in fleets}
        waits: dict[str, list[float]] = {side: [] for side in fleets}
        begun = time.monotonic()
        for number in range(rounds):
            for side, fleet in fleets.items():
                took = sum(fleet.steps(case.turn))
                rates[side].append(case.batch * case.turn / took)
                waits[side].append(sum(fleet.waited) / took)
            if number >= 2 and time.monotonic() - begun > seconds:
                break
        facts = {
            "training": name,
            "jpeg": "x".join(map(str, case.photo)),
            "batch": case.batch,
            "threads": case.threads,
            "workers": case.workers,
        }
        for side in fleets:
            report.add(side, "samples/s", rates[side], "higher", **facts)
            report.add(f"{side}: waiting for data", "share of time", waits[side], "neither", **facts)
        for side in fleets:
            if "open_clip" in fleets and side != "open_clip":
                gain = ratios(rates[side], rates["open_clip"])
                report.add(f"{side} / open_clip", "ratio", gain, "higher", **facts)
        tokenizer = Tokenizer.load(jobs["mmscale exact"]["tokenizer"]["path"])
        lengths = [len(tokenizer.encode(text, 76)) for text in iter_captions(shards(Path(folder)), DataConfig())]
        report.add("tokens of a caption", "tokens", lengths, "neither", training=name)


def shards(folder: Path) -> list[str]:
    return sorted(map(str, (folder / "shards").glob("*.tar")))


def make_job(folder: Path, case: Case, decode: str) -> dict:
    """A configuration, and what it names: shards and a tokenizer in `folder`, unless they are there."""
    path = folder / "tokenizer.model"
    if not path.exists():
        pictures = [encode_jpeg(photo(number, *case.photo), 76) for number in range(DISTINCT_PHOTOS)]
        write_shards(folder / "shards", pictures, NUM_SHARDS, NUM_SAMPLES)
        train_tokenizer(iter_captions(shards(folder), DataConfig()), path, PIECES)
        fill_vocabulary(path, case.vocabulary)
    return {
        "run": {"dir": str(folder / decode)},
        "data": {"train": shards(folder), "workers": case.workers, "decode": decode},
        "tokenizer": {"path": str(path)},
        "model": case.model,
        "optim": {"lr": 1e-5},
        # Stage 0: with one process there is nothing to shard, and the other stages would only copy.
        "train": {"samples": 10**9, "global_batch": case.batch, "zero_stage": 0},
        "log": {"every": LOG_EVERY},
    }


def fill_vocabulary(path: Path, size: int) -> None:
    """Gives a SentencePiece model pieces that are never used, up to `size`, which the model's size depends on."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    for number in range(len(proto.pieces), size):
        proto.pieces.add(piece=f"<unused {number}>", score=-100.0, type=proto.SentencePiece.UNUSED)
    proto.trainer_spec.vocab_size = size
    path.write_bytes(proto.SerializeToString(deterministic=True))


def train_ours(config: Config) -> None:
    """mmscale's training loop, in turns."""
    from mmscale.train.trainer import train

    gate, seen = Gate({}), {"meter": None, "wait_s": 0.0}

    def step_is_over(trainer: Any, update: Any) -> None:
        before = seen["wait_s"] if trainer.meter is seen["meter"] else 0.0  # every line of the log begins a new meter
        seen.update(meter=trainer.meter, wait_s=trainer.meter.wait_s)
        gate.passed(seen["wait_s"] - before)

    train(config, hooks=[step_is_over])


def train_theirs(config: Config) -> None:
    """open_clip's training loop, in turns, set up as its own `open_clip_train.main` does."""
    import open_clip
    from open_clip_train import data as open_clip_data
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.distributed import init_distributed_device
    from open_clip_train.params import parse_args
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    from mmscale.export.open_clip import open_clip_config, to_open_clip

    tokenizer = Tokenizer.load(config.tokenizer.path)
    sizes = build_model_config(config.model, tokenizer.vocab_size)
    settings = open_clip_config(sizes)
    settings["vision_cfg"]["patch_dropout"] = config.model.patch_dropout
    name = Path(config.run.dir).with_name("coca_benchmark.json")
    name.write_text(json.dumps(settings))
    open_clip.add_model_config(name)
    flags = {
        "--model": name.stem,
        "--train-data": "::".join(config.data.train),
        "--train-num-samples": config.train.samples,
        "--dataset-type": "webdataset",
        "--batch-size": config.train.global_batch,
        "--workers": config.data.workers,
        "--precision": "fp32",
        "--device": "cpu",
        "--lr": config.optim.lr,
        "--beta2": config.optim.betas[1],
        "--eps": config.optim.eps,
        "--wd": config.optim.weight_decay,
        "--grad-clip-norm": config.train.grad_clip,
        "--coca-caption-loss-weight": config.objective.caption_weight,
        "--log-every-n-steps": LOG_EVERY,
        "--epochs": 1,
        "--warmup": 0,
    }
    args = parse_args([*(str(part) for item in flags.items() for part in item), "--dataset-resampled"])
    args.distill = args.wandb = args.tensorboard = False
    device = init_distributed_device(args)
    model, transform, _ = open_clip.create_model_and_transforms(
        args.model, precision=args.precision, device=device, output_dict=True
    )
    torch.manual_seed(config.run.seed)
    model.load_state_dict(to_open_clip(build_model(sizes).state_dict(), sizes))
    gains = [p for name, p in model.named_parameters() if p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name]
    rest = [p for p in model.parameters() if not any(p is other for other in gains)]
    optimizer = torch.optim.AdamW(
        [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": args.wd}],
        lr=args.lr,
        betas=(args.beta1, args.beta2),
        eps=args.eps,
    )

    def tokenize(text: str) -> torch.Tensor:
        ids = tokenizer.encode(text, sizes.text_config.context_length)
        row = torch.full((1, sizes.text_config.context_length), tokenizer.pad_id)
        row[0, : len(ids)] = torch.tensor(ids)
        return row

    open_clip_data._SAMPLE_SHUFFLE_SIZE = open_clip_data._SAMPLE_SHUFFLE_INITIAL
    info = get_wds_dataset(args, transform, is_train=True, tokenizer=tokenize)
    info.dataloader = _Gated(info.dataloader)
    scheduler = cosine_lr(optimizer, args.lr, args.warmup, info.dataloader.num_batches)
    loss = open_clip.create_loss(args)
    train_one_epoch(model, {"train": info}, loss, 0, optimizer, None, scheduler, None, args)


class _Gated:
    """A data loader that lets a loop run in turns: one that asks for a batch has finished the step before."""

    def __init__(self, inner: Any):
        self._inner = inner
        self.num_batches, self.num_samples = inner.num_batches, inner.num_samples

    def __iter__(self) -> Iterator[Any]:
        gate, batches = Gate({}), iter(self._inner)
        while True:
            start = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - start
            yield batch
            gate.passed(waited)


if __name__ == "__main__":
    main()
