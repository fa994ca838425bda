"""The stream: any number of ranks, workers and micro-batches give the same samples; bad samples change nothing else."""

import io
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_files import bomb, caption, picture, sample, tokenizer, write_shard, write_shards

from mmscale.config import DataConfig
from mmscale.data.batches import trimmed_length
from mmscale.data.loader import EvalSet, TrainStream
from mmscale.errors import UserError


def stream(data, *, rank=0, world_size=1, global_batch=12, micro_batch=1, seed=3, workers=0, size=16, **changes):
    if not isinstance(data, DataConfig):
        data = DataConfig(train=data, lanes=4, block=8)
    data = data.model_copy(update={"workers": workers, **changes})
    return TrainStream(
        data,
        tokenizer(),
        image_size=size,
        context_length=63,
        seed=seed,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
    )


def rows(batches):
    """position -> (key, pixels, ids) of every row of a list of batches."""
    found = {}
    for batch in batches:
        for row, position in enumerate(batch.positions.tolist()):
            ids = batch.input_ids[row, : batch.lengths[row]].tolist()
            assert position not in found
            found[position] = (batch.keys[row], batch.pixel_values[row].numpy().tobytes(), ids)
    return found


def consume(data, first, num_batches, world_size, workers, micro_batch=1, **options):
    found = {}
    for rank in range(world_size):
        source = stream(data, rank=rank, world_size=world_size, workers=workers, micro_batch=micro_batch, **options)
        for batches in itertools.islice(source.batches(first), num_batches):
            found |= rows(batches)
        source.close()
    return found


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 3), min_size=2, max_size=3),
    seed=st.integers(0, 2**40),
)
def test_runs_cut_anywhere_and_continued_in_another_shape_see_the_same_samples(counts, cuts, seed):
    with tempfile.TemporaryDirectory() as folder:
        paths = write_shards(Path(folder), counts)
        whole = consume(paths, 0, sum(cuts), 1, 0, seed=seed)
        assert sorted(whole) == list(range(12 * sum(cuts)))
        shapes = itertools.cycle([(2, 3, 3), (4, 1, 1), (3, 2, 2), (1, 0, 4)])
        joined, first = {}, 0
        for num_batches, (world_size, workers, micro_batch) in zip(cuts, shapes, strict=False):
            joined |= consume(paths, first, num_batches, world_size, workers, micro_batch, seed=seed)
            first += 12 * num_batches
        assert joined == whole


def test_a_rank_takes_every_nth_row_in_consecutive_micro_batches(tmp_path):
    source = stream(write_shards(tmp_path, [30]), rank=1, world_size=2, micro_batch=3)
    first, second = itertools.islice(source.batches(24), 2)
    assert [batch.positions.tolist() for batch in first] == [[25, 27, 29], [31, 33, 35]]
    assert [batch.positions.tolist() for batch in second] == [[37, 39, 41], [43, 45, 47]]


def test_an_epoch_holds_every_sample_once_and_its_tail_is_carried_on(tmp_path):
    found = consume(write_shards(tmp_path, [7, 5, 1]), 0, 13, 1, 2)
    keys = [found[position][0] for position in range(156)]
    for epoch in range(12):
        assert len(set(keys[epoch * 13 : (epoch + 1) * 13])) == 13


def test_pixels_and_captions_belong_together_and_to_their_keys(tmp_path):
    paths = write_shards(tmp_path, [9, 9])
    data = DataConfig(train=paths, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), workers=0)
    data = data.model_copy(update={"crop_ratio": (1.25, 1.25)})  # the pictures' own
    for batch in next(stream(data, size=32, micro_batch=12).batches(0)):
        for row, key in enumerate(batch.keys):
            number = int(key.rpartition("/")[2])
            assert tokenizer().decode(batch.input_ids[row].tolist()) == caption(number)
            expected = Image.open(io.BytesIO(picture(number))).resize((32, 32), Image.Resampling.BICUBIC)
            pixels = batch.pixel_values[row].permute(1, 2, 0).numpy()
            assert np.abs(pixels.astype(int) - np.asarray(expected).astype(int)).max() <= 3


def test_epochs_and_seeds_crop_anew(tmp_path):
    paths = write_shards(tmp_path, [12])
    found = consume(paths, 0, 2, 1, 0)
    first = {found[position][0]: found[position][1] for position in range(12)}
    second = {found[position][0]: found[position][1] for position in range(12, 24)}
    assert first.keys() == second.keys()
    assert sum(first[key] != second[key] for key in first) >= 10


def test_captions_are_padded_to_a_multiple_of_eight_with_the_class_token(tmp_path):
    for batch in next(stream(write_shards(tmp_path, [30]), micro_batch=6).batches(0)):
        assert (batch.input_ids.shape[1] + 1) % 8 == 0
        longest = int(batch.lengths.max())
        assert longest <= batch.input_ids.shape[1] < longest + 8
        for ids, length in zip(batch.input_ids.tolist(), batch.lengths.tolist(), strict=True):
            assert ids[0] == tokenizer().start_id and ids[length - 1] == tokenizer().end_id
            assert set(ids[length:]) <= {tokenizer().pad_id}
    assert [trimmed_length(n, 76) for n in (0, 7, 8, 71, 72, 76)] == [7, 7, 15, 71, 76, 76]


def bad_parts():
    good = sample(900)
    return {
        "truncated": ({**good, "jpg": good["jpg"][:500]}, "cannot be decoded"),
        "zero bytes": ({**good, "jpg": b""}, "no bytes"),
        "not an image": ({**good, "jpg": b"hello"}, "not an image"),
        "bomb": ({"png": bomb("PNG"), "txt": good["txt"]}, "pixels"),
        "no caption": ({"jpg": good["jpg"]}, "no caption"),
        "no image": ({"txt": good["txt"]}, "no image"),
        "empty caption": ({**good, "txt": b" \n"}, "caption is empty"),
        "broken UTF-8": ({**good, "txt": b"caf\xe9 \xff"}, "not UTF-8"),
        "100 kB": ({**good, "txt": b"word " * 20_000}, "caption has 100,000 bytes"),
    }


def test_a_bad_sample_becomes_a_masked_slot_and_changes_nothing_else(tmp_path):
    cases = bad_parts()
    samples = {f"{number:06d}": sample(number) for number in range(24)}
    whole = write_shard(tmp_path / "whole" / "a.tar", samples)
    spoilt = dict(zip(list(samples)[3:], [parts for parts, _ in cases.values()], strict=False))
    broken = write_shard(tmp_path / "broken" / "a.tar", {**samples, **spoilt})
    expected = consume([str(whole)], 0, 2, 1, 0)
    for workers in (0, 2):
        found, bad, invalid = {}, [], []
        for batches in itertools.islice(stream([str(broken)], workers=workers, micro_batch=4).batches(0), 2):
            found |= rows(batches)
            bad += [entry for batch in batches for entry in batch.bad]
            for batch in batches:
                assert torch.equal(batch.valid, batch.lengths > 0)
                assert not batch.pixel_values[~batch.valid].any()
                invalid += batch.positions[~batch.valid].tolist()
        assert sorted(invalid) == sorted(entry.position for entry in bad) and len(bad) == len(cases)
        reasons = {entry.key: entry.reason for entry in bad}
        assert {entry.shard for entry in bad} == {"a"}
        for key, (_, reason) in zip(spoilt, cases.values(), strict=True):
            assert reason in reasons[key]
        for position, (key, pixels, ids) in expected.items():
            assert found[position][0] == key
            if key.rpartition("/")[2] not in spoilt:
                assert found[position] == (key, pixels, ids)


def test_a_batch_of_bad_samples_only_is_still_a_batch(tmp_path):
    path = write_shard(tmp_path / "a.tar", {f"{n}": {"jpg": b"", "txt": b"x"} for n in range(4)})
    for batch in next(stream([str(path)], micro_batch=6).batches(0)):
        assert not batch.valid.any() and batch.input_ids.shape == (6, 7)


def test_a_sample_that_takes_long_is_named(tmp_path, caplog):
    source = stream(write_shards(tmp_path, [3]), slow_sample_s=1e-9)
    next(source.batches(0))
    assert "train-00000/000001 took" in caplog.text


def test_fields_of_the_json_and_lists_of_texts_are_drawn_by_position(tmp_path):
    samples = {
        f"{n}": {**sample(n), "json": b'{"caption": "one", "more": {"texts": ["two", "three"]}}'} for n in range(9)
    }
    path = str(write_shard(tmp_path / "a.tar", samples))
    base = DataConfig(train=path, lanes=2, block=4)

    def texts(text_key, workers=0):
        found = consume(base.model_copy(update={"text_key": text_key}), 0, 5, 1, workers)
        return [tokenizer().decode(found[position][2]) for position in sorted(found)]

    assert set(texts("json.caption")) == {"one"}
    assert set(texts("missing;json.caption")) == {"one"}
    drawn = texts(["json.caption", "json.more.texts"])
    assert set(drawn) == {"one", "two", "three"} and drawn == texts(["json.caption", "json.more.texts"], workers=2)
    assert 15 < drawn.count("one") < 45


def test_flips_mirror_about_half_of_the_pictures(tmp_path):
    paths = write_shards(tmp_path, [12])
    plain = consume(paths, 0, 10, 1, 0)
    flipped = consume(DataConfig(train=paths, lanes=4, block=8, flip=True), 0, 10, 1, 0)
    mirrored = 0
    for position, (_, pixels, _) in plain.items():
        image = np.frombuffer(pixels, dtype=np.uint8).reshape(3, 16, 16)
        other = np.frombuffer(flipped[position][1], dtype=np.uint8).reshape(3, 16, 16)
        assert np.array_equal(other, image) or np.array_equal(other, image[:, :, ::-1])
        mirrored += not np.array_equal(other, image)
    assert 40 < mirrored < 80


def test_several_sources_keep_their_shares_in_every_shape(tmp_path):
    first, second = write_shards(tmp_path / "a", [20, 30], "a"), write_shards(tmp_path / "b", [10], "b")
    sources = [{"shards": first, "weight": 3}, {"shards": second, "weight": 1}]
    data = DataConfig(sources=sources, lanes=4, block=8)
    found = consume(data, 0, 2, 1, 0, global_batch=1000, micro_batch=100)
    for start in (0, 1000):
        keys = [found[position][0] for position in range(start, start + 1000)]
        assert sum(key.startswith("b-") for key in keys) == 250
    assert consume(data, 1000, 1, 4, 2, 125, global_batch=1000) == {p: found[p] for p in range(1000, 2000)}


def test_the_state_refuses_other_data_and_names_the_shard(tmp_path):
    paths = write_shards(tmp_path, [5, 6, 7])
    state = stream(paths).state(24)
    stream(paths, rank=1, world_size=2, micro_batch=3, workers=3).check_state(state)
    assert {key: state[key] for key in ("samples", "seed", "order_version")} == {
        "samples": 24, "seed": 3, "order_version": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"run\.seed is 4"):
        stream(paths, seed=4).check_state(state)
    with pytest.raises(UserError, match="had 3 shards, now there are 2"):
        stream(paths[:2]).check_state(state)
    with pytest.raises(UserError, match=r"data\.lanes"):
        stream(paths, lanes=8).check_state(state)
    write_shard(tmp_path / "train-00001.tar", range(100, 106))
    with pytest.raises(UserError, match="shard train-00001 differs"):
        stream(paths).check_state(state)
    stream(paths, allow_change=True).check_state(state)
    with pytest.raises(UserError, match="order is version 0"):
        stream(paths).check_state({**state, "order_version": 0})


def test_the_same_shards_in_another_folder_are_the_same_data(tmp_path):
    state = stream(write_shards(tmp_path / "here", [5, 6])).state(12)
    stream(write_shards(tmp_path / "there", [5, 6])).check_state(state)


def test_global_batches_that_do_not_divide_and_missing_data_are_refused(tmp_path):
    paths = write_shards(tmp_path, [5])
    with pytest.raises(UserError, match=r"train\.global_batch \(12\) does not divide into 5 ranks"):
        stream(paths, world_size=5)
    with pytest.raises(UserError, match="whole micro-batches of 5"):
        stream(paths, micro_batch=5)
    with pytest.raises(UserError, match=r"data\.train is required"):
        stream(DataConfig())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_reaches_the_loop(tmp_path, workers, monkeypatch):
    source = stream(write_shards(tmp_path, [5]), workers=workers)
    monkeypatch.setattr(source._source._reader, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(source.batches(0))
    source.close()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("limit", [None, 5, 1])
def test_an_eval_set_is_read_once_over_all_ranks_in_equal_numbers_of_batches(tmp_path, world_size, limit):
    paths = write_shards(tmp_path, [4, 1, 6])
    keys, lengths = [], set()
    for rank in range(world_size):
        eval_set = EvalSet(
            paths, tokenizer(), data=DataConfig(workers=rank % 2), image_size=16, context_length=63, batch_size=2,
            rank=rank, world_size=world_size, limit=limit,
        )  # fmt: skip
        batches = list(eval_set)
        lengths.add(len(batches))
        assert len(batches) == len(eval_set)
        for batch in batches:
            keys += [key for key, valid in zip(batch.keys, batch.valid, strict=True) if valid]
            assert (batch.positions[~batch.valid] == -1).all()
    assert len(lengths) == 1
    assert sorted(keys) == sorted(
        f"train-{shard:05d}/{number:06d}"
        for number, shard in enumerate([0] * 4 + [1] + [2] * 6)
        if number < (limit or 99)
    )


def test_an_eval_set_gives_records_and_captions(tmp_path):
    record = b'{"captions": ["a", "b"], "class_name": "cat"}'
    samples = {"x": {**sample(1), "json": record}, "y": sample(2), "z": {**sample(3), "txt": b""}}
    path = str(write_shard(tmp_path / "val.tar", samples))
    (batch,) = EvalSet(path, tokenizer(), data=DataConfig(), image_size=16, context_length=63, batch_size=8)
    assert batch.captions == [["a", "b"], [caption(2)], []]
    assert batch.records[0]["class_name"] == "cat" and batch.records[1] == {}
    assert batch.valid.tolist() == [True, True, False] and batch.bad[0].key == "z"
