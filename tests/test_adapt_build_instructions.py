"""From shards to shards of instructions: facts, phrasings, cleaning, what is written."""

import hashlib
import json
import random
from collections import Counter

import pytest
from checkpoints import write_checkpoint
from shard_files import picture, write_shard

from mmscale.adapt.command import adapt
from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.instructions.cleaning import Entry, Removed, clean, script_share
from mmscale.adapt.instructions.facts import Vocabulary, facts_of
from mmscale.adapt.instructions.phrasings import Phrasings
from mmscale.adapt.instructions.records import Instruction, read_instructions
from mmscale.adapt.instructions.settings import CleaningSettings, FactSettings
from mmscale.config import DataConfig
from mmscale.data.shards import Shards
from mmscale.data.toy import make_toy
from mmscale.errors import UserError

OBJECTS = {"noun": "shape", "attributes": {"size": "size", "color": "colour"}}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "data"
    make_toy(folder, samples=48, shards=2, val_samples=12)
    return folder


@pytest.fixture(scope="module")
def built(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "instructions"
    assert adapt(config_for(toy, folder, vocab_size=400)) == 0
    return folder


def config_for(toy, out, model=None, **settings):
    return AdaptConfig.model_validate(
        {
            "run": {"dir": str(out)},
            "data": {"train": str(toy / "train-*.tar"), "val": str(toy / "val-*.tar")},
            "model": {"init_from": model},
            "adapt": {"method": "build_instructions", "build_instructions": {"facts": OBJECTS, **settings}},
        }
    )


def samples_of(pattern):
    shards = Shards(sorted(map(str, pattern.parent.glob(pattern.name))), DataConfig())
    return [shards.read(s, n, with_record=True) for s, count in enumerate(shards.counts) for n in range(count)]


def scene(*groups):
    """A picture of 100 x 100 with these (size, color, shape, box) drawn."""
    objects = [dict(zip(("size", "color", "shape", "box"), group, strict=True)) for group in groups]
    return {"width": 100, "height": 100, "objects": objects}


def facts(record, seed=0, **settings):
    own = FactSettings(kinds=["objects"], per_task=100, **OBJECTS, **settings)
    vocabulary = Vocabulary()
    vocabulary.add(record, own)
    vocabulary.add(scene(("small", "black", "star", [0, 0, 1, 1])), own)
    return facts_of(record, [], own, vocabulary, random.Random(seed))


def asked(record, task, seed=0):
    """(all slot values, response) of a task's facts."""
    return {
        (" / ".join(value for _, value in fact.slots), fact.response)
        for fact in facts(record, seed)
        if fact.task == task
    }


def so_called(record, name):
    """The objects of a picture that all words of a name fit."""
    return [thing for thing in record["objects"] if set(name.split()) <= set(map(str, thing.values()))]


TWO = scene(
    ("small", "red", "circle", [5, 40, 15, 50]),
    ("small", "red", "circle", [25, 60, 35, 70]),
    ("large", "blue", "square", [60, 45, 80, 65]),
)


def test_counts_attributes_and_places_are_those_of_the_objects():
    counts = {(dict(fact.slots)["things"], fact.response) for fact in facts(TWO) if fact.task == "count"}
    assert {("circles", "two"), ("red circles", "two"), ("small red circles", "two"), ("blue squares", "one")} <= counts
    attributes = {
        (dict(f.slots)["attribute"], dict(f.slots)["the_thing"], f.response)
        for f in facts(TWO)
        if f.task == "attribute"
    }
    assert ("colour", "the circles", "red") in attributes and ("size", "the square", "large") in attributes
    assert not any(value in thing.split() for _, thing, value in attributes), "the answer may not be in the question"
    sides = {(dict(f.slots)["the_thing"], dict(f.slots)["sides"], f.response) for f in facts(TWO) if f.task == "side"}
    assert ("the circles", "left or right", "left") in sides and ("the square", "left or right", "right") in sides
    assert not any(pair == "top or bottom" for _, pair, _ in sides), "both lie across the middle"
    assert not asked(TWO, "place")
    corner = scene(("small", "red", "circle", [50, 5, 60, 50]), ("small", "red", "circle", [80, 5, 90, 15]))
    assert ("the circles / are / they / them", "top right") in asked(corner, "place")


def test_what_differs_between_things_of_a_name_is_not_asked_for():
    record = scene(("small", "red", "circle", [0, 0, 9, 9]), ("small", "blue", "circle", [50, 50, 59, 59]))
    attributes = {
        (dict(f.slots)["attribute"], dict(f.slots)["the_thing"]) for f in facts(record) if f.task == "attribute"
    }
    assert ("size", "the circles") in attributes and ("colour", "the circles") not in attributes


def test_relations_are_true_both_ways_and_asked_only_where_they_are_clear():
    found = [fact for seed in range(8) for fact in facts(TWO, seed) if fact.task == "relation"]
    for fact in found:
        slots = dict(fact.slots)
        first, second = (so_called(TWO, slots[name].partition(" ")[2]) for name in ("first", "second"))
        clear = all(a["box"][2] <= b["box"][0] for a in first for b in second)
        other = all(b["box"][2] <= a["box"][0] for a in first for b in second)
        true = bool(first and second) and (clear if slots["relation"] == "left of" else other)
        assert slots["relation"] in ("left of", "right of") and (fact.response == "yes") == true, fact
    assert {fact.response for fact in found} == {"yes", "no"}
    diagonal = scene(("small", "red", "circle", [0, 0, 9, 9]), ("large", "blue", "square", [50, 50, 59, 59]))
    assert not asked(diagonal, "relation"), "it is both above and left of the other"


def test_what_is_said_not_to_be_there_is_not_there():
    for seed in range(20):
        presence = [fact for fact in facts(TWO, seed) if fact.task == "presence"]
        for fact in presence:
            assert bool(so_called(TWO, dict(fact.slots)["thing"])) == (fact.response == "yes"), fact


def test_responses_take_turns_where_not_all_facts_are_taken():
    own = FactSettings(kinds=["objects"], per_task=2, per_task_of={"count": 1, "side": 0}, **OBJECTS)
    vocabulary = Vocabulary()
    vocabulary.add(TWO, own)
    vocabulary.add(scene(("small", "black", "star", [0, 0, 1, 1])), own)
    for seed in range(5):
        found = facts_of(TWO, [], own, vocabulary, random.Random(seed))
        assert Counter(fact.response for fact in found if fact.task == "presence") == {"yes": 1, "no": 1}
        tasks = Counter(fact.task for fact in found)
        assert (tasks["attribute"], tasks["count"], tasks["side"]) == (2, 1, 0)


def test_classes_questions_fields_and_facts_of_ones_own_become_instructions():
    record = {
        "class_name": "cat",
        "questions": [{"question": "is it wet?", "answers": ["no", "no", "yes"]}],
        "name": "tabby",
        "keywords": ["animal", "pet"],
        "facts": [{"task": "describe", "response": "a tabby"}],
    }
    own = FactSettings(
        kinds=["captions", "classes", "questions", "fields", "facts"],
        fields={"name": "name", "keywords": "keyword", "missing": "thing"},
    )
    vocabulary = Vocabulary()
    vocabulary.add(record, own)
    vocabulary.add({"class_name": "dog", "keywords": ["bone"]}, own)
    found = {
        (fact.task, dict(fact.slots).get("value") or dict(fact.slots).get("thing") or fact.input, fact.response)
        for fact in facts_of(record, ["a wet cat"], own, vocabulary, random.Random(0))
    }
    assert found >= {
        ("describe", "", "a wet cat"),
        ("describe", "", "a tabby"),
        ("classify", "", "cat"),
        ("is_class", "cat", "yes"),
        ("is_class", "dog", "no"),
        ("question", "is it wet?", "no"),
        ("field", "", "tabby"),
        ("listed", "bone", "no"),
    }


def test_every_built_in_phrasing_can_be_asked(toy):
    table = Phrasings()
    own = FactSettings(kinds=["captions", "classes", "objects"], **OBJECTS)
    vocabulary, tasks = Vocabulary(), set()
    raws = samples_of(toy / "train-*.tar")
    for raw in raws:
        vocabulary.add(raw.record, own)
    for raw in raws:
        for fact in facts_of(raw.record, raw.record["captions"], own, vocabulary, random.Random(0)):
            table.check(fact)
            tasks.add(fact.task)
            assert "{" not in table.choose(fact, 1, random.Random(0), held_out=True)[0].ask(fact)
    assert tasks == set(table.tasks()) - {"question", "field", "listed"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("count: how many", "`count`: expected lists of texts"),
        ("count: {train: [a], held_out: [a]}", "'a' is both in `train` and in `held_out`"),
        ("count: {train: ['how many {things']}", "expected '}'"),
        ("count: {train: ['how many {thngs}?']}", "slot {thngs}; known here: a_thing, thing, things"),
        (": :", "cannot be read as a table of phrasings"),
    ],
)
def test_a_bad_table_of_phrasings_is_refused_with_one_line(toy, tmp_path, text, complaint):
    (tmp_path / "phrasings.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        adapt(config_for(toy, tmp_path / "out", phrasings=str(tmp_path / "phrasings.yaml")))
    assert complaint in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def entries(*instructions):
    return [Entry(0, number, f"key {number}", one) for number, one in enumerate(instructions)]


def kept_and_removed(*instructions, **settings):
    removed = Removed()
    kept = clean(entries(*instructions), CleaningSettings(**settings), removed)
    return [entry.number for entry in kept], dict(removed.counts)


def test_a_contradiction_leaves_none_of_its_instructions():
    one = Instruction("What colour is it?", "red")
    assert kept_and_removed(one, Instruction("what  colour is it", "blue"), Instruction("how many?", "two")) == (
        [2],
        {"contradiction": 2},
    )
    described = [Instruction("describe it", text, task="describe") for text in ("a cat", "an animal")]
    assert kept_and_removed(*described) == ([0, 1], {}), "more than one description is right"


def test_duplicates_are_removed_once_and_paraphrases_stay():
    one = Instruction("is there a red circle left of the square?", "yes", meaning="a")
    again = Instruction("Is there a red circle left of the square", "Yes", meaning="a")
    paraphrase = Instruction("is there a red circle left of the squares?", "yes", meaning="a")
    near = Instruction("is there a red circle left of the squares", "yes", meaning="b")
    assert kept_and_removed(one, again) == ([0], {"duplicate": 1})
    assert kept_and_removed(one, paraphrase) == ([0, 1], {})
    assert kept_and_removed(one, near) == ([0], {"near duplicate": 1})
    assert kept_and_removed(one, near, near_duplicate=1.0) == ([0, 1], {})


def test_lengths_and_other_scripts_are_removed():
    assert kept_and_removed(
        Instruction("what?", "yes"), Instruction("what is this?", "w " * 9), Instruction("что это такое?", "кот"),
        min_words=2, max_response_words=8,
    ) == ([], {"too short": 1, "too long": 1, "another language": 1})  # fmt: skip
    assert script_share("что is", ["CYRILLIC"]) == 0.6 and script_share("?! 12", ["LATIN"]) == 1.0


def test_training_shards_hold_no_held_out_phrasing_and_the_others_hold_both(built):
    train = [read_instructions(raw.record) for raw in samples_of(built / "train-*.tar")]
    val = [read_instructions(raw.record) for raw in samples_of(built / "val-*.tar")]
    assert len(train) == 48 and len(val) == 12
    assert not any(one.held_out for own in train for one in own)
    for own in val:
        by_meaning = Counter((one.meaning, one.held_out) for one in own)
        assert set(by_meaning.values()) == {1} and len({held_out for _, held_out in by_meaning}) == 2
    pairs = [Counter(one.meaning for one in own) for own in train]
    counts = Counter(count for own in pairs for count in own.values())
    assert counts[2] > 0.99 * counts.total(), "two phrasings of each meaning, side by side, but for what was removed"


def test_pictures_captions_and_the_report_are_those_of_the_shards(toy, built):
    before = {raw.image for raw in samples_of(toy / "train-*.tar")}
    after = samples_of(built / "train-*.tar")
    assert {raw.image for raw in after} == before
    assert all(raw.captions == [[raw.record["caption"]]] and raw.record["objects"] for raw in after)
    report = json.loads((built / "report.json").read_text())
    train = report["splits"]["train"]
    assert train["samples"] == 48 and train["held_out_phrasings"] == 0
    assert train["instructions_kept"] == sum(len(read_instructions(raw.record)) for raw in after)
    assert train["instructions_kept"] == train["instructions_made"] - sum(train["removed"].values())
    least, median, _, longest = report["tokens"]["tokenizer.model"]
    assert 5 < least <= median <= longest < 64
    assert not (built / ".partial").exists()


def test_the_same_settings_give_the_same_bytes_and_an_interrupted_build_starts_again(toy, built, tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "train-00000.tar").write_bytes(b"half of it")
    adapt(config_for(toy, tmp_path, vocab_size=400))
    digests = [
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.iterdir()
            if path.suffix != ".index"
        }
        for folder in (built, tmp_path)
    ]
    assert digests[0] == digests[1]
    with pytest.raises(UserError, match="is not empty"):
        adapt(config_for(toy, tmp_path, vocab_size=400))


def test_a_source_for_each_cluster_parts_the_instructions(toy, tmp_path):
    write_checkpoint(tmp_path / "run")
    adapt(config_for(toy, tmp_path / "out", model=str(tmp_path / "run"), clusters=3))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    sizes = []
    for cluster in range(3):
        own = [
            read_instructions(raw.record)
            for raw in samples_of(tmp_path / "out" / f"cluster-{cluster:02d}" / "train-*.tar")
        ]
        assert all(own)
        sizes.append(sum(map(len, own)))
    assert sizes == [cluster["instructions"] for cluster in report["clusters"]]
    assert sum(sizes) == report["splits"]["train"]["instructions_kept"]


def test_shards_of_nothing_to_ask_for_are_refused(tmp_path):
    write_shard(tmp_path / "train-0.tar", {"0": {"jpg": picture(0), "txt": b"a dog"}})
    config = config_for(tmp_path, tmp_path / "out")
    config.data.val = None
    config.adapt.build_instructions.facts.kinds = ["objects"]
    with pytest.raises(UserError, match=r"data\.train: no instruction could be made"):
        adapt(config)
