"""Tuning on instructions: what is drawn, what counts, any shape of run, and the way from shards to a report."""

import json

import pytest
import torch
from checkpoints import write_checkpoint
from torch.nn import functional as F

from mmscale.adapt.command import adapt
from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.instructions.answering import Answer, answer_scores
from mmscale.adapt.instructions.clusters import cluster_texts, meaning_distances
from mmscale.adapt.instructions.records import Instruction, encode_prompt, read_instructions
from mmscale.adapt.instructions.settings import InstructionSettings
from mmscale.adapt.instructions.task import AlignmentTask, ResponseTask, draw
from mmscale.adapt.objective import AdaptationObjective, Encoded, forward_backward
from mmscale.data.batches import LabelledBatch
from mmscale.data.toy import make_toy
from mmscale.errors import UserError
from mmscale.pretrained import load_pretrained

CONTEXT = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base") / "run")


def record(number):
    """Two meanings in two phrasings each, one in one, and one that is held out."""
    colour = ("red", "blue", "green")[number % 3]
    texts = [
        ("a circle", colour, "m1"),
        ("circle", colour, "m1"),
        ("left of", "two", "m2"),
        ("left", "two", "m2"),
        ("above", "a small square", "m3"),
    ]
    entries = [{"instruction": text, "response": answer, "meaning": meaning} for text, answer, meaning in texts]
    return {"instructions": [*entries, {"instruction": "below", "response": "red", "held_out": True}]}


def batch_of(positions, bad=()):
    draws = torch.Generator()
    pixels = [torch.rand(3, 32, 32, generator=draws.manual_seed(position)) for position in positions]
    valid = torch.tensor([position not in bad for position in positions])
    return LabelledBatch(
        pixel_values=torch.stack(pixels),
        input_ids=torch.full((len(positions), 7), 2),
        lengths=valid * 2,
        valid=valid,
        positions=torch.tensor(list(positions)),
        keys=[""] * len(positions),
        bad=[],
        records=[record(position) if position not in bad else {} for position in positions],
        captions=[[]] * len(positions),
        sources=[0] * len(positions),
    )


def tasks_of(tokenizer, **settings):
    settings = InstructionSettings(prompt="{}", per_picture=2, align=0.5, **settings)
    return [kind(tokenizer, settings, CONTEXT, 7) for kind in (ResponseTask, AlignmentTask)]


def test_what_is_drawn_depends_on_the_position_and_never_is_held_out():
    drawn = [draw(record(0), 7, position, 2) for position in range(40)]
    assert drawn == [draw(record(0), 7, position, 2) for position in range(40)]
    assert drawn != [draw(record(0), 8, position, 2) for position in range(40)]
    assert all(len(meanings) == 2 for meanings in drawn)
    asked = {one.instruction for meanings in drawn for phrasings in meanings for one in phrasings}
    assert asked == {"a circle", "circle", "left of", "left", "above"}
    assert all(len({one.meaning for one in phrasings}) == 1 for meanings in drawn for phrasings in meanings)


def test_one_instruction_may_stand_in_the_record_itself():
    assert read_instructions({"instruction": "what is this", "input": "here", "response": "a cat", "task": "name"}) == [
        Instruction("what is this", "a cat", "here", "name")
    ]
    assert read_instructions({"instruction": "what is this", "response": " "}) == []
    assert Instruction("look", "a cat", "is it wet?").question == "look is it wet?"


def test_only_the_response_and_its_end_count(base):
    model, tokenizer, _ = base
    task, _ = tasks_of(tokenizer)
    batch = batch_of([3, 4])
    inputs = task.prepare(batch)
    with torch.no_grad():
        found = task.loss_sum(model, Encoded.of(model, batch), inputs)
        image_tokens = model.encode_image(batch.pixel_values)[1]
        expected, count = 0.0, 0
        for row, position in enumerate((3, 4)):
            for one in (one for meaning in draw(record(position), 7, position, 2) for one in meaning):
                prompt = tokenizer.encode(one.question, CONTEXT)[:-1]
                response = tokenizer.encode(one.response, CONTEXT)[1:]
                ids = torch.tensor([prompt + response])
                logits = model.decoder.head(model.decode(model.text(ids)[1], image_tokens[row : row + 1]))[0]
                expected += F.cross_entropy(logits[len(prompt) - 1 : -1], ids[0, len(prompt) :], reduction="sum")
                count += len(response)
    assert inputs["count"] == count
    torch.testing.assert_close(found, expected)


def test_one_phrasing_of_each_meaning_is_enough_to_train_on_but_not_to_align(base):
    drawn = [len(phrasings) for position in (3, 4) for phrasings in draw(record(position), 7, position, 2)]
    counts = {}
    for number in (1, 2):
        task = ResponseTask(base[1], InstructionSettings(per_picture=2, per_meaning=number), CONTEXT, 7)
        counts[number] = len(task.prepare(batch_of([3, 4]))["rows"])
    assert counts == {1: 4, 2: sum(drawn)} and sum(drawn) > 4
    with pytest.raises(ValueError, match="align needs per_meaning: 2"):
        InstructionSettings(per_meaning=1, align=0.1)


@pytest.mark.parametrize("kind", ["embedding", "state"])
def test_the_alignment_loss_is_the_squared_distance_of_the_phrasings(base, kind):
    model, tokenizer, _ = base
    _, task = tasks_of(tokenizer, align_on=kind)
    batch = batch_of([3, 4, 5])
    inputs = task.prepare(batch)
    pairs = [p for position in (3, 4, 5) for p in draw(record(position), 7, position, 2) if len(p) == 2]
    texts = [one.question for pair in pairs for one in pair]
    with torch.no_grad():
        found = task.loss_sum(model, Encoded.of(model, batch), inputs)
        encoded = [model.encode_text(torch.tensor([tokenizer.encode(text, CONTEXT)])) for text in texts]
        embeds = [F.normalize(embed if kind == "embedding" else states[:, -2], dim=-1) for embed, states in encoded]
        distances = [(a - b).square().sum() for a, b in zip(embeds[::2], embeds[1::2], strict=True)]
    assert inputs["count"] == len(pairs) > 0
    torch.testing.assert_close(found, torch.stack(distances).sum())


@pytest.mark.parametrize("sizes", [[1, 1, 2, 2], [3, 3]])
def test_any_micro_batches_give_the_same_gradient(base, sizes):
    """One row is bad, and a micro-batch may hold nothing else."""
    model, tokenizer, _ = base
    objective = AdaptationObjective(model, tasks_of(tokenizer)).train()

    def gradients(sizes):
        model.zero_grad()
        positions = iter(range(6))
        batches = [batch_of([next(positions) for _ in range(size)], bad=(1,)) for size in sizes]
        values = forward_backward(objective, batches, lambda loss: loss.backward())
        return values, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (whole, expected), (values, found) = gradients([6]), gradients(sizes)
    assert set(whole) == {"loss", "loss_prompt", "loss_align"}
    torch.testing.assert_close(whole["loss"], whole["loss_prompt"] + 0.5 * whole["loss_align"])
    torch.testing.assert_close(values, whole)
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert all(torch.allclose(found[name], expected[name], atol=1e-5 * largest) for name in expected)


def test_prompts_are_cut_as_they_are_when_they_are_asked(base):
    _, tokenizer, _ = base
    long = "a small red circle above two large blue square left of three green circle"
    ids = encode_prompt(tokenizer, "{}", long, CONTEXT)
    assert ids == tokenizer.encode(long, 100)[:12] and ids[0] == tokenizer.start_id


def test_scores_part_tasks_and_phrasings_and_weigh_tasks_alike():
    def answers(task, held_out, *right):
        one = Instruction("what", "yes", task=task, held_out=held_out)
        return [Answer(0, "", one, "yes" if good else "no") for good in right]

    scores = answer_scores(
        answers("count", False, 1, 1, 1, 1) + answers("colour", False, 0, 1) + answers("count", True, 1, 0)
    )
    assert scores == {
        "seen": 0.75, "seen_colour": 0.5, "seen_count": 1.0, "unseen": 0.5, "unseen_count": 0.5, "gap": 0.25,
    }  # fmt: skip
    with pytest.raises(UserError, match="no sample of the split holds an instruction"):
        answer_scores([])


def test_distances_tell_meanings_apart():
    embeds = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    found = meaning_distances(embeds, ["a", "a", "b", "b"])
    assert found["same_meaning"] < 0.011 < 1.5 < found["other_meaning"]
    assert meaning_distances(embeds, ["a", "a", "a", "a"]) == {}
    assert cluster_texts(torch.cat([embeds, embeds[:1]]), 2, seed=0).tolist() == [0, 0, 1, 1, 0]


def test_from_toy_shards_to_a_report_and_a_model_that_stands_alone(base, tmp_path):
    """With a tokenizer and a context of its own; scores come per task, seen and unseen phrasings apart."""
    make_toy(tmp_path / "toy", samples=32, shards=1, val_samples=8)
    facts = {"kinds": ["captions", "objects"], "noun": "shape", "attributes": {"color": "colour"}, "per_task": 1}
    build = {"method": "build_instructions", "build_instructions": {"facts": facts, "vocab_size": 400}}
    shards = {"train": str(tmp_path / "toy/train-*.tar"), "val": str(tmp_path / "toy/val-*.tar")}
    built = tmp_path / "built"
    adapt(AdaptConfig.model_validate({"run": {"dir": str(built)}, "data": shards, "adapt": build}))
    raw = {
        "run": {"dir": str(tmp_path / "tuned")},
        "data": {"train": str(built / "train-*.tar"), "test": str(built / "val-*.tar"), "workers": 0},
        "tokenizer": {"path": str(built / "tokenizer.model")},
        "model": {"init_from": str(base[2]), "text": {"context_length": 40}},
        "adapt": {"method": "instructions", "instructions": {"per_picture": 2, "align": 0.5}},
        "optim": {"lr": 1e-3},
        "train": {"samples": 16, "global_batch": 8, "zero_stage": 0},
    }
    assert adapt(AdaptConfig.model_validate(raw)) == 0
    lines = [json.loads(line) for line in (tmp_path / "tuned/metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "loss_prompt", "loss_align"} <= line.keys() for line in lines)
    report = json.loads((tmp_path / "tuned/report.json").read_text())
    assert {"seen", "seen_count", "unseen", "unseen_relation", "gap", "distance_same_meaning"} <= report[
        "scores"
    ].keys()
    tuned = load_pretrained(tmp_path / "tuned", device="cpu")
    assert tuned.context_length == 40 and tuned.tokenizer.vocab_size == tuned.model.config.vocab_size != 300


def test_a_model_without_a_decoder_is_refused(tmp_path):
    write_checkpoint(
        tmp_path / "clip", model={"preset": "tiny", "decoder": {"layers": 0}}, objective={"caption_weight": 0}
    )
    raw = {
        "run": {"dir": str(tmp_path / "tuned")},
        "data": {"train": str(tmp_path / "no.tar")},
        "model": {"init_from": str(tmp_path / "clip")},
        "adapt": {"method": "instructions"},
        "train": {"samples": 16, "global_batch": 8},
    }
    with pytest.raises(UserError, match="answered by the decoder"):
        adapt(AdaptConfig.model_validate(raw))
