import os
import tarfile

import numpy as np
import pytest
from shard_files import write_shard, write_shards

from mmscale.config import DataConfig
from mmscale.data.captions import SampleError
from mmscale.data.index import Indexes, build_index
from mmscale.data.paths import expand
from mmscale.data.shards import Shards
from mmscale.data.store import ShardStore
from mmscale.errors import UserError


def test_the_sidecar_is_written_used_and_small(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.tar", range(200), json=True)
    built = Indexes(ShardStore()).index(str(path))
    sidecar = tmp_path / "a.tar.index"
    assert sidecar.stat().st_size <= 16 * 600 + 1000
    monkeypatch.setattr("mmscale.data.index.build_index", lambda *_: pytest.fail("the sidecar was not used"))
    read = Indexes(ShardStore()).index(str(path))
    assert read.summary == built.summary and np.array_equal(read.records, built.records)
    assert read.members(7) == built.members(7) and set(read.members(7)) == {"jpg", "txt", "json"}


@pytest.mark.parametrize("damage", ["header", "records", "cut", "empty", "magic"])
def test_a_damaged_sidecar_is_made_again(tmp_path, damage):
    path = write_shard(tmp_path / "a.tar", range(20))
    before = Indexes(ShardStore()).index(str(path))
    sidecar = tmp_path / "a.tar.index"
    data = bytearray(sidecar.read_bytes())
    if damage in ("header", "records", "magic"):
        data[{"header": 40, "records": len(data) - 9, "magic": 2}[damage]] ^= 1
    sidecar.write_bytes(data[: {"cut": len(data) - 5, "empty": 0}.get(damage, len(data))])
    after = Indexes(ShardStore()).index(str(path))
    assert after.summary == before.summary and np.array_equal(after.records, before.records)


def test_a_changed_shard_gets_a_new_index_and_digest(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(5))
    before = Indexes(ShardStore()).summary(str(path))
    data = path.read_bytes()
    at = data.index(b"a picture of")
    path.write_bytes(data[:at] + b"A" + data[at + 1 :])
    os.utime(path, ns=(1, 1))
    after = Indexes(ShardStore()).summary(str(path))
    assert after.num_samples == before.num_samples and after.digest != before.digest


def test_a_read_only_folder_keeps_the_index_elsewhere(tmp_path):
    path = write_shard(tmp_path / "shards" / "a.tar", range(5))
    path.parent.chmod(0o555)
    try:
        assert len(Indexes(ShardStore()).index(str(path))) == 5
        assert os.listdir(path.parent) == ["a.tar"]
        Indexes(ShardStore(index_dir=str(tmp_path / "indexes"))).index(str(path))
    finally:
        path.parent.chmod(0o755)
    assert [p.name for p in (tmp_path / "indexes").rglob("*.index")] == ["a.tar.index"]


def test_a_shard_that_changes_under_a_run_never_gives_a_wrong_pair(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(5))
    shards = Shards([str(path)], DataConfig())
    assert shards.read(0, 3).key == "000003"
    with tarfile.open(path) as tar:
        offset = tar.getmember("000003.txt").offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 6] = b"000004"
    path.write_bytes(data)
    with pytest.raises(SampleError, match="has changed since it was indexed"):
        shards.read(0, 3)
    os.truncate(path, offset + 600)
    with pytest.raises(SampleError, match="shorter"):
        shards.read(0, 4)


def test_long_names_and_dotted_kinds(tmp_path):
    long = "d/" * 60 + "key" * 20
    samples = {long: {"jpg": b"x", "txt": b"a"}, "b": {"seg.png": b"y", "PNG": b"z", "txt": b"b"}}
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        index = build_index(str(write_shard(tmp_path / "a.tar", samples, tar_format)))
        assert index.summary.problems == []
        assert set(index.members(1)) == {"seg.png", "png", "txt"}
        shards = Shards([str(tmp_path / "a.tar")], DataConfig())
        assert [shards.key(0, number) for number in (0, 1)] == [long, "b"]


def test_paths_globs_braces_lists_and_folders_name_the_same_shards(tmp_path):
    paths = write_shards(tmp_path, [1, 1, 1])
    (tmp_path / "list.txt").write_text("# comment\n" + "\n".join(paths) + "\n")
    ways = (f"{tmp_path}/train-*.tar", f"{tmp_path}/train-{{00000..00002}}.tar", paths, f"@{tmp_path}/list.txt")
    for way in (*ways, str(tmp_path)):
        assert expand(way) == paths
    assert expand("s3://bucket/{0..2}.tar") == [f"s3://bucket/{n}.tar" for n in range(3)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere.tar", "no such shard: .*nowhere"),
        ("nowhere-*.tar", "no shard matches"),
        ("train-{00000..00007}.tar", r"no such shard: .*00001\.tar"),
        ("@nowhere.txt", "cannot be read"),
        ("empty", "holds no .tar files"),
    ],
)
def test_shards_that_are_not_there_are_named(tmp_path, monkeypatch, pattern, message):
    write_shards(tmp_path, [1])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"data.train: {message}|data.train.*{message}"):
        expand(pattern, "data.train")


def test_a_shard_that_is_listed_twice_is_refused(tmp_path):
    paths = write_shards(tmp_path, [1])
    with pytest.raises(UserError, match="listed twice"):
        expand(paths * 2)
