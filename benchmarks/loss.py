"""Time and memory of the losses against the size of the batch, beside open_clip's and the plain formulas.

    python -m benchmarks.loss [--quick] [--output FILE.json]

Contrastive: one rank, embeddings of 512, forward and backward. Memory is the peak of a process of its own above its
imports, the embeddings and their gradients; the largest batch is measured without a peer, which would need tens of
gigabytes there. Captioning: tokens through a head of 512 x 49,408, above the states, the weight and their gradients.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.common import Report, parser, ratios
from benchmarks.model import has_open_clip, status
from mmscale.model.head import VocabularyHead
from mmscale.objectives.contrastive import contrastive_loss

WIDTH, VOCABULARY = 512, 49408


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--one", nargs=3, metavar=("SIDE", "LOSS", "SIZE"), help="used by itself")
    args = options.parse_args(argv)
    if args.one:
        print(json.dumps(one(args.one[0], args.one[1], int(args.one[2]), rounds=3)))
        return
    report = Report("loss")
    peer = "open_clip" if has_open_clip() else "plain"
    for loss in ("clip", "siglip"):
        for size in (2048, 4096) if args.quick else (2048, 8192, 32768):
            compare(report, loss, size, ("mmscale", peer) if size <= 8192 else ("mmscale",))
    for size in (512,) if args.quick else (512, 4096):
        compare(report, "caption", size, ("mmscale", "plain"))
    report.finish(args.output)


def compare(report: Report, loss: str, size: int, sides: tuple[str, ...]) -> None:
    found = {}
    facts = {"loss": loss, "tokens" if loss == "caption" else "batch": size, "threads": torch.get_num_threads()}
    for side in sides:
        command = [sys.executable, "-m", "benchmarks.loss", "--one", side, loss, str(size)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        found[side] = json.loads(ended.stdout.splitlines()[-1])
        report.add(f"memory: {side}", "MiB", [found[side]["bytes"] / 2**20], **facts)
        report.add(f"time: {side}", "s", found[side]["seconds"], **facts)
    if len(sides) == 2:
        ours, theirs = found.values()
        report.add(f"memory: mmscale / {sides[1]}", "ratio", [ours["bytes"] / theirs["bytes"]], **facts)
        report.add(f"time: mmscale / {sides[1]}", "ratio", ratios(ours["seconds"], theirs["seconds"]), **facts)


def one(side: str, loss: str, size: int, rounds: int) -> dict:
    """Seconds of each round, and bytes at the peak above inputs and their gradients."""
    torch.manual_seed(0)
    step, inputs = caption(side, size) if loss == "caption" else contrastive(side, loss, size)
    if size > 8192:
        rounds = 1
    before = status("VmRSS") + sum(x.numel() * x.element_size() for x in inputs)
    seconds = []
    for _ in range(rounds):
        for x in inputs:
            x.grad = None
        begun = time.perf_counter()
        step().backward()
        seconds.append(time.perf_counter() - begun)
    return {"seconds": seconds, "bytes": status("VmHWM") - before}


def contrastive(side: str, kind: str, size: int) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    image, text = (F.normalize(torch.randn(size, WIDTH), dim=1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(14.3), torch.tensor(-10.0 if kind == "siglip" else 0.0)
    if side == "mmscale":
        valid = torch.ones(size, dtype=torch.bool)
        return lambda: contrastive_loss(kind, image, text, torch.stack([scale, bias]), valid) / size, [image, text]
    if side == "open_clip":
        from open_clip.loss import ClipLoss, SigLipLoss

        if kind == "clip":
            return lambda: ClipLoss()(image, text, scale), [image, text]
        return lambda: SigLipLoss()(image, text, scale, bias), [image, text]
    target = torch.arange(size)

    def plain() -> torch.Tensor:
        logits = scale * image @ text.T + bias
        if kind == "siglip":
            return -F.logsigmoid(logits * (2 * torch.eye(size) - 1)).sum() / size
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return plain, [image, text]


def caption(side: str, tokens: int) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    head = VocabularyHead(WIDTH, VOCABULARY)
    hidden, labels = torch.randn(tokens, WIDTH, requires_grad=True), torch.randint(0, VOCABULARY, (tokens,))
    if side == "mmscale":
        return lambda: head(hidden, labels) / tokens, [hidden, head.weight]
    return lambda: F.cross_entropy(head(hidden), labels), [hidden, head.weight]


if __name__ == "__main__":
    main()
