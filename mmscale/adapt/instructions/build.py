"""From shards to shards of instructions: the method `build_instructions` of `mmscale adapt`.

`data.train`, `data.val` and `data.test` become `train-*.tar`, `val-*.tar` and `test-*.tar` in `run.dir`: the same
pictures, captions and JSON, with a list of `instructions` in the JSON. Every fact of a training sample is asked for in
several training phrasings; of the other splits in one of these and in one that is held out. With `clusters`, a
picture's instructions are parted by cluster into `cluster-00/train-*.tar` and so on, which `data.sources` mixes in
equal proportions. The same settings give the same bytes; files take their names when all is written.

All instructions are held in memory, pictures are not.
"""

import io
import json
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.instructions.cleaning import Entry, Removed, clean
from mmscale.adapt.instructions.facts import Vocabulary, facts_of
from mmscale.adapt.instructions.phrasings import Phrasings
from mmscale.adapt.instructions.records import Instruction, encode_prompt, read_instructions
from mmscale.adapt.instructions.settings import BuildInstructionsSettings, InstructionSettings
from mmscale.data.captions import SampleError
from mmscale.data.paths import expand
from mmscale.data.progress import track
from mmscale.data.shards import RawSample, Shards
from mmscale.data.tokenizer import SMALL_CORPUS, Tokenizer, train_tokenizer
from mmscale.errors import UserError

STAGING = ".partial"
REPORT = "report.json"
IMAGE_KINDS = {b"\xff\xd8\xff": "jpg", b"\x89PN": "png", b"RIF": "webp"}
EVERYTHING = 1 << 20  # tokens


@dataclass
class Split:
    """One split's samples with instructions: (shard, sample) -> the instructions that are kept."""

    name: str
    shards: Shards
    kept: dict[tuple[int, int], list[Instruction]] = field(default_factory=dict)
    captions: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    removed: Removed = field(default_factory=Removed)
    bad: list[str] = field(default_factory=list)
    num_samples: int = 0
    num_built: int = 0

    def instructions(self) -> Iterator[Instruction]:
        for kept in self.kept.values():
            yield from kept


def build_instructions(config: AdaptConfig) -> int:
    """Builds the shards, and `report.json` about them, in `run.dir`. Raises UserError."""
    settings, seed = config.adapt.build_instructions, config.run.seed
    paths = {"train": config.data.train, "val": config.data.val, "test": config.data.test}
    if paths["train"] is None:
        raise UserError("data.train is required: the shards to make instructions of")
    if settings.clusters and config.model.init_from is None:
        raise UserError("adapt.build_instructions.clusters: needs model.init_from, the model that embeds instructions")
    phrasings = Phrasings(settings.phrasings)
    shards = {name: Shards(expand(path, f"data.{name}"), config.data) for name, path in paths.items() if path}
    vocabulary = Vocabulary()
    for _, _, raw in _samples(shards["train"], "reading the training split", with_image=False):
        vocabulary.add(raw.record, settings.facts)
    splits = [_build_split(name, own, settings, phrasings, vocabulary, seed) for name, own in shards.items()]
    for split in splits:
        if not split.kept:
            raise UserError(f"data.{split.name}: no instruction could be made of these samples, or none was kept")
    out = Path(config.run.dir)
    staging = _open_staging(out)
    try:
        report: dict[str, Any] = {"splits": {split.name: _summary(split) for split in splits}}
        train = splits[0]
        clusters = _cluster(config, train, report)
        tokenizer = _train_tokenizer(train, staging, settings.vocab_size)
        report["tokens"] = _token_lengths(train, config, tokenizer)
        for split in splits:
            _write_split(split, staging, settings.shard_size, clusters if split is train else None)
        (staging / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in sorted(staging.iterdir(), key=lambda path: (path.name == REPORT, path.name)):
            path.rename(out / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(describe(report, out))
    return 0


def _build_split(
    name: str,
    shards: Shards,
    settings: BuildInstructionsSettings,
    phrasings: Phrasings,
    vocabulary: Vocabulary,
    seed: int,
) -> Split:
    split = Split(name, shards)
    by_picture: dict[bytes, list[Entry]] = {}
    for place, reason, raw in _samples(shards, f"making instructions of {name}"):
        split.num_samples += 1
        if reason is not None:
            split.bad.append(f"{shards.names[place[0]]}/{shards.key(*place)}: {reason}")
            continue
        rng = random.Random(f"{seed}/{name}/{place}")
        captions = _captions(raw)
        split.captions[place] = captions
        made = list(_instructions(raw, captions, settings, phrasings, vocabulary, rng, train=name == "train"))
        split.num_built += len(made)
        digest = blake2b(raw.image, digest_size=8).digest()
        by_picture.setdefault(digest, []).extend(Entry(*place, raw.key, one) for one in made)
    for entries in by_picture.values():
        for entry in clean(entries, settings.cleaning, split.removed):
            split.kept.setdefault((entry.shard, entry.number), []).append(entry.instruction)
    split.kept = dict(sorted(split.kept.items()))
    return split


def _instructions(
    raw: RawSample,
    captions: list[str],
    settings: BuildInstructionsSettings,
    phrasings: Phrasings,
    vocabulary: Vocabulary,
    rng: random.Random,
    *,
    train: bool,
) -> Iterator[Instruction]:
    if "instructions" in settings.facts.kinds:
        yield from read_instructions(raw.record)
    for fact in facts_of(raw.record, captions, settings.facts, vocabulary, rng):
        phrasings.check(fact)
        chosen = phrasings.choose(fact, settings.per_meaning if train else 1, rng, held_out=False)
        if not train:
            chosen += phrasings.choose(fact, 1, rng, held_out=True)
        for phrasing in chosen:
            yield Instruction(phrasing.ask(fact), fact.response, fact.input, fact.task, fact.meaning, phrasing.held_out)


def _samples(
    shards: Shards, doing: str, *, with_image: bool = True
) -> Iterator[tuple[tuple[int, int], str | None, RawSample | None]]:
    """(place, why the sample is bad, the sample), of every sample."""
    places = [(shard, number) for shard, count in enumerate(shards.counts) for number in range(count)]
    for place in track(places, len(places), doing):
        try:
            yield place, None, shards.read(*place, with_record=True, with_image=with_image)
        except SampleError as error:
            if with_image:
                yield place, str(error), None


def _captions(raw: RawSample) -> list[str]:
    return [text for texts in raw.captions for text in texts]


def _cluster(config: AdaptConfig, train: Split, report: dict[str, Any]) -> dict[str, int] | None:
    """Instruction -> cluster, or None where there is to be one source of all."""
    number = config.adapt.build_instructions.clusters
    if number is None:
        return None
    from mmscale.adapt.instructions.clusters import cluster_texts, embed_texts
    from mmscale.pretrained import load_pretrained

    base = load_pretrained(config.model.init_from)
    task_of = {one.question: one.task for one in train.instructions()}
    embeds = embed_texts(base.model, base.tokenizer, list(task_of), config.eval.batch)
    labels = dict(zip(task_of, cluster_texts(embeds, number, config.run.seed).tolist(), strict=True))
    tasks = [Counter() for _ in range(number)]
    for one in train.instructions():
        tasks[labels[one.question]][one.task] += 1
    report["clusters"] = [{"instructions": sum(own.values()), "tasks": dict(own.most_common())} for own in tasks]
    return labels


def _train_tokenizer(train: Split, folder: Path, vocab_size: int | None) -> Tokenizer | None:
    if vocab_size is None:
        return None
    prompt = InstructionSettings().prompt
    asked = {f"{prompt.replace('{}', one.question)} {one.response}" for one in train.instructions()}
    written = {caption for captions in train.captions.values() for caption in captions}
    texts = sorted(asked | written)
    step = -(-len(texts) // (SMALL_CORPUS - 1))  # of so many texts or fewer, every part of a word may become a piece
    return train_tokenizer(texts[::step], folder / "tokenizer.model", vocab_size)


def _token_lengths(train: Split, config: AdaptConfig, new: Tokenizer | None) -> dict[str, list[int]]:
    """Per tokenizer, tokens of the prompts: least, median, 95 in 100, most."""
    tokenizers = {"tokenizer.model": new} if new else {}
    if config.tokenizer.path is not None:
        tokenizers[config.tokenizer.path] = Tokenizer.load(config.tokenizer.path)
    prompt, questions = InstructionSettings().prompt, {one.question for one in train.instructions()}
    lengths = {
        name: [len(encode_prompt(own, prompt, question, EVERYTHING)) for question in sorted(questions)]
        for name, own in tokenizers.items()
    }
    return {name: np.percentile(own, (0, 50, 95, 100)).round().astype(int).tolist() for name, own in lengths.items()}


def _write_split(split: Split, folder: Path, shard_size: int, clusters: dict[str, int] | None) -> None:
    if clusters is None:
        _write_shards(split, list(split.kept.items()), folder, shard_size)
        return
    for cluster in range(max(clusters.values()) + 1):
        own = {place: [one for one in kept if clusters[one.question] == cluster] for place, kept in split.kept.items()}
        _write_shards(
            split, [(place, kept) for place, kept in own.items() if kept], folder / f"cluster-{cluster:02d}", shard_size
        )


def _write_shards(
    split: Split, samples: list[tuple[tuple[int, int], list[Instruction]]], folder: Path, shard_size: int
):
    folder.mkdir(exist_ok=True)
    for number, start in enumerate(range(0, len(samples), shard_size)):
        with tarfile.open(folder / f"{split.name}-{number:05d}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for offset, (place, kept) in enumerate(samples[start : start + shard_size]):
                raw = split.shards.read(*place, with_record=True)
                record = {
                    name: value for name, value in raw.record.items() if name not in Instruction.__dataclass_fields__
                }
                record["instructions"] = [one.entry() for one in kept]
                parts = {
                    IMAGE_KINDS.get(bytes(raw.image[:3]), "jpg"): raw.image,
                    "txt": split.captions[place][0].encode(),
                    "json": json.dumps(record, ensure_ascii=False).encode(),
                }
                for kind, content in parts.items():
                    info = tarfile.TarInfo(f"{start + offset:09d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def _open_staging(out: Path) -> Path:
    if out.exists() and any(entry.name != STAGING for entry in out.iterdir()):
        raise UserError(f"run.dir: {out} is not empty; give a new folder, or remove what is in it")
    staging = out / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def _summary(split: Split) -> dict[str, Any]:
    instructions = list(split.instructions())
    responses: dict[str, Counter] = {}
    for one in instructions:
        responses.setdefault(one.task, Counter())[one.response] += 1
    return {
        "samples": split.num_samples,
        "bad_samples": split.bad[:20],
        "samples_with_instructions": len(split.kept),
        "instructions_made": split.num_built,
        "instructions_kept": len(instructions),
        "held_out_phrasings": sum(one.held_out for one in instructions),
        "meanings": len({one.meaning for one in instructions if one.meaning}),
        "removed": dict(split.removed.counts.most_common()),
        "removed_examples": split.removed.examples,
        "tasks": dict(Counter(one.task for one in instructions).most_common()),
        "responses": {task: dict(own.most_common(12)) for task, own in sorted(responses.items())},
    }


def describe(report: dict[str, Any], out: Path) -> str:
    """The report in a few lines."""
    lines = []
    for name, split in report["splits"].items():
        removed = ", ".join(f"{count:,} {reason}" for reason, count in split["removed"].items()) or "nothing"
        tasks = ", ".join(f"{count:,} {task or 'unnamed'}" for task, count in split["tasks"].items())
        lines.append(
            f"{name}: {split['instructions_kept']:,} instructions about {split['samples_with_instructions']:,} of "
            f"{split['samples']:,} samples ({tasks}); removed: {removed}"
        )
    for number, cluster in enumerate(report.get("clusters", [])):
        tasks = ", ".join(f"{count:,} {task or 'unnamed'}" for task, count in list(cluster["tasks"].items())[:4])
        lines.append(f"cluster-{number:02d}: {cluster['instructions']:,} instructions ({tasks})")
    for name, (least, median, most_of, longest) in report["tokens"].items():
        lines.append(
            f"prompts in tokens of {name}: {least} to {longest}, half of them up to {median}, 95% up to {most_of}"
        )
    return "\n".join([*lines, f"{out / REPORT}"])
