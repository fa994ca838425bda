"""How long a run takes to be under way again: from the shards' names to the first batch, at sample 0 and far inside.

    python -m benchmarks.resume [--quick] [--output FILE.json]

Position is one integer, so going on at sample 5,000,000,000 has to cost what starting at 0 costs. Timed: building the
stream (expanding names, reading the sidecar indexes), and its first global batch, decoded.
"""

import tempfile
from pathlib import Path

from benchmarks.common import Report, paired, parser, ratios
from benchmarks.scaling import toy_job
from mmscale.config import DataConfig
from mmscale.data.loader import TrainStream
from mmscale.data.tokenizer import Tokenizer

FAR = 5_000_000_000
BATCH = 256


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    report = Report("resume")
    with tempfile.TemporaryDirectory() as scratch:
        job = toy_job(Path(scratch), batch=BATCH)
        tokenizer = Tokenizer.load(job["tokenizer"]["path"])
        data = DataConfig(train=job["data"]["train"], workers=0)
        shape = {"image_size": 64, "context_length": 32, "seed": 0, "rank": 0, "world_size": 1}

        def first_batch(samples: int) -> None:
            stream = TrainStream(data, tokenizer, global_batch=BATCH, micro_batch=BATCH, **shape)
            next(iter(stream.batches(samples)))
            stream.close()

        far = FAR // BATCH * BATCH
        cases = {"at sample 0": lambda: first_batch(0), f"at sample {far:,}": lambda: first_batch(far)}
        times = paired(cases, rounds=10 if args.quick else 50)
        for name, readings in times.items():
            report.add(f"stream to first batch, {name}", "s", readings, batch=BATCH)
        start, later = times.values()
        report.add("far against start", "ratio", ratios(later, start))
    report.finish(args.output)


if __name__ == "__main__":
    main()
