"""`mmscale plan` beside measured runs: memory above the import and step time of short trainings on this machine's CPU.

    python -m benchmarks.plan --sizes tiny b32        (minutes; b32 takes 8 GB of memory, l14 17 GB)

Writes plan.json (raw readings) and plan.md (the table) into benchmarks/results.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, ROOT, environment
from mmscale.config import DataConfig, load_config
from mmscale.data.samples import iter_captions
from mmscale.data.tokenizer import train_tokenizer
from mmscale.data.toy import make_toy
from mmscale.hardware import GIB, measured_cpu
from mmscale.plan import Setup, memory, plan, step_time

# preset: (batch, steps); image_size and depth are the preset's own.
CASES = {"tiny": (64, 30), "b32": (8, 8), "l14": (2, 5)}
WARM_UP = 2  # steps

# Published throughput per GPU, and what is known about how it came about.
PUBLISHED = [
    ("open_clip, CoCa B/32 on A100", "a100", "coca_b32", 8, 773),
    ("open_clip, CoCa L/14 on A100", "a100", "coca_l14", 8, 70),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "b32"], choices=CASES)
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "plan.json")
    args = parser.parse_args()
    readings = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_toy(data, samples=512, shards=2, val_samples=8)
        tokenizer = Path(folder) / "tokenizer.model"
        train_tokenizer(iter_captions(f"{data}/train-*.tar", DataConfig()), str(tokenizer), 320)
        for size in args.sizes:
            for stage in args.stages:
                run = Path(folder) / f"{size}-{stage}"
                readings.append(measure(size, stage, data, tokenizer, run))
                print(json.dumps(readings[-1]), flush=True)
    result = {"environment": environment(), "readings": readings, "published": published()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(table(result))


def measure(size: str, stage: int, data: Path, tokenizer: Path, run: Path) -> dict:
    """Trains a few steps in a process of its own and plans the same."""
    batch, steps = CASES[size]
    overrides = [
        f"run.dir={run}",
        f"data.train={data}/train-*.tar",
        f"data.val={data}/val-*.tar",
        f"tokenizer.path={tokenizer}",
        f"model.preset={size}",
        f"train.global_batch={batch}",
        f"train.samples={batch * steps}",
        f"train.zero_stage={stage}",
        "log.every=1",
    ]
    environment_ = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [sys.executable, "-m", "mmscale", "train", "configs/toy.yaml", *overrides],
        cwd=ROOT,
        env=environment_,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    base = float(subprocess.check_output([sys.executable, "-c", IMPORT_MEMORY], cwd=ROOT, env=environment_))
    config = load_config(ROOT / "configs/toy.yaml", overrides)
    tokens = round(lines[-1]["num_tokens"] / batch) + 1
    planned = plan(config, 1, text_tokens=tokens)
    setup: Setup = replace(planned.setup, gpu=measured_cpu(threads=1))
    step = step_time(setup, batch)
    return {
        "size": size,
        "zero_stage": stage,
        "batch": batch,
        "text_tokens": tokens,
        "measured_gib": max(line["mem_gib"] for line in lines) - base,
        "planned_gib": memory(setup, batch).total / GIB,
        "measured_s": [line["step_s"] for line in lines],
        "planned_s": step.seconds,
        "planned_parts_s": {"products": step.products, "element-wise": step.element_wise, "optimizer": step.optimizer},
    }


# What a process holds that has imported what training imports, and made nothing yet.
IMPORT_MEMORY = """
import mmscale.train.pretraining, mmscale.train.trainer, resource
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def published() -> list[dict]:
    rows = []
    for name, gpu, config, gpus, measured in PUBLISHED:
        planned = plan(load_config(ROOT / f"configs/{config}.yaml"), gpus, gpu)
        rows.append({"run": name, "measured": measured, "planned": planned.samples_per_s / gpus})
    return rows


def table(result: dict) -> str:
    """The page beside the JSON."""
    env = result["environment"]
    lines = [
        "# The plan beside measured runs",
        "",
        f"One rank with one thread, fp32, {env['cpu']}, torch {env['packages']['torch']}, commit {env['commit']}.",
        "Memory is the process's peak above that of its imports; a step's time is the median, with its 10th and 90th "
        "percentile. Load on the machine shows in the times, not in the memory.",
        "",
        "| model | ZeRO | batch | memory, GiB | plan | off | step, s (p10-p90) | plan | off |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["readings"]:
        low, median, high = np.percentile(row["measured_s"], [10, 50, 90])
        memory_off, step_off = row["planned_gib"] / row["measured_gib"] - 1, row["planned_s"] / median - 1
        lines.append(
            f"| {row['size']} | {row['zero_stage']} | {row['batch']} | {row['measured_gib']:.2f} "
            f"| {row['planned_gib']:.2f} | {memory_off:+.0%} | {median:.3f} ({low:.3f}-{high:.3f}) "
            f"| {row['planned_s']:.3f} | {step_off:+.0%} |"
        )
    lines += [
        "",
        "Published runs, samples per second and GPU. The plan lies far above them. Slower input pipelines and "
        "padding to 76 tokens may be why; that has not been checked.",
        "",
        "| run | published | plan |",
        "|---|---|---|",
    ]
    lines += [f"| {row['run']} | {row['measured']:,.0f} | {row['planned']:,.0f} |" for row in result["published"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
