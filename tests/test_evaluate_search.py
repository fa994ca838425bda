"""Searching and captioning what lies on disk: the nearest pictures, an index made once, pages nobody can poison."""

import io
import logging
import tarfile

import pytest
from checkpoints import write_checkpoint
from PIL import Image
from small_split import BAD, NUM_SAMPLES, write_shard

from mmscale.errors import UserError
from mmscale.evaluate import search
from mmscale.evaluate.caption_command import caption_command
from mmscale.evaluate.pictures import read_again, read_pictures
from mmscale.evaluate.search import embed_pictures, embed_texts, open_index
from mmscale.evaluate.search_command import search_command
from mmscale.pretrained import load_pretrained


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a shard, and a folder with three of its pictures and a broken one."""
    folder = tmp_path_factory.mktemp("search")
    write_checkpoint(folder / "run")
    write_shard(folder / "val.tar")
    (folder / "pictures" / "inner").mkdir(parents=True)
    with tarfile.open(folder / "val.tar") as tar:
        for number in (0, 1, 2):
            content = tar.extractfile(f"{number:04d}.jpg").read()
            (folder / "pictures" / ("inner" if number else ".") / f"{number}.jpg").write_bytes(content)
    (folder / "pictures" / "broken.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def pretrained(place):
    return load_pretrained(place / "run", device="cpu")


def test_pictures_are_found_by_text_as_by_brute_force(place, pretrained, tmp_path):
    index = open_index(pretrained, [str(place / "val.tar")], tmp_path / "index", batch=5)
    assert len(index) == NUM_SAMPLES - 1
    pictures = list(read_pictures([str(place / "val.tar")], pretrained))
    query = embed_texts(pretrained, ["a red circle"])
    embeds = [embed_pictures(pretrained, picture.pixels[None])[0] for picture in pictures]
    expected = sorted(((float(e @ query[0]), p.name) for e, p in zip(embeds, pictures, strict=True)), reverse=True)
    found = index.search(query, 7)[0]
    assert [answer.entry.name for answer in found] == [name for _, name in expected[:7]]
    assert [answer.similarity for answer in found] == pytest.approx([value for value, _ in expected[:7]], abs=1e-5)


def test_a_picture_finds_itself_in_a_shard(place, tmp_path):
    query = str(place / "pictures" / "inner" / "2.jpg")
    results = search_command(
        place / "run",
        [query],
        [str(place / "val.tar")],
        top=3,
        index=tmp_path / "index",
        device="cpu",
        say=lambda _: None,
    )
    assert results[0][0].entry.name == "val/0002"
    assert results[0][0].similarity == pytest.approx(1, abs=1e-5)


def test_the_index_is_made_once_and_again_when_the_files_change(place, pretrained, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (40, 40), "red").save(data / "red.png")
    lines = []
    for _ in range(2):
        assert len(open_index(pretrained, [str(data)], tmp_path / "index", say=lines.append)) == 1
    assert len(lines) == 1
    Image.new("RGB", (40, 40), "blue").save(data / "blue.png")
    assert len(open_index(pretrained, [str(data)], tmp_path / "index", say=lines.append)) == 2
    assert len(lines) == 2


def test_without_faiss_one_line_says_what_to_install(pretrained, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        search.open_index(pretrained, ["x"])


def test_folders_files_and_shards_are_read_and_broken_pictures_left_out(place, pretrained, caplog):
    with caplog.at_level(logging.WARNING):
        names = [p.name for p in read_pictures([str(place / "pictures"), str(place / "val.tar")], pretrained)]
    assert [name.rsplit("/", 1)[-1] for name in names[:3]] == ["0.jpg", "1.jpg", "2.jpg"]
    assert len(names) == 3 + NUM_SAMPLES - 1
    assert "broken.png" in caplog.text and f"{BAD:04d}" in caplog.text
    assert len(list(read_pictures([str(place / "val.tar")], pretrained, limit=4))) == 4


def test_a_picture_is_read_again_from_its_place(place, pretrained):
    for picture in read_pictures([str(place / "val.tar"), str(place / "pictures")], pretrained):
        assert (read_again(picture.source, picture.place, pretrained).pixels == picture.pixels).all()


@pytest.mark.parametrize(("source", "message"), [("none.jpg", "cannot be read"), ("empty", "holds no pictures")])
def test_a_source_that_is_not_there_or_empty_is_refused(pretrained, tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        list(read_pictures([str(tmp_path / source)], pretrained))


def test_a_picture_that_the_user_names_must_be_one(place, pretrained):
    with pytest.raises(UserError, match=r"broken\.png: the image cannot be decoded"):
        list(read_pictures([str(place / "pictures" / "broken.png")], pretrained))


def test_captions_go_to_the_terminal_to_a_file_and_into_a_picture(place, tmp_path):
    lines = []
    captions = caption_command(
        place / "run",
        [str(place / "val.tar")],
        limit=5,
        output=tmp_path / "captions.jsonl",
        picture=tmp_path / "captions.png",
        batch=2,
        device="cpu",
        say=lines.append,
    )
    assert [line.partition("\t")[0] for line in lines] == [f"val/{number:04d}" for number in range(5)]
    assert [line.partition("\t")[2] for line in lines] == captions
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 5
    assert Image.open(tmp_path / "captions.png").size == (4 * 280, 2 * 352)


def test_a_page_of_results_holds_no_markup_from_data(place, tmp_path):
    shard = tmp_path / "evil.tar"
    with tarfile.open(place / "val.tar") as source, tarfile.open(shard, "w") as target:
        content = source.extractfile("0000.jpg").read()
        for kind, data in (("jpg", content), ("txt", b"<script>alert(1)</script>")):
            info = tarfile.TarInfo(f"a.{kind}")
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))
    html = tmp_path / "found.html"
    search_command(place / "run", ["<b>red</b>"], [str(shard)], index=tmp_path / "index", html=html, device="cpu")
    text = html.read_text()
    assert "<script>" not in text and "<b>red" not in text
    assert "&lt;script&gt;alert(1)" in text and "data:image/png;base64," in text
