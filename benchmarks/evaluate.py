"""Retrieval among 100,000 pairs: time against the bare matrix product of the same blocks, and peak memory.

    python -m benchmarks.evaluate [--quick] [--output FILE]

The 100,000 x 100,000 similarities are gone through once, slab by slab of 2,048 pictures; each slab is first only
multiplied and then scored, so that both meet the same machine.
"""

import resource

import torch
import torch.nn.functional as F

from benchmarks.common import Report, paired, parser, ratios
from mmscale.evaluate import retrieval

DIM = 512


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--pairs", type=int, default=100_000)
    arguments.add_argument("--seconds", type=float, help="stop after so many, with the slabs done until then")
    options = arguments.parse_args()
    pairs = 20_000 if options.quick else options.pairs
    torch.manual_seed(0)
    images = F.normalize(torch.randn(pairs, DIM), dim=1)
    texts = F.normalize(images + 3 * torch.randn(pairs, DIM) / DIM**0.5, dim=1)
    right = (images * texts).sum(1)
    image_counts, text_counts = torch.zeros(2, pairs, dtype=torch.long), torch.zeros(2, pairs, dtype=torch.long)
    slabs = [slice(start, start + retrieval.BLOCK_ROWS) for start in range(0, pairs, retrieval.BLOCK_ROWS)]
    waiting = {"product": iter(slabs), "scored": iter(slabs)}

    def multiply() -> None:
        slab = next(waiting["product"])
        for start in range(0, pairs, retrieval.BLOCK_COLUMNS):
            images[slab] @ texts[start : start + retrieval.BLOCK_COLUMNS].T

    def score() -> None:
        slab = next(waiting["scored"])
        retrieval.add_counts(images[slab], texts, right[slab], right, image_counts[:, slab], text_counts)

    readings = paired({"product": multiply, "scored": score}, rounds=len(slabs), warmup=0, seconds=options.seconds)
    report = Report("evaluate")
    facts = {"pairs": pairs, "dim": DIM}
    report.add("bare product of a slab", "s", readings["product"], **facts)
    report.add("scored slab", "s", readings["scored"], **facts)
    report.add("scored / bare product", "ratio", ratios(readings["scored"], readings["product"]), **facts)
    total = {name: sum(values) for name, values in readings.items()}
    report.add("all slabs together, scored / bare product", "ratio", [total["scored"] / total["product"]], **facts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report.add("peak memory of the process", "GiB", [peak], **facts)
    report.finish(options.output)


if __name__ == "__main__":
    main()
