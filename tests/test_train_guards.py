"""What goes wrong in a run is noticed by all ranks alike, written down, and never loses a checkpoint."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import context, free_port, run_ranks
from tiny_task import build_tiny, tiny_config

from mmscale.checkpoint import Checkpoint, committed, find_damage
from mmscale.errors import UserError
from mmscale.train.guards import SkipCounter, SpikeGuard, StopRequests

pytestmark = pytest.mark.slow

STEPS = 20


def lines(folder, name):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def status(folder):
    return json.loads((Path(folder) / "status.json").read_text())


def build_with(positions, value):
    """The tiny task with some samples replaced: their pixels are `value`."""

    def build(config, processes):
        task = build_tiny(config, processes)
        plain = task.stream.batches

        def batches(samples):
            for micro_batches in plain(samples):
                for batch in micro_batches:
                    hit = torch.isin(batch.positions, torch.tensor(positions))
                    batch.x[hit] = value
                yield micro_batches

        task.stream.batches = batches
        return task

    return build


def train_tiny(config, hook=None, positions=(), value=0.0):
    from mmscale.train.trainer import run

    hooks = [hook] if hook else []
    return run(config, build_with(list(positions), value), hooks=hooks)


def train_over_a_nan(folders):
    """The third of twenty batches has a NaN in one sample, which the second of two ranks reads."""
    seen = {}
    for name, sections in folders.items():
        weights = {}

        def note(trainer, update, weights=weights):
            copies = {f.key: f.data for f in trainer.engine.state.fragments() if f.kind in ("param", "exp_avg", "step")}
            weights[trainer.step] = (copies, update.applied)

        code = train_tiny(tiny_config(name, **sections), note, positions=[17], value=float("nan"))
        unchanged = all(torch.equal(t, weights[3][0][key]) for key, t in weights[2][0].items())
        moved = any(not torch.equal(t, weights[4][0][key]) for key, t in weights[3][0].items())
        finite = all(torch.isfinite(t).all() for t in weights[STEPS][0].values())
        applied = [step for step, (_, applied) in weights.items() if applied]
        seen[name] = (code, unchanged, moved, finite, applied)
    return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_params"])
def test_a_nan_on_one_rank_skips_the_update_on_both_in_every_stage(tmp_path, precision):
    folders = {
        str(tmp_path / str(stage)): {"train": {"zero_stage": stage, "precision": precision}} for stage in range(4)
    }
    for seen in run_ranks(2, train_over_a_nan, folders):
        for folder, outcome in seen.items():
            assert outcome == (0, True, True, True, [step for step in range(1, STEPS + 1) if step != 3]), folder
    for folder in folders:
        metrics = lines(folder, "metrics.jsonl")
        assert [line["skipped"] for line in metrics] == [0, 0] + [1] * (STEPS - 2)
        assert metrics[2]["grad_norm"] is None
        assert metrics[2]["loss"] is None
        assert [event["step"] for event in lines(folder, "events.jsonl") if event["event"] == "skip"] == [3]


def stop_at_step_45(trainer, update):
    if trainer.step == 45 and trainer.processes.is_main:
        os.kill(os.getpid(), signal.SIGTERM)


def leap_soon_after_a_restart(folders, guarded):
    """Step 51 leaps, 5 steps after a restart."""
    for folder, stage in folders.items():
        config = tiny_config(folder, train={"samples": 8 * 55, "skip_spikes": guarded, "zero_stage": stage})
        assert train_tiny(config, stop_at_step_45) == 75
        assert train_tiny(config, None, [8 * 50 + 1], 1e4) == 0


@pytest.mark.parametrize("guarded", [True, False])
def test_a_leap_is_skipped_where_that_is_asked_for_in_every_stage(tmp_path, guarded):
    folders = {str(tmp_path / str(stage)): stage for stage in (range(4) if guarded else [1])}
    run_ranks(2, leap_soon_after_a_restart, folders, guarded)
    for folder in folders:
        skips = [event["step"] for event in lines(folder, "events.jsonl") if event["event"] == "skip"]
        assert skips == ([51] if guarded else []), folder
        assert lines(folder, "metrics.jsonl")[-1]["skipped"] == len(skips)


def test_the_spike_guard_compares_with_the_accepted_past():
    guard = SpikeGuard()
    generator = torch.Generator().manual_seed(0)
    values = (2 + 0.1 * torch.randn(200, generator=generator)).tolist()
    assert all(guard.allows(loss=value, grad_norm=1.0 + value) for value in values)
    assert not guard.allows(loss=3.0, grad_norm=3.0)
    assert not guard.allows(loss=2.0, grad_norm=30.0)
    assert not guard.allows(loss=float("nan"), grad_norm=3.0)
    # What one step allows and the last 128 do not: 6 sigma, of values that a new level has not yet replaced.
    assert not guard.allows(loss=2 + 0.1 * 7, grad_norm=3.0)
    assert guard.allows(loss=2 + 0.1 * 4, grad_norm=3.0)
    again = SpikeGuard()
    again.restore(guard.state())
    assert again.state() == guard.state()
    assert guard.allows(loss=2.0, grad_norm=3.0)


def test_the_spike_guard_looks_at_the_last_128_and_at_nothing_before_it_has_32():
    guard = SpikeGuard()
    assert all(guard.allows(loss=1.0 + i % 2 * 1e-6, grad_norm=1.0) for i in range(31))
    assert guard.allows(loss=50.0, grad_norm=1.0), "too early to judge"
    assert not guard.allows(loss=99.0, grad_norm=1.0)
    # The 50 widens what is allowed for as long as it is among the last 128.
    assert all(guard.allows(loss=1.0, grad_norm=1.0) for _ in range(126))
    assert guard.allows(loss=20.0, grad_norm=1.0)
    assert all(guard.allows(loss=1.0, grad_norm=1.0) for _ in range(128))
    assert not guard.allows(loss=20.0, grad_norm=1.0)


def test_too_many_skips_in_a_row_end_the_run(tmp_path):
    counter = SkipCounter(3)
    for skipped in (True, True, False, True, True):
        counter.add(skipped)
    with pytest.raises(UserError, match="3 updates in a row were skipped"):
        counter.add(True)
    config = tiny_config(tmp_path, train={"max_skips": 2})
    with pytest.raises(AssertionError, match=r"UserError: train.max_skips: 2 updates in a row"):
        run_ranks(2, train_tiny, config, None, [40, 48], float("inf"))
    assert status(tmp_path)["status"] == "stopped"
    assert Checkpoint.open(tmp_path).step == 4


def send_at_step_5(trainer, update):
    if trainer.step == 5 and trainer.processes.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)


def make_stop_file_at_step_5(trainer, update):
    if trainer.step == 5 and trainer.processes.is_main:
        (trainer.folder.path / "STOP").touch()


def linger(trainer, update):
    time.sleep(0.05)


@pytest.mark.parametrize(
    ("hook", "run", "reason"),
    [
        (send_at_step_5, {}, "SIGUSR1"),
        (make_stop_file_at_step_5, {}, "STOP file"),
        (linger, {"max_minutes": 0.3 / 60}, "run.max_minutes"),
    ],
)
def test_a_request_to_stop_one_rank_saves_and_ends_all(tmp_path, hook, run, reason):
    config = tiny_config(tmp_path, run={"dir": str(tmp_path)} | run)
    assert run_ranks(2, train_tiny, config, hook) == [75, 75]
    end = status(tmp_path)
    assert (end["status"], end["reason"]) == ("preempted", reason)
    assert Checkpoint.open(tmp_path).samples == end["samples"]
    if reason != "run.max_minutes":
        assert end["step"] == 6, "one step after the request"
    assert not (tmp_path / "STOP").exists(), "obeyed once"
    assert run_ranks(2, train_tiny, tiny_config(tmp_path)) == [0, 0]
    assert [line["step"] for line in lines(tmp_path, "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_the_minutes_of_a_run_count_from_its_start_not_from_its_first_step():
    assert StopRequests(None, 1.0, time.monotonic() - 59).code() == 0
    assert StopRequests.NAMES[StopRequests(None, 1.0, time.monotonic() - 61).code()] == "run.max_minutes"


def two_at_once(trainer, update):
    if trainer.step == 3:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)


def twice_with_a_pause(trainer, update):
    if trainer.step == 3:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(3.1)
        os.kill(os.getpid(), signal.SIGINT)


def test_signals_that_come_together_are_one_request(tmp_path):
    assert run_ranks(1, train_tiny, tiny_config(tmp_path / "a"), two_at_once) == [75]
    with pytest.raises(AssertionError, match="KeyboardInterrupt"):
        run_ranks(1, train_tiny, tiny_config(tmp_path / "b"), twice_with_a_pause)
    assert status(tmp_path / "b")["status"] == "failed"


def limit_files_at_step_6(trainer, update):
    """From here on no file of this process may grow past 4 KiB; checkpoints do not fit, metrics lines must."""
    if trainer.step == 6 and trainer.processes.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    if trainer.step == 14 and trainer.processes.rank == 1:
        assert [path.name for path in committed(trainer.folder.checkpoints)] == ["step_00000004"], "whole, and kept"
        assert not (trainer.folder.checkpoints / "step_00000008").exists(), "what the failed save had written"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_training_outlives_a_save_that_fails(tmp_path):
    config = tiny_config(tmp_path, run={"dir": str(tmp_path), "save_every": 32, "keep_last": 1})
    assert run_ranks(2, train_tiny, config, limit_files_at_step_6, timeout_s=60) == [0, 0]
    events = lines(tmp_path, "events.jsonl")
    failed = {event["step"]: event["reason"] for event in events if event["event"] == "save_failed"}
    assert set(failed) == {8, 12}
    assert "rank 1: OSError" in failed[8] and "File too large" in failed[8]
    whole = [event["step"] for event in events if event["event"] == "save"]
    assert whole == [4, 16, 20]
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000020"]
    assert find_damage(tmp_path / "checkpoints" / "step_00000020") is None


def test_a_failed_save_can_end_the_run(tmp_path):
    config = tiny_config(tmp_path, run={"dir": str(tmp_path), "save_every": 32, "on_save_error": "stop"})
    with pytest.raises(AssertionError, match=r"UserError: run.on_save_error: saving step 8 failed: rank 1: OSError"):
        run_ranks(2, train_tiny, config, limit_files_at_step_6)
    assert Checkpoint.open(tmp_path).step == 4


def limit_files_for_good(trainer, update):
    if trainer.step == 6:
        limit_files_at_step_6(trainer, update)


def stop_in_the_last_step(trainer, update):
    if trainer.step == STEPS - 1:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_whose_last_save_fails_is_neither_finished_nor_preempted(tmp_path):
    config = tiny_config(tmp_path, run={"dir": str(tmp_path), "save_every": 32})
    with pytest.raises(AssertionError, match=r"UserError: run.dir: the last save failed: rank 1: OSError"):
        run_ranks(2, train_tiny, config, limit_files_for_good, timeout_s=60)
    assert status(tmp_path)["status"] == "stopped"
    assert Checkpoint.open(tmp_path).step == 4


def test_a_request_that_comes_with_the_last_step_finds_the_run_finished(tmp_path):
    assert run_ranks(1, train_tiny, tiny_config(tmp_path), stop_in_the_last_step) == [0]
    assert status(tmp_path)["status"] == "finished"


def stop_moving(trainer, update):
    """Rank 1 stops itself, as a debugger or a failing machine would stop it."""
    if trainer.step == 5 and trainer.processes.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def hang(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train_tiny(tiny_config(folder, run={"dir": folder, "hang_s": 6.0, "save_every": 32}), stop_moving)


def test_a_rank_that_stands_still_is_described_and_the_job_ends(tmp_path):
    port = free_port()
    workers = [context.Process(target=hang, args=(rank, port, str(tmp_path))) for rank in range(2)]
    begin = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, begin + 60 - time.monotonic()))
    ended = [not worker.is_alive() for worker in workers]
    for worker in workers:
        worker.kill()
        worker.join()
    assert ended == [True, True]
    assert workers[0].exitcode == 1
    assert workers[1].exitcode == -signal.SIGKILL
    assert "train_tiny" in (tmp_path / "hang" / "rank_00000.txt").read_text()
    assert "State:\tT (stopped)" in (tmp_path / "hang" / "rank_00001.txt").read_text()
    assert Checkpoint.open(tmp_path).step == 4
    end = status(tmp_path)
    assert (end["status"], end["step"]) == ("failed", 5)
    assert end["reason"] == "rank 0: no step for 6 s"


def part_norms_of(stages):
    found = {}
    for name, stage in stages.items():
        train_tiny(tiny_config(name, train={"zero_stage": stage, "samples": 16}))
        found[stage] = (
            [
                {key: value for key, value in line.items() if key.startswith("grad_norm")}
                for line in lines(name, "metrics.jsonl")
            ]
            if os.environ["RANK"] == "0"
            else None
        )
    return found


def test_the_norms_of_the_parts_make_up_the_norm_in_every_stage(tmp_path):
    found = run_ranks(2, part_norms_of, {str(tmp_path / str(stage)): stage for stage in range(4)})[0]
    for line in found[0]:
        assert set(line) == {"grad_norm", "grad_norm_up", "grad_norm_norm", "grad_norm_down"}
        squares = sum(value**2 for key, value in line.items() if key != "grad_norm")
        assert squares**0.5 == pytest.approx(line["grad_norm"], rel=1e-5)
    for stage in (1, 2, 3):
        for line, expected in zip(found[stage], found[0], strict=True):
            assert line == pytest.approx(expected, rel=1e-5), stage


def test_a_run_folder_that_is_not_shared_is_refused(tmp_path):
    with pytest.raises(AssertionError, match=r"UserError: run.dir: .* is not the same folder on every machine"):
        run_ranks(2, check_shared, str(tmp_path))


def check_shared(root):
    from mmscale.train.engine import start_processes
    from mmscale.train.folder import RunFolder

    processes = start_processes()
    folder = RunFolder(Path(root) / str(processes.rank), writes=processes.is_main)
    folder.path.mkdir()
    folder.check_shared(processes, patience_s=0.3)
