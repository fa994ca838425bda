"""Kills a two-process run at random instants until it is done, and proves that nothing was lost or trained twice.

    python tests/crash.py --kills 50 [--same-shape] [--seed 0]

One rank or all of them get SIGKILL: at a random moment, or just as a checkpoint is being written. The run is started
again each time, with 1 or 2 ranks and ZeRO 0 to 3 at random unless `--same-shape`. At the end weights and metrics
are compared with those of a run that was left alone, and the log of consumed positions must hold each exactly once.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ranks import context, free_port

from mmscale.checkpoint import Checkpoint
from mmscale.config import Config, validate

BATCH, SAVE_EVERY = 8, 2

Shape = tuple[int, int]  # ranks, ZeRO stage
SHAPES: list[Shape] = [(ranks, stage) for ranks in (1, 2) for stage in (0, 1, 2, 3)]
SAME: list[Shape] = [(2, 2)]


def make_data(folder: Path) -> None:
    """48 toy pairs in three shards and a tokenizer."""
    from mmscale.data.tokenizer import train_tokenizer
    from mmscale.data.toy import make_toy

    make_toy(folder / "data", samples=48, shards=3, val_samples=8)
    colours, shapes = ("red", "green", "blue", "yellow"), ("circle", "star", "cross")
    captions = [f"a {colour} {shape} above two small squares" for colour in colours for shape in shapes]
    train_tokenizer(captions, folder / "tokenizer.model", 290)


def config(data: Path, run_dir: Path, steps: int, zero_stage: int) -> Config:
    return validate(
        {
            "run": {"dir": str(run_dir), "save_every": SAVE_EVERY * BATCH, "keep_last": 3},
            "data": {"train": str(data / "data" / "train-*.tar"), "workers": 1},
            "tokenizer": {"path": str(data / "tokenizer.model")},
            "model": {
                "embed_dim": 32,
                "vision": {"image_size": 32, "width": 32, "layers": 1, "pooler_queries": 5},
                "text": {"width": 32, "layers": 1},
                "decoder": {"layers": 1},
            },
            # Low enough that training does not amplify rounding. At 2e-3, runs that nobody disturbs end with weights up
            # to 9e-4 apart after 420 steps when their shapes differ, and 1.5e-3 when the initial weights of one shape
            # differ in the last bit; at 3e-4, shapes end 4e-6 apart. More would hide what is looked for here.
            "optim": {"lr": 3e-4, "warmup_samples": 24},
            "train": {"samples": steps * BATCH, "global_batch": BATCH, "zero_stage": zero_stage},
            "log": {"every": 1},
        }
    )


def work(rank: int, world_size: int, port: int, settings: Config, positions_log: str) -> None:
    """One rank; every global batch that it takes for training is noted before it is trained on."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from mmscale.train.pretraining import build_pretraining
    from mmscale.train.trainer import run

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115

    def build(settings, processes):
        task = build_pretraining(settings, processes)
        plain = task.stream.batches

        def noted(samples):
            for micro_batches in plain(samples):
                positions = [int(p) for batch in micro_batches for p in batch.positions]
                with open(positions_log, "a") as file:
                    file.write(json.dumps({"start": samples, "positions": positions}) + "\n")
                yield micro_batches

        task.stream.batches = noted
        return task

    try:
        code = run(settings, build)
    except BaseException:
        code = 1
    os._exit(code)


@dataclass
class Attempt:
    ranks: int
    zero_stage: int
    log: Path
    killed: bool = False
    in_save: bool = False
    others_ended_s: float = 0.0


def start(settings: Config, ranks: int, log: Path) -> list:
    port = free_port()
    workers = [
        context.Process(target=work, args=(rank, ranks, port, settings, f"{log}.{rank}")) for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    return workers


def wait_for_the_moment(rng: random.Random, workers: list, checkpoints: Path, in_save: bool) -> bool:
    """Returns True when it is time to kill, False when the run ended first."""

    def unfinished() -> set[str]:
        return {p.name for p in checkpoints.glob("step_*") if not (p / "manifest.json").exists()}

    old = unfinished()
    deadline = time.monotonic() + rng.uniform(0.3, 3.0)
    if in_save:
        skip = rng.randrange(3)
        while all(worker.is_alive() for worker in workers):
            new = unfinished() - old
            if new and skip == 0:
                time.sleep(rng.uniform(0.0, 0.02))
                return True
            if new:
                old, skip = old | new, skip - 1
            time.sleep(0.0005)
        return False
    while time.monotonic() < deadline:
        if not all(worker.is_alive() for worker in workers):
            return False
        time.sleep(0.005)
    return True


def end(workers: list, patience_s: float) -> float:
    """Waits for all to end, and ends them after a while as a launcher would; returns how long it took."""
    begin = time.monotonic()
    for worker in workers:
        worker.join(max(0.0, begin + patience_s - time.monotonic()))
    took = time.monotonic() - begin
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()
    return took


def crash(folder: Path, steps: int, kills: int, *, seed: int = 0, shapes: Sequence[Shape] = SHAPES) -> list[Attempt]:
    """Runs until done with up to `kills` kills on the way; leaves the run in `folder`/run."""
    rng = random.Random(seed)
    attempts: list[Attempt] = []
    while True:
        ranks, stage = rng.choice(shapes)
        attempt = Attempt(ranks, stage, folder / f"positions_{len(attempts):03d}")
        attempts.append(attempt)
        workers = start(config(folder, folder / "run", steps, stage), ranks, attempt.log)
        if sum(a.killed for a in attempts) < kills:
            attempt.in_save = rng.random() < 0.6
            if wait_for_the_moment(rng, workers, folder / "run" / "checkpoints", attempt.in_save):
                attempt.killed = True
                # Before, a rank may still wait for the others to come; ending it is then up to the launcher.
                training = all(Path(f"{attempt.log}.{rank}").exists() for rank in range(ranks))
                victims = workers if rng.random() < 0.5 else [rng.choice(workers)]
                for victim in victims:
                    victim.kill()
                took = end(workers, patience_s=20.0)
                attempt.others_ended_s = took if training else 0.0
        if not attempt.killed:
            end(workers, patience_s=120.0)
        status = (
            json.loads((folder / "run" / "status.json").read_text())
            if (folder / "run" / "status.json").exists()
            else {}
        )
        print(
            f"{len(attempts):3d}: {ranks} ranks, ZeRO {stage}, killed {attempt.killed} (in a save: {attempt.in_save}), "
            f"others ended after {attempt.others_ended_s:.1f} s, {status.get('status')}"
        )
        if not attempt.killed and status.get("status") == "finished":
            return attempts
        assert attempt.killed or kills == 0 or status.get("status") == "finished", f"failed by itself: {status}"


def consumed(attempts: list[Attempt], steps: int) -> list[int]:
    """The positions that went into the final weights: of each attempt, those before the next one's start."""
    taken = []
    for attempt in attempts:
        lines = []
        for rank in range(attempt.ranks):
            log = Path(f"{attempt.log}.{rank}")
            if log.exists():
                lines += [json.loads(line) for line in log.read_text().splitlines()]
        if lines:
            taken.append((min(line["start"] for line in lines), [p for line in lines for p in line["positions"]]))
    starts = [begin for begin, _ in taken[1:]] + [steps * BATCH]
    return sorted(p for (_, positions), stop in zip(taken, starts, strict=True) for p in positions if p < stop)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(run_dir)
    kinds = checkpoint.manifest["tensors"]
    return {f"{kind}/{name}": checkpoint.read(name, kind) for kind in kinds for name in checkpoint.names(kind)}


def verify(folder: Path, reference: Path, steps: int, attempts: list[Attempt], *, exact: bool) -> dict[str, float]:
    """Asserts that the run in `folder` equals the one in `reference`; returns the largest differences."""
    assert consumed(attempts, steps) == list(range(steps * BATCH)), "a position is missing or was trained twice"
    ours, theirs = weights(folder / "run"), weights(reference / "run")
    assert ours.keys() == theirs.keys()
    worst = max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)
    lines, expected = (
        [json.loads(line) for line in (f / "run" / "metrics.jsonl").read_text().splitlines()]
        for f in (folder, reference)
    )
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(1, steps + 1))
    loss = max(abs(a["loss"] - b["loss"]) for a, b in zip(lines, expected, strict=True))
    assert (worst, loss) == (0.0, 0.0) if exact else max(worst, loss) <= 1e-4, (worst, loss)
    return {"weights": worst, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--same-shape", action="store_true", help="always two ranks and ZeRO 2; compared bit for bit")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        reference, other, folder = (Path(scratch) / name for name in ("reference", "other", "crash"))
        for place in (reference, folder):
            make_data(place)
        steps = 20 + 8 * args.kills  # so that a run lasts long enough to be killed so often
        crash(reference, steps, 0, shapes=SAME)
        if not args.same_shape:
            make_data(other)
            attempts = crash(other, steps, 0, shapes=[(1, 0)])
            rounding = verify(other, reference, steps, attempts, exact=False)
            print(f"two shapes left alone differ by {rounding['weights']:.1e}, in losses by {rounding['loss']:.1e}")
        begin = time.monotonic()
        attempts = crash(folder, steps, args.kills, seed=args.seed, shapes=SAME if args.same_shape else SHAPES)
        differences = verify(folder, reference, steps, attempts, exact=args.same_shape)
        killed = [attempt for attempt in attempts if attempt.killed]
        slowest = max((a.others_ended_s for a in killed), default=0)
        print(
            f"{len(killed)} kills ({sum(a.in_save for a in killed)} in a save), {len(attempts)} starts in "
            f"{time.monotonic() - begin:.0f} s; largest difference of weights {differences['weights']:.1e}, of losses "
            f"{differences['loss']:.1e}; the others ended within {slowest:.1f} s"
        )


if __name__ == "__main__":
    main()
