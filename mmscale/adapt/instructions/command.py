"""Method `instructions`: tunes a pretrained model on instructions, and reports how it answers them."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmscale.adapt.base import complete, load_base
from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.instructions.answering import Answer
from mmscale.adapt.instructions.task import AlignmentTask, ResponseTask
from mmscale.adapt.labels import check_splits
from mmscale.adapt.objective import AdaptationTask
from mmscale.adapt.tuning import open_split, score, tune
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.ranks import rank_and_world_size
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.pretrained import load_pretrained

NUM_MISTAKES = 8  # of each task in the report


def tune_instructions(config: AdaptConfig) -> int:
    """Trains on the responses of `data.train`; reports on `data.test` with the weights that did best on `data.val`.

    `run.dir` holds what a training run leaves, and then `report.json` with the scores and the commonest mistakes of
    each task. Returns the trainer's exit code. Raises UserError.
    """
    config = complete(config, load_base(config))
    if not config.model.decoder.layers:
        raise UserError(f"{config.model.init_from}: instructions are answered by the decoder, which this model lacks")
    check_splits(config.data)

    def make_tasks(model: MMScaleModel, tokenizer: Tokenizer) -> Sequence[AdaptationTask]:
        tasks = [ResponseTask, AlignmentTask] if config.adapt.instructions.align else [ResponseTask]
        context_length = model.config.text_config.context_length
        return [kind(tokenizer, config.adapt.instructions, context_length, config.run.seed) for kind in tasks]

    code = tune(config, make_tasks)
    if code == 0 and config.data.test is not None:
        chosen = load_pretrained(config.run.dir)
        tasks = make_tasks(chosen.model, chosen.tokenizer)[:1]
        scores = score(chosen.model, tasks, open_split(config, chosen.model, chosen.tokenizer, config.data.test))
        if rank_and_world_size()[0] == 0:
            _write_report(Path(config.run.dir), chosen.path.name, chosen.samples, scores, tasks[0].answers)
    return code


def _write_report(folder: Path, checkpoint: str, samples: int, scores: dict[str, float], answers: list[Answer]) -> None:
    mistakes: dict[str, Counter[tuple[str, str]]] = {}
    for answer in answers:
        if not answer.right:
            mistakes.setdefault(answer.asked.task, Counter())[answer.asked.response, answer.written] += 1
    report = {
        "checkpoint": checkpoint,
        "samples": samples,
        "questions": len(answers),
        "scores": scores,
        "mistakes": {
            task: [
                {"right": right, "written": written, "times": times}
                for (right, written), times in own.most_common(NUM_MISTAKES)
            ]
            for task, own in sorted(mistakes.items())
        },
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    table = Table(title=f"{folder / checkpoint}: answered word for word right", title_justify="left")
    for column in ("task", "seen phrasings", "unseen phrasings"):
        table.add_column(column, justify="left" if column == "task" else "right")
    tasks = sorted({answer.asked.task or "unnamed" for answer in answers})
    for name, suffix in [*((task, f"_{task}") for task in tasks), ("mean", "")]:
        shares = [scores.get(f"{kind}{suffix}") for kind in ("seen", "unseen")]
        table.add_row(name, *("" if share is None else f"{share:.1%}" for share in shares))
    Console().print(table)
