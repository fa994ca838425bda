"""The training loop: one global batch after the other, with everything else as hooks."""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import transformers

import mmscale
from mmscale.checkpoint import Checkpoint, committed, find_damage
from mmscale.config import Config
from mmscale.data import jpeg
from mmscale.errors import UserError
from mmscale.train.bad_samples import BadSamples
from mmscale.train.engine import Engine, Processes, Update, deepspeed_config, start_processes
from mmscale.train.folder import RunFolder, compare_configs
from mmscale.train.guards import Exchange, SkipCounter, SpikeGuard, StopRequests, exchange
from mmscale.train.metrics import Meter, Progress, Sinks, describe, memory_gib, number, peak_flops
from mmscale.train.saving import Saved, Saver
from mmscale.train.schedule import learning_rate
from mmscale.train.task import Task
from mmscale.train.watchdog import Watchdog

EXIT_FINISHED = 0
EXIT_PREEMPTED = 75

# A share of bad samples means little before this many.
FEWEST_SAMPLES_TO_JUDGE = 1000


Hook = Callable[["Trainer", Update], None]


def train(config: Config, *, check: bool = False, hooks: Sequence[Hook] = ()) -> int:
    """Pretrains as the configuration says, going on from the newest checkpoint of `run.dir` when there is one.

    Every rank of a launched job calls it; without a launcher it is one process. `check` builds everything, runs one
    step and writes nothing. `hooks` are called after every step.

    Returns:
        0 when the run is finished, 75 when it was preempted and saved.

    Raises:
        UserError: a mistake in the configuration or the data. Where all ranks know of it, rank 0 raises it and the
            others leave with exit code 2.
    """
    from mmscale.train.pretraining import build_pretraining

    return run(config, build_pretraining, check=check, hooks=hooks)


def run(
    config: Config, build: Callable[[Config, Processes], Task], *, check: bool = False, hooks: Sequence[Hook] = ()
) -> int:
    """`train` for any task: `build` makes it on every rank, with the same weights."""
    begun = time.monotonic()
    processes = start_processes(deterministic=config.run.deterministic)
    folder = RunFolder(config.run.dir, writes=processes.is_main and not check)
    trainer = None

    def reached() -> tuple[int, int]:
        return (trainer.samples, trainer.step) if trainer else (0, 0)

    def note_hang(reason: str) -> None:
        folder.write_status("failed", *reached(), reason, any_rank=not check)

    try:
        with Watchdog(folder.path / "hang", processes, config.run.hang_s, note_hang) as watchdog:
            trainer = Trainer(config, build, processes, folder, watchdog, check=check, hooks=hooks)
            return trainer.run(begun)
    except UserError as error:
        samples, step = reached()
        folder.write_status("stopped" if step else "refused", samples, step, str(error))
        raise
    except BaseException as error:
        folder.write_status("failed", *reached(), f"{type(error).__name__}: {error}")
        raise
    finally:
        if trainer:
            trainer.close()
        folder.close()


class Trainer:
    """A run between its start and its end. `samples` and `step` count what updates have consumed."""

    def __init__(
        self,
        config: Config,
        build: Callable[[Config, Processes], Task],
        processes: Processes,
        folder: RunFolder,
        watchdog: Watchdog,
        *,
        check: bool,
        hooks: Sequence[Hook],
    ):
        self.config, self.processes, self.folder, self.watchdog = config, processes, folder, watchdog
        self.check = check
        self.step = self.samples = self.num_bad = 0
        self.bad = BadSamples(folder)
        self.skips = SkipCounter(config.train.max_skips)
        self.spikes = SpikeGuard()
        # A mistake here is told before anything is read.
        processes.agree(lambda: deepspeed_config(config, processes.world_size, processes.device))
        self.task: Task = processes.agree(lambda: build(config, processes))
        if not check:
            processes.agree(lambda: folder.create() if processes.is_main else None)
            folder.check_shared(processes)
        checkpoint = None if check else self._find_checkpoint()
        changes = processes.agree(lambda: self._check_same_run(checkpoint)) if checkpoint else []
        self.engine: Engine = processes.agree(
            lambda: Engine(self.task.objective, self.task.forward_backward, config, processes)
        )
        if config.train.skip_spikes:
            self.engine.allows = self._is_no_spike
        self.saver = Saver(
            folder.checkpoints, processes, keep_last=config.run.keep_last, keep_every=config.run.keep_every
        )
        if checkpoint is not None:
            self._restore(checkpoint, changes)
        total = -(-config.train.samples // config.train.global_batch)
        self.last_step = self.step + max(0, -(-(config.train.samples - self.samples) // config.train.global_batch))
        self.progress = Progress(config.train.samples, self.samples, shows=processes.is_main)
        self.meter = Meter()
        self.sinks = Sinks(folder, config.log, config.model_dump(mode="json"), self.step)
        self.hooks: list[tuple[Callable[[], bool], Hook]] = [
            *((lambda: True, hook) for hook in hooks),
            (self._log_is_due, Trainer.log),
            (self._save_is_due, Trainer.save),
            (self._evaluation_is_due, Trainer.evaluate),
        ]
        if config.data.decode == "fast" and not jpeg.AVAILABLE:
            self.progress.say(jpeg.MISSING)
        if self.last_step == self.step and processes.is_main and not check:
            self.progress.say(
                f"{folder.path}: already at {self.samples} of {total * config.train.global_batch} samples"
            )

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self, begun: float) -> int:
        """Trains until the last sample or a request to stop; returns the exit code. `begun`: see `StopRequests`."""
        self.folder.write_config(self.config)
        self.folder.cut(self.samples)
        self.bad.restore()
        self.folder.write_status("running", self.samples, self.step)
        batches = self._batches()
        stop_file = None if self.check else self.folder.path / "STOP"
        stop = 0
        with StopRequests(stop_file, self.config.run.max_minutes, begun) as requests:
            self.meter = Meter()
            while not (self._is_last() or self._has_the_best() or stop):
                micro_batches, waited = next(batches)
                update = self.engine.step(
                    micro_batches, self._learning_rate(), samples=self.samples, part_norms=self._log_is_next()
                )
                self.step += 1
                self.samples += self.config.train.global_batch
                stop = self._exchange(requests.code(), micro_batches, waited).stop
                self._after_update(update)
                for hook in self.due_hooks():
                    hook(self, update)
                self.watchdog.beat()
                if self.check:
                    return self._finish_check(update)
            with self.watchdog.patience():
                done = self._is_last() or self._has_the_best()
                return self._finished() if done else self._preempted(StopRequests.NAMES[stop])

    def due_hooks(self) -> Iterator[Hook]:
        yield from (hook for is_due, hook in self.hooks if is_due())

    def _batches(self) -> Iterator[tuple[list[Any], float]]:
        """This rank's micro-batches of one global batch after the other, and the seconds that it waited for them."""
        source = iter(self.task.stream.batches(self.samples))
        while True:
            start = time.perf_counter()
            micro_batches = next(source)
            waited = time.perf_counter() - start
            # What is random in a step depends on where it stands in the stream, and on nothing that came before it.
            entropy = [self.config.run.seed, self.samples, self.processes.rank]
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
            yield micro_batches, waited

    def _learning_rate(self) -> float:
        train = self.config.train
        return learning_rate(self.config.optim, self.samples, train.global_batch, train.samples)

    def _after_update(self, update: Update) -> None:
        if update.applied and self.engine.average is not None:
            self.engine.average.update(self.step - self.skips.total)
        if update.applied:
            self.skips.add(False)
        else:
            self.folder.event("skip", self.step, self.samples, loss=number(update.values.get("loss")))
            self.processes.agree(lambda: self.skips.add(True))

    def _is_no_spike(self, values: dict[str, torch.Tensor], norm: torch.Tensor) -> bool:
        return self.spikes.allows(loss=float(values["loss"]), grad_norm=float(norm))

    def _exchange(self, stop: int, micro_batches: list[Any], waited: float) -> Exchange:
        bad = [sample for batch in micro_batches for sample in batch.bad]
        seen = exchange(
            self.processes,
            stop=stop,
            save_failed=self.saver.failed,
            save_busy=self.saver.is_busy,
            data_wait_s=waited,
            num_bad=len(bad),
            num_tokens=sum(int(batch.lengths.sum()) for batch in micro_batches),
            num_padded_tokens=sum(batch.input_ids.numel() for batch in micro_batches),
        )
        self.meter.add(self.config.train.global_batch, seen)
        self.progress.advance(self.samples)
        if seen.save_failed:
            self.saver.abandon()
        if self.saver.is_under_way and (seen.save_failed or not seen.save_busy):
            self._report_save(self.saver.flush())
        if seen.num_bad:
            self._note_bad(bad)
        return seen

    def _note_bad(self, bad: list[Any]) -> None:
        everywhere = sorted((b for part in self.processes.gather(bad) for b in part), key=lambda b: b.position)
        self.num_bad += len(everywhere)
        self.bad.add(everywhere)
        allowed = self.config.data.max_bad_fraction * max(self.samples, FEWEST_SAMPLES_TO_JUDGE)
        if self.num_bad > allowed:
            last = everywhere[-1]
            self.processes.refuse(
                f"data.max_bad_fraction: {self.num_bad} of the first {self.samples} samples are bad, the worst shard "
                f"is {self.bad.worst_shard()}, the last of them {last.shard}/{last.key}: {last.reason} "
                f"(all are in {self.folder.path / 'bad_samples.jsonl'})"
            )

    # --- hooks ----------------------------------------------------------------------------------------------------

    def _crossed(self, every: int | None) -> bool:
        """True when the last step consumed a multiple of `every` samples."""
        return every is not None and self.samples // every > (self.samples - self.config.train.global_batch) // every

    def _is_last(self) -> bool:
        return self.samples >= self.config.train.samples

    def _has_the_best(self) -> bool:
        """True when enough evaluations have shown that it becomes no better."""
        return self.task.selection is not None and self.task.selection.exhausted

    def _log_is_due(self) -> bool:
        return self.step == 1 or self.step % self.config.log.every == 0 or self._is_last()

    def _log_is_next(self) -> bool:
        return self.step == 0 or (self.step + 1) % self.config.log.every == 0 or self.step + 1 == self.last_step

    def _save_is_due(self) -> bool:
        # Before an evaluation too, which can then lose nothing.
        due = self._crossed(self.config.run.save_every) or self._evaluation_is_due() or self._is_last()
        return due and not self.check

    def _evaluation_is_due(self) -> bool:
        return self.task.evaluate is not None and not self.check and self._crossed(self.config.eval.every)

    def log(self, update: Update) -> None:
        """One line of metrics.jsonl and one on the terminal. Only here does the loop wait for the device."""
        values = {key: number(value) for key, value in update.values.items()}
        stream, rank0 = self.task.stream, self.processes.is_main
        text_length = self.meter.padded_tokens / max(self.meter.samples, 1)
        flops = self.task.flops_per_sample(text_length) if self.task.flops_per_sample else None
        peak = peak_flops(self.processes.device)
        record = {
            "step": self.step,
            "samples": self.samples,
            "epoch": stream.epoch(self.samples),
            **values,
            "lr": update.lr,
            "grad_norm": number(update.grad_norm),
            **{f"grad_norm_{part}": number(norm) for part, norm in update.part_norms.items()},
            **self.meter.rates(flops, peak and peak * self.processes.world_size),
            "mem_gib": memory_gib(self.processes.device),
            "skipped": self.skips.total,
            "bad_samples": self.num_bad,
        }
        if rank0:
            self.sinks.line(record)
            eta = (self.config.train.samples - self.samples) / record["samples_per_s"]
            self.progress.say(describe(record, self.last_step, eta))
        self.meter = Meter()

    def save(self, update: Update | None = None) -> None:
        """Starts to save this step; waits only for the copy, and for the save before it."""
        if self.saver.step == self.step:
            return
        if self.processes.is_main:
            self.folder.sync()
        tokenizer = getattr(self.task.tokenizer, "path", None)
        with self.meter.pause("save_stall"), self.watchdog.patience():
            previous = self.saver.save(self.engine.state, self._facts(), Path(tokenizer) if tokenizer else None)
        self._report_save(previous)

    def evaluate(self, update: Update | None = None) -> None:
        """Scores the validation split on all ranks and logs what came out."""
        with self.meter.pause("evaluation"), self.watchdog.patience():
            found = self.task.evaluate()
        at = {"step": self.step, "samples": self.samples}
        if self.processes.is_main:
            self.sinks.scores(at | found.scores)
            for example in found.examples:
                self.folder.append("examples.jsonl", at | example)
            shown = " ".join(f"{key} {value:.3f}" for key, value in found.scores.items() if isinstance(value, float))
            self.progress.say(f"evaluation at step {self.step}: {shown}")
        if found.was_cut:
            self.folder.event("evaluation_cut", self.step, self.samples, num_samples=found.scores["num_samples"])
            self.progress.say(f"eval.max_minutes: time ran out after {found.scores['num_samples']} samples")
        if self.task.selection is not None and self.task.selection.add(self.step, found.scores):
            self.saver.keep_best(self.step)

    def _report_save(self, saved: Saved | None) -> None:
        if saved is None:
            return
        kind = "save_failed" if saved.error else "save"
        self.folder.event(
            kind,
            saved.step,
            saved.samples,
            stall_s=round(saved.stall_s, 4),
            total_s=round(saved.total_s, 4),
            **({"reason": saved.error} if saved.error else {}),
        )
        if saved.error and self.config.run.on_save_error == "stop":
            self.processes.refuse(f"run.on_save_error: saving step {saved.step} failed: {saved.error}")
        if saved.error:
            self.progress.say(f"saving step {saved.step} failed, training goes on: {saved.error}")

    def _facts(self) -> dict[str, Any]:
        """The manifest's part that is not tensors."""
        train = self.config.train
        return {
            "step": self.step,
            "samples": self.samples,
            "skipped": self.skips.total,
            "skipped_in_a_row": self.skips.in_a_row,
            "spikes": self.spikes.state(),
            "bad_samples": self.num_bad,
            "stream": self.task.stream.state(self.samples),
            "learning_rate": self._learning_rate(),
            "tokenizer": getattr(self.task.tokenizer, "fingerprint", None),
            "groups": self.engine.state.group_settings(),
            "loss_scale": self.engine.state.loss_scale(),
            "world_size": self.processes.world_size,
            "zero_stage": train.zero_stage,
            "random": "seeded at every step from (run.seed, samples, rank)",
            "versions": {
                "mmscale": mmscale.__version__,
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "config": self.config.model_dump(mode="json"),
        }

    # --- start and end --------------------------------------------------------------------------------------------

    def _find_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; every rank sums a part of its files."""
        folders = self.processes.broadcast([str(path) for path in reversed(committed(self.folder.checkpoints))])
        for folder in map(Path, folders):
            share = (self.processes.rank, self.processes.world_size)
            damage = [found for found in self.processes.gather(find_damage(folder, share=share)) if found]
            if not damage:
                return Checkpoint.open_verified(folder)
            if self.processes.is_main:
                print(f"{folder}: damaged checkpoint, not used: {damage[0]}", flush=True)
                self.folder.event("damaged_checkpoint", 0, 0, folder=folder.name, reason=damage[0])
        return None

    def _check_same_run(self, checkpoint: Checkpoint) -> list[str]:
        changes = compare_configs(checkpoint.config, self.config)
        fingerprint = getattr(self.task.tokenizer, "fingerprint", None)
        if fingerprint != checkpoint.manifest["tokenizer"]:
            raise UserError(
                f"tokenizer.path: {self.config.tokenizer.path} is not the tokenizer of {checkpoint.path}, which holds "
                f"a copy of it; set tokenizer.path back, or start a new run with another run.dir"
            )
        try:
            self.task.stream.check_state(checkpoint.manifest["stream"])
        except UserError as error:
            raise UserError(f"data.train: {error}") from None
        return changes

    def _restore(self, checkpoint: Checkpoint, changes: list[str]) -> None:
        manifest = checkpoint.manifest
        self.step, self.samples = manifest["step"], manifest["samples"]
        self.skips.total, self.skips.in_a_row = manifest["skipped"], manifest["skipped_in_a_row"]
        self.spikes.restore(manifest["spikes"])
        self.num_bad = manifest["bad_samples"]
        self.engine.state.restore(checkpoint)
        self.saver.step = self.step
        self._restore_selection()
        self.folder.event(
            "resume",
            self.step,
            self.samples,
            changes=changes,
            ranks=self.processes.world_size,
            folder=checkpoint.path.name,
        )
        if self.processes.is_main:
            for text in (f"going on from {checkpoint.path} at sample {self.samples}", *changes):
                print(text, flush=True)

    def _restore_selection(self) -> None:
        """The evaluations up to the checkpoint are in the run folder: they say what was best, and how long ago."""
        if self.task.selection is None:
            return
        for line in self.processes.broadcast(self.folder.evaluations(self.samples)):
            scores = {name: value for name, value in line.items() if name not in ("step", "samples")}
            if self.task.selection.add(line["step"], scores):
                self.saver.keep_best(line["step"])

    def _flush_save(self) -> None:
        """Waits for the last save, without which nobody may say that the run is over."""
        saved = self.saver.flush()
        self._report_save(saved)
        if saved is not None and saved.error:
            self.processes.refuse(
                f"run.dir: the last save failed: {saved.error}; the next call goes on from the checkpoint before it"
            )

    def _finished(self) -> int:
        self._flush_save()
        self._end("finished")
        return EXIT_FINISHED

    def _preempted(self, reason: str) -> int:
        self.save()
        self._flush_save()
        self.folder.event("preempted", self.step, self.samples, reason=reason)
        if self.folder.writes:
            (self.folder.path / "STOP").unlink(missing_ok=True)  # it has been obeyed; the next call goes on
        self._end("preempted", reason)
        return EXIT_PREEMPTED

    def close(self) -> None:
        """Ends what runs beside the loop: loader, progress bar, connections."""
        self.sinks.close()
        self.progress.close()
        self.task.stream.close()

    def _end(self, status: str, reason: str = "") -> None:
        self.folder.write_status(status, self.samples, self.step, reason)
        self.processes.gather(None)  # nobody leaves, and so takes the others down, before all is written

    def _finish_check(self, update: Update) -> int:
        if self.processes.is_main:
            print(f"check: one step ran, loss {number(update.values['loss']):.4f}; nothing was written", flush=True)
        return EXIT_FINISHED
