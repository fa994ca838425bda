"""Sources that cannot be indexed: allowed pipes, shards that break off, streams that hold nothing."""

import itertools
import threading

import pytest
from shard_files import caption, tokenizer, write_shards
from test_data_loader import rows, stream

from mmscale.config import DataConfig
from mmscale.errors import UserError


def read(data, batches=3, first=0, **options):
    source = stream(data, micro_batch=2, **options)
    found = {}
    for batch in itertools.islice(source.batches(first), batches):
        found |= rows(batch)
    source.close()
    return found


def config(shards, **changes):
    return DataConfig(train=shards, mode="stream", shuffle_buffer=8, **changes)


def test_pipes_run_only_when_they_are_allowed(tmp_path):
    (path,) = write_shards(tmp_path, [9])
    touched = tmp_path / "touched"
    pipe = f"pipe:touch {touched}; cat {path}"
    for refused in (DataConfig(train=pipe), config(pipe)):
        with pytest.raises(UserError, match=r"data\.train: a pipe: source runs a shell command.*allow_pipe"):
            stream(refused)
    assert not touched.exists()
    found = read(config(pipe, allow_pipe=True))
    assert touched.exists() and sorted(found) == list(range(36))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_and_captions_stay_together(tmp_path, workers):
    found = read(config(write_shards(tmp_path, [9, 9])), workers=workers)
    for key, _, ids in found.values():
        assert tokenizer().decode(ids) == caption(int(key.rpartition("/")[2]))
    assert len({key for key, _, _ in found.values()}) > 9


def test_ranks_and_resumed_runs_draw_other_samples(tmp_path):
    data = config(write_shards(tmp_path, [40, 40]))
    draws = [read(data), read(data, rank=1, world_size=2), read(data, first=36)]
    orders = [[found[position][0] for position in sorted(found)][:12] for found in draws]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    assert read(data) == draws[0]


def test_a_shard_that_breaks_off_is_said_and_left(tmp_path, caplog):
    whole, broken = write_shards(tmp_path, [9, 9])
    with open(broken, "r+b") as file:
        file.truncate(3200)
    found = read(config([whole, broken]), batches=6)
    assert len(found) == 72
    assert "left where it breaks off" in caplog.text


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_a_stream_without_samples_is_an_error_and_no_endless_loop(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match="shards in a row gave no sample"):
        read(config(str(tmp_path / "a.tar")))


def test_a_closed_stream_leaves_no_thread_behind(tmp_path):
    read(config(write_shards(tmp_path, [9])))
    for thread in threading.enumerate():
        if thread.name == "stream":
            thread.join(timeout=5)
            assert not thread.is_alive()


def test_the_state_of_a_stream_knows_its_sources(tmp_path):
    data = config(write_shards(tmp_path, [9]))
    state = stream(data).state(36)
    stream(data).check_state(state)
    assert stream(data).epoch(36) == 0.0
    with pytest.raises(UserError, match="the sources, or their weights, are others"):
        stream(config(write_shards(tmp_path, [9], "other"))).check_state(state)
