"""`mmscale inspect` and `mmscale index`: what they find, say and write."""

import re

import pytest
from shard_files import sample, tokenizer, write_shard, write_shards
from test_data_loader import bad_parts

from mmscale.data.indexing import index_shards
from mmscale.data.inspection_page import inspect
from mmscale.errors import UserError


def test_an_inspection_counts_what_is_there(tmp_path, capsys):
    samples = {f"{number:03d}": sample(number) for number in range(20)}
    samples |= {"again": sample(3), "same words": {**sample(40), "txt": sample(5)["txt"]}}
    samples |= {f"bad {number}": parts for number, (parts, _) in enumerate(bad_parts().values())}
    path = str(write_shard(tmp_path / "a.tar", samples))
    found = inspect(path, tokenizer=tokenizer().path)
    assert (found.num_shards, found.num_samples, found.num_read) == (1, len(samples), len(samples))
    assert found.formats == {"JPEG RGB": 22}
    assert found.percentiles("width") == [40] * 5 and found.percentiles("height") == [32] * 5
    lengths = [len(tokenizer().encode(sample(number)["txt"].decode(), 999)) for number in range(20)]
    assert found.values["caption tokens"][:20] == lengths
    assert [key for key, _ in found.broken] == [f"a/bad {number}" for number in range(len(bad_parts()))]
    assert found.same_image == [(2, "a/003")]
    assert found.same_caption == [(2, "a/003"), (2, "a/005")]
    printed = capsys.readouterr().out
    assert "caption tokens" in printed and "a/bad 4" in printed


def test_the_page_is_self_contained_and_escapes_the_data(tmp_path):
    evil = b"<script>alert('x')</script> & <img src=x onerror=alert(1)>"
    path = str(
        write_shard(tmp_path / "a.tar", {"<b>key</b>": {**sample(1), "txt": evil}, "y": {**sample(2), "txt": b""}})
    )
    inspect(path, html=str(tmp_path / "new" / "page.html"))
    page = (tmp_path / "new" / "page.html").read_text()
    assert "<script" not in page and "<b>key" not in page and "<img src=x" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp;" in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "the caption is empty" in page and page.count("data:image/jpeg;base64,") == 1


def test_an_inspection_of_a_few_samples_and_of_a_damaged_shard(tmp_path):
    paths = write_shards(tmp_path, [9, 9])
    assert inspect(paths, limit=5).num_read == 5
    whole = (tmp_path / "train-00001.tar").read_bytes()
    (tmp_path / "train-00001.tar").write_bytes(whole[: len(whole) // 2])
    assert 9 < inspect(paths).num_read < 18


def test_index_prints_counts_and_names_what_is_lost(tmp_path, capsys):
    paths = write_shards(tmp_path, [5, 6])
    assert index_shards(paths, manifest=str(tmp_path / "manifest.json")) == 0
    assert "2 shards, 11 samples" in capsys.readouterr().out
    data = bytearray((tmp_path / "train-00001.tar").read_bytes())
    at = data.index(b"000007.txt")
    data[at + 2] ^= 1
    (tmp_path / "train-00001.tar").write_bytes(data)
    assert index_shards(paths) == 1
    printed = capsys.readouterr().out
    assert "2 shards, 10 samples" in printed and "1 damaged" in printed
    assert (
        "5 samples are whole" in printed and "lost: 000007" in printed and f"damaged header at byte {at:,}" in printed
    )


def test_index_refuses_what_is_no_shard(tmp_path):
    (tmp_path / "x.tar").write_text("text")
    with pytest.raises(UserError, match=r"x\.tar: is not a tar"):
        index_shards(str(tmp_path / "x.tar"))
    with pytest.raises(UserError, match="no such shard"):
        index_shards(str(tmp_path / "nowhere.tar"))
