"""From a configuration to what is pretrained: tokenizer, stream, model, objective, evaluation."""

import base64
import io
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmscale.checkpoint import FOLDER, committed
from mmscale.config import Config
from mmscale.data.loader import EvalSet, TrainStream
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.export.clip_vision import with_trunk_settings
from mmscale.export.initial import take_initial_weights
from mmscale.model.flops import training_flops
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.model.presets import build_model, build_model_config
from mmscale.objectives.pretraining import PretrainingObjective, forward_backward
from mmscale.train.engine import Processes
from mmscale.train.optimizer import freeze
from mmscale.train.task import Evaluated, Task

NUM_EXAMPLES, THUMBNAIL = 12, 128  # pictures of each evaluation, and their longer side in pixels


def build_pretraining(config: Config, processes: Processes) -> Task:
    """Everything that a pretraining run needs, the same on every rank. Raises UserError."""
    if config.tokenizer.path is None:
        raise UserError("tokenizer.path: not set; `mmscale tokenizer SHARDS OUT --vocab-size V` makes a tokenizer")
    tokenizer = Tokenizer.load(config.tokenizer.path)
    try:
        sizes = build_model_config(
            with_trunk_settings(config.model),
            tokenizer.vocab_size,
            tokenizer.pad_id,
            tokenizer.start_id,
            tokenizer.end_id,
            contrastive=config.objective.contrastive,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    stream = TrainStream(
        config.data,
        tokenizer,
        image_size=sizes.vision_config.image_size,
        context_length=sizes.text_config.context_length,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch or config.train.global_batch // processes.world_size,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    torch.manual_seed(config.run.seed)
    model = build_model(sizes, config.model.checkpoint, config.model.compile)
    if not committed(Path(config.run.dir) / FOLDER):  # a run that goes on takes its weights from there
        notes = take_initial_weights(model, config.model)
        if processes.is_main:
            print("".join(f"{note}\n" for note in notes), end="", flush=True)
    freeze(model, config.train.freeze)
    objective = PretrainingObjective(model, config.objective, config.run.seed)
    losses = {"contrastive": config.objective.contrastive_weight > 0, "caption": config.objective.caption_weight > 0}
    return Task(
        objective=objective,
        forward_backward=forward_backward,
        stream=stream,
        tokenizer=tokenizer,
        flops_per_sample=lambda text_length: training_flops(sizes, text_length, **losses),
        evaluate=_evaluation(config, model, tokenizer, processes),
    )


def _evaluation(
    config: Config, model: MMScaleModel, tokenizer: Tokenizer, processes: Processes
) -> Callable[[], Evaluated] | None:
    """The in-loop evaluation on `data.val`; None when it is never due."""
    if config.eval.every is None:
        return None
    if config.data.val is None:
        raise UserError("eval.every: needs data.val, the shards to evaluate on")
    from mmscale.evaluate.run import run_evaluation
    from mmscale.evaluate.splits import WHOLE, open_split

    split = partial(open_split, config.data.val, model, tokenizer, config.data, batch_size=config.eval.batch)
    eval_set = split(limit=config.eval.samples)
    pictures = _thumbnails(split(limit=NUM_EXAMPLES, ranks=WHOLE)) if processes.is_main else {}
    autocast = torch.bfloat16 if config.train.precision == "bf16" else None

    def evaluate() -> Evaluated:
        batches = TimeLimit(eval_set, config.eval.max_minutes, processes)
        found = run_evaluation(model, tokenizer, batches, config=config.eval, autocast=autocast)
        captions = found.tasks["caption"].captions if "caption" in found.tasks else []
        examples = [
            {
                "key": caption.key,
                "generated": caption.generated,
                "references": caption.references,
                "jpeg": pictures[caption.position],
            }
            for caption in captions
            if caption.position in pictures
        ]
        return Evaluated(found.scores, examples, was_cut=batches.was_cut)

    return evaluate


class TimeLimit:
    """The batches of a split, until a rank finds that `max_minutes` are over; then all ranks end after the same one."""

    def __init__(self, batches: Iterable[Any], max_minutes: float | None, processes: Processes):
        self._batches, self._max_minutes, self._processes = batches, max_minutes, processes
        self.was_cut = False

    def __iter__(self) -> Iterator[Any]:
        begin, late = time.monotonic(), False
        for batch in self._batches:
            if late:
                self.was_cut = True
                return
            yield batch
            if self._max_minutes is not None:
                late = self._processes.any(time.monotonic() - begin > 60 * self._max_minutes)


def _thumbnails(split: EvalSet) -> dict[int, str]:
    """position -> JPEG in base64, of the good samples of a small split."""
    pictures = {}
    for batch in split:
        for row in batch.valid.nonzero().flatten().tolist():
            image = Image.fromarray(batch.pixel_values[row].permute(1, 2, 0).contiguous().numpy())
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            content = io.BytesIO()
            image.save(content, "JPEG", quality=80)
            pictures[int(batch.positions[row])] = base64.b64encode(content.getvalue()).decode()
    return pictures
