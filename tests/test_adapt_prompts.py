"""Prompts: what a search finds, what calibration repairs, what training moves, and what is left on disk."""

import itertools
import json

import pytest
import torch
from adapting import adapt_config
from checkpoints import write_checkpoint
from ranks import run_ranks

from mmscale.adapt.objective import Encoded
from mmscale.adapt.prompts.answers import search_answers
from mmscale.adapt.prompts.calibration import calibration_table, contextual_bias, fit_temperature, prior_bias
from mmscale.adapt.prompts.classes import Classes, find_classes
from mmscale.adapt.prompts.metrics import balanced_accuracy, expected_calibration_error
from mmscale.adapt.prompts.pictures import Pictures
from mmscale.adapt.prompts.scorers import CaptionScorer
from mmscale.adapt.prompts.shots import ShotStream, draw_shots, encode_shots
from mmscale.adapt.prompts.soft import ImagePromptTask, nearest_mean_accuracy
from mmscale.adapt.prompts.templates import grow_ensemble, rank, recombined, templates_of_captions
from mmscale.adapt.prompts.triggers import TriggerSearch
from mmscale.adapt.prompts.tune import tune_prompts
from mmscale.config import EvalConfig
from mmscale.data.toy import make_toy
from mmscale.errors import UserError
from mmscale.evaluate.zeroshot import ZeroShot
from mmscale.export.hub import export_hub
from mmscale.pretrained import load_pretrained

COUNTS = {"kind": "context", "label": "class_name && length(objects)", "classes": {"1": "a", "2": "two", "3": "three"}}
GUIDES = [
    {"text": "the colour", "label": "class_name && objects[0].color"},
    {"text": "the shape", "label": "class_name"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Toy shards, and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("prompts")
    make_toy(folder / "data", samples=96, shards=8, val_samples=24)
    write_checkpoint(folder / "base")
    return folder


def config(base, name, steps=2, prompts=COUNTS, **sections):
    own = {
        "data": {"val": str(base / "data/val-00000.tar"), "test": str(base / "data/val-00001.tar")},
        "adapt": {"method": "prompts", "prompts": prompts},
        "optim": {"lr": 1e-2, "weight_decay": 0.0},
    }
    return adapt_config(base, name, own, sections, steps=steps, batch=12)


def report(base, name):
    return json.loads((base / name / "report.json").read_text())


def losses(base, name):
    lines = [json.loads(line) for line in (base / name / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


# --- calibration ------------------------------------------------------------------------------------------------------


def biased_scores(bias, temperature, samples=4000, seed=0):
    """Targets drawn from a softmax, and its scores after a bias and a temperature have spoilt them."""
    draw = torch.Generator().manual_seed(seed)
    true = 2 * torch.randn(samples, 4, generator=draw)
    targets = torch.multinomial(true.softmax(1), 1, generator=draw)[:, 0]
    return (true + torch.tensor(bias)) / temperature, targets


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    scores = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]]).log()
    assert expected_calibration_error(scores, torch.tensor([0, 0, 1, 0])) == pytest.approx((2 * 0.1 + 2 * 0.3) / 4)
    assert balanced_accuracy(scores, torch.tensor([0, 0, 0, 1])) == pytest.approx((2 / 3 + 1) / 2)


def test_a_temperature_is_found_again():
    scores, targets = biased_scores([0.0] * 4, 0.25)
    assert fit_temperature(scores, targets) == pytest.approx(4.0, rel=0.1)


def test_content_free_inputs_and_priors_take_a_bias_out():
    bias = torch.tensor([2.0, 0.0, -1.0, 0.5])
    found = contextual_bias(bias.expand(3, -1))
    torch.testing.assert_close(found - found.mean(), -(bias - bias.mean()))
    scores, targets = biased_scores(bias.tolist(), 1.0)
    shares = torch.bincount(targets) / len(targets)
    corrected = scores + prior_bias(scores, shares)
    torch.testing.assert_close(corrected.softmax(1).mean(0), shares, atol=1e-4, rtol=0)


def test_calibration_halves_the_error_of_a_biased_prompt_and_keeps_its_accuracy():
    bias = [2.5, 0.0, -1.0, 0.0]
    dev, dev_targets = biased_scores(bias, 0.4, seed=1)
    test, targets = biased_scores(bias, 0.4, seed=2)
    table = calibration_table(dev, dev_targets, torch.tensor([bias]) / 0.4, test, targets)
    for way in ("contextual + temperature", "prior + temperature"):
        assert table[way]["calibration_error"] < 0.25 * table["none"]["calibration_error"]
        assert table[way]["accuracy"] > table["none"]["accuracy"]


# --- words ------------------------------------------------------------------------------------------------------------


def test_captions_become_templates_where_they_name_one_class_once():
    captions = [
        "a red circle",
        "a red circle",
        "two blue squares",
        "a circle above a square",
        "circles and circles",
        "a {}",
    ]
    assert templates_of_captions(captions, ["circle", "square"], 9) == ["a red {}", "two blue {}"]
    assert templates_of_captions(["there are ten"], ["there", "ten", "the"], 9) == []


def test_new_templates_come_from_halves_and_from_leaving_words_out():
    found = recombined(["a red {} here", "two {}"], 99)
    assert {"a {} here", "red {} here", "a red {}", "{}", "two {} here"} == set(found)
    assert len(recombined(["a red {} here", "two {}"], 2)) == 2


def test_the_best_template_comes_first_and_helpers_join_it():
    targets = torch.tensor([0, 0, 1, 1])
    table = {
        "one": torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 2.0]]),
        "two": torch.tensor([[0.0, 1.0], [4.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
        "bad": torch.tensor([[0.0, 3.0], [0.0, 3.0], [3.0, 0.0], [3.0, 0.0]]),
    }
    score = lambda templates: sum(table[text] for text in templates)  # noqa: E731
    ranked = rank(["bad", "two", "one"], score, targets)
    assert [row["template"] for row in ranked] == ["one", "two", "bad"]
    assert grow_ensemble(ranked, score, targets, 4) == ["one", "two"]
    assert grow_ensemble(ranked, score, targets, 1) == ["one"]


def test_each_class_gets_the_word_that_tells_it_apart():
    targets = torch.tensor([0, 0, 1, 1])
    first = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 0.0], [1.0, 0.0]])  # two words for the first class
    second = torch.tensor([[1.5, 0.0], [1.5, 3.0], [1.5, 1.0], [1.5, 1.0]])
    assert search_answers([first, second], targets) == [1, 0]


def test_the_caption_scorer_gives_the_likelihood_of_each_sentence(base):
    pretrained = load_pretrained(base / "base")
    model, tokenizer = pretrained.model, pretrained.tokenizer
    pixel_values = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        image_tokens = model.encode_image(pixel_values)[1]
    pictures = Pictures(torch.zeros(3, 32), image_tokens, torch.zeros(3))
    found = CaptionScorer(model, tokenizer)(pictures, ["two", "three small"], ["red {} above"])
    for column, sentence in enumerate(["red two above", "red three small above"]):
        ids = torch.tensor([tokenizer.encode(sentence, 24)]).expand(3, -1)
        with torch.no_grad():
            logs = model(ids, pixel_values).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        start = len(tokenizer.encode("red", 24)) - 2
        expected = logs[:, start:].sum(1)
        if column == 0:
            first = found[:, 0], expected
    torch.testing.assert_close(found[:, 1] - first[0], expected - first[1], atol=1e-4, rtol=1e-4)


# --- triggers ---------------------------------------------------------------------------------------------------------


def test_triggers_only_ever_get_better_and_say_what_they_score(base):
    pretrained = load_pretrained(base / "base")
    draw = torch.Generator().manual_seed(0)
    embeds = torch.nn.functional.normalize(torch.randn(12, 32, generator=draw), dim=1)
    pictures = Pictures(embeds, None, torch.arange(12) % 3)
    words = ["a", "two", "three"]
    search = TriggerSearch(pretrained.model, pretrained.tokenizer, words, pictures, 3, 8)
    found = search.run(12, 0, search.allowed[:3].tolist())
    assert found.history == sorted(found.history, reverse=True) and found.loss < found.history[0] - 0.01
    text = pretrained.tokenizer
    ids = [[text.start_id, *found.token_ids, *text.encode(word, 24)[1:-1], text.end_id] for word in words]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [text.pad_id] * (longest - len(row)) for row in ids])
    with torch.no_grad():
        expected = embeds @ pretrained.model.get_text_features(padded).T * pretrained.model.logit_scale()[0]
    torch.testing.assert_close(search.scores(found.token_ids, embeds), expected, atol=1e-5, rtol=1e-5)


# --- few examples -----------------------------------------------------------------------------------------------------


def test_examples_follow_the_seed_and_number_the_same_in_each_class(base):
    tokenizer = load_pretrained(base / "base").tokenizer
    one, same, other = (
        draw_shots(
            config(base, "x", prompts=COUNTS | {"shots": 3}, run={"dir": "x", "seed": seed}),
            tokenizer,
            Classes(COUNTS["label"], {"1": ["a"], "2": ["two"], "3": ["three"]}),
            32,
            24,
        )
        for seed in (0, 0, 1)
    )
    keys = [[shot.row.key for shot in shots] for shots in (one, same, other)]
    assert keys[0] == keys[1] != keys[2] and len(set(keys[0])) == 9
    assert sorted(len(shot.row.record["objects"]) for shot in one) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    with pytest.raises(UserError, match=r"adapt.prompts.shots: 99 asked for, but data.train has \d+ usable pictures"):
        tune_prompts(config(base, "many", prompts=COUNTS | {"shots": 99}))
    with pytest.raises(UserError, match=r"adapt.prompts.classes: 0 classes found by `no_such`"):
        find_classes(config(base, "x"), "no_such", None, "adapt.prompts")

    def rows(rank, world_size, micro_batch, samples=0):
        share = {"global_batch": 6, "micro_batch": micro_batch, "rank": rank, "world_size": world_size}
        stream = ShotStream(one, pad_id=0, context_length=24, seed=5, **share).batches(samples)
        return [[key for batch in next(stream) for key in batch.keys] for _ in range(3)]

    whole = rows(0, 1, 6)
    assert sorted(key for batch in whole for key in batch) == sorted(
        2 * [f"{shot.row.shard}/{shot.row.key}" for shot in one]
    )
    assert len(set(whole[0] + whole[1][:3])) == 9
    for part, first in ((rows(0, 2, 1), 0), (rows(1, 2, 3), 1)):
        assert part == [batch[first::2] for batch in whole]
    assert rows(0, 1, 6, samples=6)[:2] == whole[1:]


def test_known_embeddings_give_the_loss_of_the_image_tower(base):
    classes = Classes(COUNTS["label"], {"1": ["a"], "2": ["two"], "3": ["three"]})
    settings = config(base, "x", prompts=COUNTS | {"shots": 2})
    pretrained = load_pretrained(base / "base")
    shots = draw_shots(settings, pretrained.tokenizer, classes, 32, 24)
    share = {"global_batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1}
    ((batch,),) = itertools.islice(ShotStream(shots, pad_id=0, context_length=24, seed=0, **share).batches(0), 1)
    embeds = encode_shots(pretrained.model, shots, classes).image_embeds
    words = ImagePromptTask(classes, pretrained.model, pretrained.tokenizer, ["a {}"])
    towers = Encoded(pretrained.model, batch.pixel_values)
    plain = words.loss_sum(pretrained.model, towers, words.prepare(batch))
    words.embeds = dict(zip((shot.key for shot in shots), embeds, strict=True))
    torch.testing.assert_close(words.loss_sum(pretrained.model, None, words.prepare(batch)), plain)


# --- training ---------------------------------------------------------------------------------------------------------

KINDS = {
    "context": COUNTS | {"shots": 4, "context": "image", "init": "a small", "tokens": 3},
    "prefix": COUNTS | {"kind": "prefix", "templates": ["there are {}"], "tokens": 2},
    "image": COUNTS | {"kind": "image", "shots": 4, "tokens": 2},
    "guide": {"kind": "guide", "guides": GUIDES},
}
NEW = {"context": "class_prompts.", "prefix": "decoder.blocks.", "image": "vision.prompts.", "guide": "vision.guide."}


def learn_all(base, suffix, sections):
    return [tune_prompts(config(base, kind + suffix, prompts=KINDS[kind], **sections)) for kind in KINDS]


@pytest.mark.slow
def test_any_shape_trains_every_kind_alike_and_moves_nothing_else(base):
    assert learn_all(base, "_alone", {}) == [0] * 4
    before = dict(load_pretrained(base / "base").model.named_parameters())
    for kind, part in NEW.items():
        model = load_pretrained(base / f"{kind}_alone").model
        new = {name for name, _ in model.named_parameters()} - set(before)
        assert new and all(name.startswith(part) for name in new)
        for name, tensor in before.items():
            assert torch.equal(tensor, model.get_parameter(name)), name
    persistent = {f"stage3_{key}": 0 for key in ("param_persistence_threshold", "max_live_parameters")}
    sharded = {
        "train": {"samples": 24, "global_batch": 12, "micro_batch": 3, "zero_stage": 3},
        "deepspeed": {"zero_optimization": persistent},
    }
    assert run_ranks(2, learn_all, base, "_sharded", sharded) == [[0] * 4] * 2
    for kind in KINDS:
        expected, found = (torch.tensor(losses(base, kind + suffix)) for suffix in ("_alone", "_sharded"))
        assert (expected > 0).all() and len(expected) == 2
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        one, two = (report(base, kind + suffix)["scores"] for suffix in ("_alone", "_sharded"))
        assert one.keys() == two.keys()


@pytest.mark.slow
def test_a_prompted_model_scores_and_exports_as_it_was_trained(base):
    assert tune_prompts(config(base, "context", steps=8, prompts=COUNTS | {"shots": 4})) == 0
    assert losses(base, "context")[-1][0] < losses(base, "context")[0][0]
    chosen = load_pretrained(base / "context")
    export_hub(base / "context", base / "hub")
    exported = load_pretrained(base / "hub").model
    pixel_values = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = chosen.model(pixel_values=pixel_values).class_logits
        torch.testing.assert_close(exported(pixel_values=pixel_values).class_logits, logits)
    task = ZeroShot(chosen.model, chosen.tokenizer, EvalConfig())
    task.names, task._records = ["3", "1"], [{"class_name": "3"}, {"class_name": "1"}]
    task._embeds, task.positions, task.keys = [chosen.model.get_image_features(pixel_values).detach()], [0, 1], ["", ""]
    task.finish()
    assert task.classification.ranked[:, 0].tolist() == logits[:, [2, 0]].argmax(1).tolist()
    assert logits.shape == (2, 3) and exported.config.class_prompts["names"] == ["1", "2", "3"]
    assert set(report(base, "context")["scores"]["none"]) == {"accuracy", "balanced_accuracy", "calibration_error"}


def test_a_search_leaves_templates_for_evaluation_and_its_report(base):
    words = {"1": ["a", "one"], "2": ["two", "pair"], "3": ["three"]}
    prompts = COUNTS | {
        "kind": "words",
        "classes": words,
        "templates": ["{} shapes"],
        "from_captions": 5,
        "recombined": 5,
    }
    assert tune_prompts(config(base, "words", prompts=prompts)) == 0
    found = report(base, "words")
    assert found["scored_on"] == "test" and found["num_candidates"] == 11
    assert set(found["scores"]) >= {"by hand", "templates", "templates and words", "by hand, contextual + temperature"}
    dev = found["dev_balanced_accuracy"]
    assert dev["by hand"] <= dev["templates"] <= dev["templates and words"]
    lines = (base / "words/templates.txt").read_text().splitlines()
    assert lines == found["prompts"][found["chosen"]]["templates"] and all("{}" in line for line in lines)
    prompts = COUNTS | {"kind": "triggers", "shots": 3, "triggers": 2, "candidates": 3, "rounds": 3}
    assert tune_prompts(config(base, "triggers", prompts=prompts)) == 0
    assert len(report(base, "triggers")["triggers"]) == 2


def test_what_a_guide_turns_up_is_told_from_chance():
    draw = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % 3
    centres = torch.nn.functional.normalize(torch.randn(3, 16, generator=draw), dim=1)
    embeds = torch.nn.functional.normalize(centres[targets] + 0.1 * torch.randn(60, 16, generator=draw), dim=1)
    assert nearest_mean_accuracy(embeds[:30], targets[:30], embeds[30:], targets[30:]) == 1.0
    targets[30:40] = -1
    assert nearest_mean_accuracy(embeds[:30], (targets[:30] + 1) % 3, embeds[30:], targets[30:]) < 0.2


@pytest.mark.parametrize(
    "prompts, message",
    [
        ({"kind": "context"}, "kind context needs `label`"),
        ({"kind": "guide", "guides": GUIDES[:1]}, "at least two `guides`"),
        ({"kind": "contxt", "label": "x"}, "adapt.prompts.kind"),
    ],
)
def test_mistakes_are_told_in_one_line(base, prompts, message):
    with pytest.raises(UserError, match=message):
        config(base, "wrong", prompts=prompts)
