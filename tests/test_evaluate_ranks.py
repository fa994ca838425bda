"""Evaluation over ranks: every sample once, the same figures for any number of ranks and under ZeRO-3."""

import os
import tarfile

import pytest
import torch
from checkpoints import write_checkpoint
from ranks import run_ranks
from small_split import BAD, NUM_SAMPLES, write_shard

from mmscale.config import Config, DataConfig, EvalConfig
from mmscale.data.loader import EvalSet
from mmscale.errors import UserError
from mmscale.evaluate.run import run_evaluation
from mmscale.pretrained import load_pretrained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_checkpoint(folder / "run")
    write_shard(folder / "val.tar")
    return folder


def evaluate_on_this_rank(folder, stage, config):
    """Scores, generated captions and the order of keys; under DeepSpeed's ZeRO `stage`, or replicated for None."""
    import torch.distributed as dist

    pretrained = load_pretrained(folder / "run", device="cpu")
    model = pretrained.model
    rank, world_size = 0, 1
    if "RANK" in os.environ:
        from mmscale.train.engine import Engine, start_processes

        start_processes()
        rank, world_size = dist.get_rank(), dist.get_world_size()
    if stage is not None:
        zero = {f"stage3_{name}": 0 for name in ("param_persistence_threshold", "max_live_parameters",
                                                 "max_reuse_distance", "prefetch_bucket_size")}  # fmt: skip
        train = {"samples": 8, "global_batch": 8, "zero_stage": stage}
        settings = {"run": {"dir": "unused"}, "train": train, "deepspeed": {"zero_optimization": zero}}
        Engine(torch.nn.ModuleList([model]), None, Config.model_validate(settings), start_processes())
        assert model.text.tokens.weight.numel() == 0  # in pieces, until a forward gathers it
    eval_set = EvalSet(
        str(folder / "val.tar"),
        pretrained.tokenizer,
        data=DataConfig(workers=0),
        image_size=pretrained.image_size,
        context_length=pretrained.context_length,
        batch_size=4,
        rank=rank,
        world_size=world_size,
    )
    evaluation = run_evaluation(model, pretrained.tokenizer, eval_set, None, config)
    captions = evaluation.tasks["caption"].captions
    questions = evaluation.tasks["vqa"].questions
    classified = evaluation.tasks["zeroshot"]
    told = [(c.key, c.generated) for c in captions] + [(q.key, q.question, q.answer) for q in questions]
    return evaluation.scores, told, classified.keys


def several_evaluations(folder, stages, config):
    return [evaluate_on_this_rank(folder, stage, config) for stage in stages]


@pytest.fixture(scope="module")
def alone(run):
    return {many: evaluate_on_this_rank(run, None, config(many)) for many in (False, True)}


def config(all_captions):
    return EvalConfig(
        tasks=["zeroshot", "retrieval", "caption", "vqa"],
        batch=5,
        distinct_pairs=None if all_captions else 18,
        all_captions=all_captions,
    )


def test_every_good_sample_counts_once(alone):
    scores, told, classified = alone[False]
    good = [f"val/{number:04d}" for number in range(NUM_SAMPLES) if number != BAD]
    assert scores["num_samples"] == NUM_SAMPLES - 1
    assert [entry[0] for entry in told if len(entry) == 2] == good
    assert [entry[:2] for entry in told if len(entry) == 3] == [
        (key, question) for key in good for question in ("what is it", "what colour")[: int(key[-4:]) % 3]
    ]
    assert classified == [key for key in good if int(key[-1]) % 2]
    assert scores["retrieval_pairs"] == 18
    assert alone[True][0]["retrieval_pairs"] == NUM_SAMPLES - 1


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "all_captions"), [(2, False), (3, True)])
def test_ranks_give_the_figures_of_one(run, alone, world_size, all_captions):
    stages = [None, 3] if world_size == 2 else [None]
    for results in run_ranks(world_size, several_evaluations, run, stages, config(all_captions)):
        for scores, told, classified in results:
            assert scores == pytest.approx(alone[all_captions][0], abs=1e-6)
            assert (told, classified) == alone[all_captions][1:]


def test_a_split_without_a_good_sample_and_a_task_without_classes_are_refused(run, tmp_path):
    pretrained = load_pretrained(run / "run", device="cpu")
    for name, kept in (("bad.tar", str(BAD)), ("classless.tar", "2")):
        with tarfile.open(run / "val.tar") as source, tarfile.open(tmp_path / name, "w") as target:
            for member in source:
                if member.name.startswith(kept.zfill(4)):
                    target.addfile(member, source.extractfile(member))

    def evaluate(name, task):
        eval_set = EvalSet(
            str(tmp_path / name),
            pretrained.tokenizer,
            data=DataConfig(workers=0),
            image_size=pretrained.image_size,
            context_length=pretrained.context_length,
            batch_size=4,
        )
        run_evaluation(pretrained.model, pretrained.tokenizer, eval_set, [task])

    with pytest.raises(UserError, match="holds no good sample"):
        evaluate("bad.tar", "retrieval")
    with pytest.raises(UserError, match="no sample of the split can be scored by `zeroshot`"):
        evaluate("classless.tar", "zeroshot")
