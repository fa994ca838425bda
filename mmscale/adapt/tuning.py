"""What every method that trains has in common: the stream with labels, the dev split, the trainer's `Task`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmscale.adapt.base import adapted_model, load_base
from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.objective import AdaptationObjective, AdaptationTask, forward_backward
from mmscale.config import Paths
from mmscale.data.loader import EvalSet, TrainStream
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate import splits
from mmscale.evaluate.run import evaluating
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.train.engine import Processes
from mmscale.train.selection import Selection
from mmscale.train.task import Evaluated, Task
from mmscale.train.trainer import run

MakeTasks = Callable[[MMScaleModel, Tokenizer], Sequence[AdaptationTask]]
BuildModel = Callable[[AdaptConfig, Tokenizer], MMScaleModel]
MakeStream = Callable[[AdaptConfig, MMScaleModel, Tokenizer, dict[str, int]], Any]


def tune(
    config: AdaptConfig,
    make_tasks: MakeTasks,
    build_model: BuildModel | None = None,
    make_stream: MakeStream | None = None,
) -> int:
    """Trains the tasks as pretraining is trained, and as it resumes; returns the trainer's exit code.

    Args:
        config: of `mmscale.adapt.base.complete`, so that what is saved stands alone.
        make_tasks: the tasks, made once the model is there.
        build_model: the model on every rank, with the same weights; the base's with the new parts when None.
        make_stream: what is trained on, from the configuration, the model, its tokenizer and this rank's share
            (global_batch, micro_batch, rank, world_size); all of data.train when None.

    Raises:
        UserError: a mistake in the configuration or the data.
    """
    if config.train is None:
        raise UserError("train: is required: train.samples and train.global_batch")
    parts = (make_tasks, build_model or _base_model, make_stream or _labelled_stream)
    return run(config, lambda config, processes: _build(config, processes, *parts))


def open_split(
    config: AdaptConfig, model: MMScaleModel, tokenizer: Tokenizer, shards: Paths, limit: int | None = None
) -> EvalSet:
    """A split that is scored, this rank's part of it; its first `limit` samples, else as many as eval.samples says."""
    return splits.open_split(
        shards, model, tokenizer, config.data, batch_size=config.eval.batch, limit=limit or config.eval.samples
    )


def score(model: MMScaleModel, tasks: Sequence[AdaptationTask], split: EvalSet) -> dict[str, float]:
    """All tasks' scores on a split, in evaluation mode. Collective."""
    with evaluating(model):
        return {name: value for task in tasks for name, value in task.evaluate(model, split).items()}


def _base_model(config: AdaptConfig, tokenizer: Tokenizer) -> MMScaleModel:
    # Read here although `complete` has looked at it before: kept since then, a second copy of the weights would lie in
    # memory as long as the first is trained.
    return adapted_model(config, load_base(config), tokenizer)


def _labelled_stream(
    config: AdaptConfig, model: MMScaleModel, tokenizer: Tokenizer, share: dict[str, int]
) -> TrainStream:
    return TrainStream(
        config.data,
        tokenizer,
        image_size=model.config.vision_config.image_size,
        context_length=model.config.text_config.context_length,
        seed=config.run.seed,
        labelled=True,
        **share,
    )


def _build(
    config: AdaptConfig, processes: Processes, make_tasks: MakeTasks, build_model: BuildModel, make_stream: MakeStream
) -> Task:
    tokenizer = Tokenizer.load(config.tokenizer.path)
    model = build_model(config, tokenizer)
    tasks = make_tasks(model, tokenizer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if processes.is_main:
        print(f"training {trained:,} of {total:,} parameters ({trained / total:.1%})", flush=True)
    share = {
        "global_batch": config.train.global_batch,
        "micro_batch": config.train.micro_batch or config.train.global_batch // processes.world_size,
        "rank": processes.rank,
        "world_size": processes.world_size,
    }
    return Task(
        objective=AdaptationObjective(model, tasks),
        forward_backward=forward_backward,
        stream=make_stream(config, model, tokenizer, share),
        tokenizer=tokenizer,
        **_evaluation(config, model, tokenizer, tasks),
    )


def _evaluation(
    config: AdaptConfig, model: MMScaleModel, tokenizer: Tokenizer, tasks: Sequence[AdaptationTask]
) -> dict:
    """The scores on the dev split in the loop, and what is chosen by them; nothing when `eval.every` is unset."""
    if config.eval.every is None:
        if config.adapt.patience is not None or config.adapt.choose_by is not None:
            raise UserError("adapt.patience and adapt.choose_by: need eval.every, how often the dev split is scored")
        return {}
    if config.data.val is None:
        raise UserError("eval.every: needs data.val, the dev split")
    split = open_split(config, model, tokenizer, config.data.val)
    selection = Selection(config.adapt.choose_by, config.adapt.patience)

    def evaluate() -> Evaluated:
        autocast = config.train.precision == "bf16"
        device = next(model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return Evaluated(score(model, tasks, split))

    return {"evaluate": evaluate, "selection": selection}
