"""`mmscale plan` beside measured runs: memory above the imports and step time of short trainings on this machine's CPU.

    python -m benchmarks.plan                              (six minutes; l14 takes 18 GB of memory)
    python -m benchmarks.plan --only tiny-64-z2 l14-2-z0   (added to the readings that are there)
    python -m benchmarks.plan --only                       (measures nothing: the page anew, by today's formulas)

Writes plan.json (raw readings) and plan.md (the table) into benchmarks/results.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, ROOT, environment
from mmscale.config import Config, DataConfig, load_config
from mmscale.data.samples import iter_captions
from mmscale.data.tokenizer import train_tokenizer
from mmscale.data.toy import make_toy
from mmscale.hardware import CPU_OPERATIONS, CPU_RUNTIME, CPU_SLACK, EFFICIENCY, GIB, Gpu, measured_cpu
from mmscale.plan import memory, plan, step_time

WARM_UP = 1  # steps


@dataclass(frozen=True)
class Case:
    """A short training: so many steps of one rank with one thread, in fp32."""

    preset: str
    batch: int
    stage: int
    steps: int
    calibrates: bool = False  # whether the memory of a CPU's malloc was modelled on it
    calibrates_time: bool = False  # whether CPU_OPERATIONS was chosen by its step

    @property
    def name(self) -> str:
        return f"{self.preset}-{self.batch}-z{self.stage}"

    def config(self, folder: str) -> Config:
        overrides = [
            f"run.dir={folder}/run",
            f"data.train={folder}/data/train-*.tar",
            f"tokenizer.path={folder}/tokenizer.model",
            f"model.preset={self.preset}",
            f"train.global_batch={self.batch}",
            f"train.zero_stage={self.stage}",
            "train.samples=1_000_000",
            "log.every=1000",
        ]
        return load_config(ROOT / "configs/toy.yaml", overrides)


CASES = [
    Case("tiny", 16, 2, 30, calibrates=True, calibrates_time=True),
    Case("tiny", 64, 0, 30, calibrates=True),
    Case("tiny", 64, 2, 30, calibrates=True),
    Case("tiny", 64, 3, 30),
    Case("tiny", 128, 1, 30),
    Case("tiny", 256, 2, 12, calibrates=True),
    Case("b32", 8, 0, 8, calibrates=True),
    Case("b32", 8, 2, 8, calibrates=True),
    Case("b16", 4, 1, 6),
    Case("l14", 2, 0, 3),
    Case("l14", 2, 2, 3),
]

# Published throughput per GPU. `parts` are settings over the preset that make its model that of the run: CLIP has no
# decoder and no captioning loss. Texts are padded to `tokens`.
CLIP = {"model.decoder.layers": 0, "model.vision.pooler_queries": 1, "objective.caption_weight": 0}
JUELICH = "https://huggingface.co/mehdidc/test/blob/main/trained_models_info.csv"


@dataclass(frozen=True)
class Published:
    run: str
    source: str
    gpu: str
    gpus: int
    micro_batch: int
    samples_per_s: float  # and GPU
    preset: str
    parts: dict
    tokens: int = 76


PUBLISHED = [
    Published("open_clip CoCa B/32", "", "a100", 8, 256, 773, "b32", {}),
    Published("open_clip CoCa L/14", "", "a100", 8, 64, 70, "l14", {}),
    Published("open_clip CLIP B/32", JUELICH, "a100", 128, 256, 108_844 / 128, "b32", CLIP),
    Published("open_clip CLIP B/32", JUELICH, "a100", 344, 256, 218_174 / 344, "b32", CLIP),
    Published("open_clip CLIP B/16", JUELICH, "a100", 344, 256, 134_240 / 344, "b16", CLIP),
    Published("open_clip CLIP L/14", JUELICH, "a100", 768, 112, 60_328 / 768, "l14", CLIP),
    Published("open_clip CLIP L/14", JUELICH, "a100", 1024, 84, 67_928 / 1024, "l14", CLIP),
    Published("NeMo CLIP g/14", "", "a100", 8, 64, 70, "g14", CLIP),
    Published("NeMo CLIP g/14", "", "h100", 8, 64, 117, "g14", CLIP),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--output", type=Path, default=RESULTS / "plan.json")
    args = parser.parse_args()
    readings = json.loads(args.output.read_text())["readings"] if args.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        make_toy(Path(folder) / "data", samples=1024, shards=2, val_samples=8)
        captions = iter_captions(f"{folder}/data/train-*.tar", DataConfig())
        train_tokenizer(captions, f"{folder}/tokenizer.model", 320)
        published = [compare(item) for item in PUBLISHED]
        for case in [None, *(case for case in CASES if case.name in args.only)]:
            if case:
                readings[case.name] = measure(case, folder)
                print(case.name, json.dumps(readings[case.name]), flush=True)
            # In the order of the cases, whatever was measured when; and written each time, since each takes long.
            readings = {case.name: readings[case.name] for case in CASES if case.name in readings}
            result = {"readings": readings, "published": published}
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            if readings:
                args.output.with_suffix(".md").write_text(table(result, folder))


def measure(case: Case, folder: str) -> dict:
    """Trains in a process of its own, and measures what its imports alone take, and this CPU before and after."""
    width = plan(case.config(folder), 1).setup.model.vision_config.width
    machines = [asdict(measured_cpu(width))]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    found = _python(["-c", "from benchmarks.plan import worker; worker()", case.name, folder], variables)
    imports = _python(["-c", IMPORTS], variables, "\n".join(found.pop("modules")))
    machines.append(asdict(measured_cpu(width)))
    facts = environment()
    kept = ("cpu", "cores", "memory_gib", "packages", "commit", "date")
    return found | {"imports": imports, "machines": machines, "environment": {key: facts[key] for key in kept}}


def _python(arguments: list[str], variables: dict, text: str = "") -> dict | float:
    """The JSON on the last line that a Python process prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=variables, input=text, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# Imports the modules that are named on stdin; what fails to is an alias of something else.
IMPORTS = """
import contextlib, importlib, io, sys, warnings
warnings.simplefilter("ignore")
for name in sys.stdin.read().split():
    with contextlib.suppress(BaseException), contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(name)
from benchmarks.plan import peak_memory
print(peak_memory())
"""


def peak_memory() -> int:
    """Most bytes that this process has held. `ru_maxrss` would count what its parent held when it was started."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def worker() -> None:
    """One case in this process: trains, prints what was read, and leaves without saving."""
    from mmscale.train.engine import Engine
    from mmscale.train.trainer import train

    name, folder = sys.argv[1:]
    case = next(case for case in CASES if case.name == name)
    wall, cpu, held = [], [], []
    plain_step = Engine.step

    def timed_step(*arguments, **options):
        start = time.perf_counter(), time.process_time()
        update = plain_step(*arguments, **options)
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
        return update

    def note(trainer, update) -> None:
        held.append(peak_memory())
        if len(held) < case.steps:
            return
        tokens = trainer.meter.tokens / trainer.meter.samples + 1
        found = {"wall_s": wall, "cpu_s": cpu, "held": held, "text_tokens": round(tokens)}
        print("\n" + json.dumps(found | {"modules": list(sys.modules)}), flush=True)
        os._exit(0)  # a checkpoint of a large model would take minutes

    Engine.step = timed_step
    train(case.config(folder), hooks=[note])


def _machine(reading: dict) -> Gpu:
    """The CPU as it was measured around a reading, with today's calibration."""
    before, after = (Gpu(**machine) for machine in reading["machines"])
    rates = ("flops", "hbm", "element_wise", "operation_s", "weight_s")
    mean = {key: (getattr(before, key) + getattr(after, key)) / 2 for key in rates}
    return replace(before, **mean, runtime=CPU_RUNTIME, slack=CPU_SLACK, operations=CPU_OPERATIONS)


def compare(item: Published) -> dict:
    sizes = [f"{key}={value}" for key, value in item.parts.items()]
    total = item.gpus * item.micro_batch
    sizes += [f"model.preset={item.preset}", f"train.global_batch={total}", f"train.micro_batch={item.micro_batch}"]
    config = load_config(ROOT / "configs/coca_b32.yaml", [*sizes, "train.zero_stage=0"])
    planned = plan(config, item.gpus, item.gpu, text_tokens=item.tokens)
    facts = {key: getattr(item, key) for key in ("run", "source", "gpu", "gpus", "samples_per_s")}
    return facts | {"planned": planned.samples_per_s / item.gpus, "mfu": planned.mfu}


def table(result: dict, folder: str) -> str:
    """The page beside the JSON."""
    first = next(iter(result["readings"].values()))["environment"]
    lines = [
        "# The plan beside measured runs",
        "",
        f"One rank with one thread, fp32, toy captions, {first['cpu']}, torch {first['packages']['torch']}. Memory is "
        "the peak of the process above that of a process which only imports the same modules. A step is forward, "
        "backward and update, without the loader: CPU seconds, median with 10th and 90th "
        "percentile, and the wall's median. The plan's is arithmetic on the speed of one core, measured in CPU seconds "
        "before and after each run (`hardware.measured_cpu`).",
        "",
        "What the tensors take is arithmetic. That malloc keeps freed pages, what a process takes beside its tensors "
        f"({CPU_RUNTIME / 2**20:.0f} MiB), and what malloc holds for a byte of activations ({CPU_SLACK:g}), were "
        "modelled on the memory of the runs marked c; and the operations of a step for each parameter tensor "
        f"({CPU_OPERATIONS}) on the step of the run marked t. The other runs only check them. Nothing here was "
        "measured on a GPU.",
        "",
        "| model | ZeRO | batch | steps | memory, GiB | plan | off | step, CPU s (p10-p90) | wall | plan | off |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        if not (reading := result["readings"].get(case.name)):
            continue
        planned = plan(case.config(folder), 1, text_tokens=reading["text_tokens"])
        setup = replace(planned.setup, gpu=_machine(reading))
        held = (max(reading["held"]) - reading["imports"]) / GIB
        need, step = memory(setup, case.batch).total / GIB, step_time(setup, case.batch).seconds
        row = f"| {case.preset} | {case.stage} | {case.batch} | {case.steps} | {held:.2f}{' c' * case.calibrates} "
        row += f"| {need:.2f} | {need / held - 1:+.0%} | "
        if "cpu_s" in reading:  # the first readings have their memory alone
            low, median, high = np.percentile(reading["cpu_s"][WARM_UP:], [10, 50, 90])
            wall = np.median(reading["wall_s"][WARM_UP:])
            row += f"{median:.3f} ({low:.3f}-{high:.3f}){' t' * case.calibrates_time} | {wall:.3f} "
            row += f"| {step:.3f} | {step / median - 1:+.0%} |"
        else:
            row += "not measured | | | |"
        lines.append(row)
    lines += [
        "",
        "Published runs, samples per second and GPU, texts padded to 76 tokens. The plan is that of mmscale for a "
        "model of the same sizes, not of the program that was measured: it takes matrix products at "
        f"{EFFICIENCY:.0%} of the peak and no time for input, while open_clip's CoCa reached 11 to 12% MFU in all. So "
        "it is what the hardware allows, not what a given program reaches. Micro-batches are assumed where there is no "
        "link. EVA-CLIP names its GPUs and batches, but no throughput that could stand here.",
        "",
        "| run | GPUs | published | plan | off |",
        "|---|---|---|---|---|",
    ]
    for row in result["published"]:
        source = f"[{row['run']}]({row['source']})" if row["source"].startswith("http") else row["run"]
        off = row["planned"] / row["samples_per_s"] - 1
        lines.append(
            f"| {source} | {row['gpus']} {row['gpu'].upper()} | {row['samples_per_s']:,.0f} | {row['planned']:,.0f} "
            f"| {off:+.0%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
