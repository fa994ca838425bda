"""One pass over a split that feeds every task at once.

Each picture is encoded once, whatever the number of tasks. Every sample of the split counts once over all ranks, and
all ranks make the same forwards (a short rank's missing batches are dummies), which ZeRO-3 needs to gather its weights.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from mmscale.config import EvalConfig
from mmscale.data.loader import EvalBatch
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.captioning import Captioning
from mmscale.evaluate.encoding import model_device
from mmscale.evaluate.ranks import sum_over_ranks
from mmscale.evaluate.retrieval import Retrieval
from mmscale.evaluate.vqa import QuestionAnswering
from mmscale.evaluate.zeroshot import ZeroShot
from mmscale.model.modeling_mmscale import MMScaleModel

TASKS = {"zeroshot": ZeroShot, "retrieval": Retrieval, "caption": Captioning, "vqa": QuestionAnswering}
WANTS = {"zeroshot": "class_name", "vqa": "question with answers"}
NEED_DECODER = ("caption", "vqa")


@dataclass
class Evaluation:
    """The scores, flat (`retrieval_image_to_text_r1`, ...) and equal on every rank, and the tasks behind them."""

    scores: dict[str, float]
    tasks: dict[str, ZeroShot | Retrieval | Captioning | QuestionAnswering]


def evaluate(
    model: MMScaleModel,
    tokenizer: Tokenizer,
    eval_set: Iterable[EvalBatch],
    tasks: Sequence[str] | None = None,
    config: EvalConfig | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """The scores alone, as the training loop logs them. Takes what `run_evaluation` takes."""
    return run_evaluation(model, tokenizer, eval_set, tasks, config, autocast).scores


@torch.no_grad()
def run_evaluation(
    model: MMScaleModel,
    tokenizer: Tokenizer,
    eval_set: Iterable[EvalBatch],
    tasks: Sequence[str] | None = None,
    config: EvalConfig | None = None,
    autocast: torch.dtype | None = None,
) -> Evaluation:
    """Scores a model on a split. Collective: all ranks call it with the same tasks and settings.

    Args:
        eval_set: an `EvalSet`, or its first so many batches, as many on every rank.
        tasks: of `zeroshot`, `retrieval`, `caption`, `vqa`. When unset those of `config` that model and data allow:
            writing needs a decoder, zero-shot classification samples with a class, `vqa` samples with a question.
        autocast: compute in this dtype where PyTorch's autocast allows; None computes in the weights' own.

    Raises:
        UserError: a task that was asked for cannot be done; the split holds no good sample.
    """
    config = config or EvalConfig()
    decodes = model.config.decoder_config.layers > 0
    names = tasks or [name for name in config.tasks if decodes or name not in NEED_DECODER]
    running = {name: TASKS[name](model, tokenizer, config) for name in names}
    device = model_device(model)
    num_samples = torch.zeros((), dtype=torch.long, device=device)
    writes = any(name in NEED_DECODER for name in names)
    precision = torch.autocast(device.type, autocast, enabled=autocast is not None)
    with evaluating(model), precision, model.packed_for_generation() if writes else nullcontext():
        for batch in eval_set:
            num_samples += int(batch.valid.sum())
            pixel_values = batch.pixel_values.to(device, non_blocking=True)
            image_embeds, image_tokens = model.encode_image(pixel_values)
            for task in running.values():
                task.add(batch, pixel_values, image_embeds.float(), image_tokens)
        if not sum_over_ranks(num_samples):
            raise UserError("the evaluation split holds no good sample")
        scores = {"num_samples": int(num_samples)}
        for name, task in running.items():
            found = task.finish()
            if not found and tasks:
                raise UserError(f"no sample of the split can be scored by `{name}`: their JSON holds no {WANTS[name]}")
            scores |= found
    return Evaluation(scores, running)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; the mode of before comes back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
