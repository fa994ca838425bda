"""Shards damaged at any byte: what is read is right, what is lost is said."""

import io
import re
import tarfile

import numpy as np
import pytest
from shard_files import caption, picture, sample, write_shard

from mmscale.config import DataConfig
from mmscale.data.captions import SampleError
from mmscale.data.index import build_index
from mmscale.data.shards import Shards
from mmscale.errors import UserError

NUM = 9


def contents(path, **config):
    """(summary, [(key, image, caption)]) of what a damaged shard still gives; None when it is refused."""
    try:
        shards = Shards([str(path)], DataConfig(on_damaged_shard="use_rest", **config))
    except UserError:
        return None
    found = []
    for number in range(shards.counts[0]):
        try:
            raw = shards.read(0, number)
        except SampleError:
            continue
        found.append((raw.key, raw.image, raw.captions[0][0]))
    return shards._summary(str(path)), found


def number_in(data: bytes) -> str | None:
    """Which sample an image or a caption belongs to, by the marks that are whole."""
    marks = re.findall(rb"<(\d{6})>", data)
    return max(set(marks), key=marks.count) if marks else None


def check(path, expect_loss_said=True):
    result = contents(path)
    if result is None:
        return
    summary, found = result
    for _, image, text in found:
        pair = number_in(image), number_in(text.encode())
        assert None in pair or pair[0] == pair[1], f"a wrong pair: {pair}"
    if expect_loss_said and len(found) < NUM and not summary.problems:
        # Where the shard looks whole, each sample that cannot be read is there to be named.
        assert summary.num_samples >= NUM


LAYOUTS = {
    "ustar": (tarfile.USTAR_FORMAT, ""),
    "pax": (tarfile.PAX_FORMAT, "folder/" + "long" * 30 + "/"),
    "gnu": (tarfile.GNU_FORMAT, "folder/" + "long" * 30 + "/"),
}


def layout_bytes(tmp_path, name, first=0):
    tar_format, prefix = LAYOUTS[name]
    samples = {f"{prefix}{number:06d}": sample(number, json=True) for number in range(first, first + NUM)}
    return write_shard(tmp_path / f"{name}-{first}.tar", samples, tar_format).read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_damage_gives_a_wrong_pair_a_crash_or_a_silent_loss(tmp_path, layout):
    whole, other = layout_bytes(tmp_path, layout), layout_bytes(tmp_path, layout, first=100)
    rng = np.random.default_rng(len(layout))
    path = tmp_path / "damaged.tar"
    for case in range(800):
        damaged = bytearray(whole)
        kind = case % 4
        if kind == 0:  # flipped bits, half of them in headers
            for _ in range(rng.integers(1, 4)):
                at = int(rng.integers(len(whole)))
                at -= at % 512 - int(rng.integers(512)) if rng.random() < 0.5 else 0
                damaged[min(at, len(whole) - 1)] ^= 1 << int(rng.integers(8))
        elif kind == 1:  # cut short
            del damaged[int(rng.integers(len(whole))) :]
        elif kind == 2:  # spliced, at block boundaries or anywhere
            step = int(rng.choice([1, 512]))
            a, b = (int(rng.integers(len(whole) // step)) * step for _ in range(2))
            damaged = bytearray(whole[:a] + other[b:])
        else:  # a stretch that is overwritten
            at, length = int(rng.integers(len(whole))), int(rng.integers(1, 3000))
            damaged[at : at + length] = rng.bytes(len(damaged[at : at + length]))
        path.write_bytes(damaged)
        check(path, expect_loss_said=kind != 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_shard_of_every_layout_is_read_whole(tmp_path, layout):
    (tmp_path / "whole.tar").write_bytes(layout_bytes(tmp_path, layout))
    summary, found = contents(tmp_path / "whole.tar")
    assert summary.problems == []
    prefix = LAYOUTS[layout][1]
    assert [key for key, _, _ in found] == [f"{prefix}{number:06d}" for number in range(NUM)]
    assert [(image, text) for _, image, text in found] == [(picture(n), caption(n)) for n in range(NUM)]


def test_a_damaged_header_costs_one_sample_where_webdataset_loses_the_rest(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(20))
    with tarfile.open(path) as tar:
        header = tar.getmember("000004.txt").offset
    data = bytearray(path.read_bytes())
    data[header + 3] ^= 0xFF
    path.write_bytes(data)
    summary, found = contents(path)
    assert [key for key, _, _ in found] == [f"{number:06d}" for number in range(20) if number != 4]
    assert summary.lost_keys == ["000004"]
    assert f"damaged header at byte {header:,}" in summary.problems[0]


@pytest.mark.parametrize("blocks", [1, 2, 20])
def test_a_shard_cut_at_a_member_boundary_is_said_to_be_damaged(tmp_path, blocks):
    path = write_shard(tmp_path / "a.tar", range(5))
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[: end + 512 * (blocks if blocks < 20 else 0)])
    problems = build_index(str(path)).summary.problems
    assert bool(problems) == (blocks != 2)


def test_damage_stops_by_default_and_names_shard_and_rest(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(5))
    path.write_bytes(path.read_bytes()[:3200])
    with pytest.raises(UserError, match=r"a\.tar is damaged: 000001\.jpg is cut off.*1 samples of it are whole"):
        Shards([str(path)], DataConfig())
    other = write_shard(tmp_path / "b.tar", range(5, 9))
    skipped = Shards([str(path), str(other)], DataConfig(on_damaged_shard="skip"))
    assert (skipped.names, skipped.counts) == (["b"], [4])


def test_members_of_a_sample_that_lie_apart_are_joined(tmp_path):
    path = tmp_path / "apart.tar"
    with tarfile.open(path, "w") as tar:
        for kind in ("jpg", "txt"):
            for number in range(6):
                info = tarfile.TarInfo(f"{number:06d}.{kind}")
                data = sample(number)[kind]
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    summary, found = contents(path)
    assert summary.problems == []
    assert [(image, text) for _, image, text in found] == [(picture(n), caption(n)) for n in range(6)]


def test_a_key_with_two_captions_is_given_up_and_said(tmp_path):
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in [
            ("1.jpg", picture(1)),
            ("1.txt", b"one"),
            ("1.txt", b"two"),
            ("2.jpg", b"x"),
            ("2.txt", b"y"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    summary, found = contents(path)
    assert [key for key, _, _ in found] == ["2"]
    assert "two members of one kind" in summary.problems[0]
    assert summary.lost_keys == ["1"]


def test_not_a_tar_no_images_and_gzip_are_refused_by_name(tmp_path):
    text = tmp_path / "text.tar"
    text.write_text("not a tar " * 1000)
    with pytest.raises(UserError, match=r"text\.tar: is not a tar"):
        Shards([str(text)], DataConfig())
    bare = write_shard(tmp_path / "bare.tar", {"a": {"txt": b"only text"}})
    with pytest.raises(UserError, match=r"bare\.tar: holds no images .*found: txt"):
        Shards([str(bare)], DataConfig())
    packed = tmp_path / "packed.tar"
    packed.write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(UserError, match="gunzip"):
        Shards([str(packed)], DataConfig())
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.tar: is not a tar"):
        Shards([str(tmp_path / "empty.tar")], DataConfig())
