"""`mmscale pack`: every kind of source, broken rows, interruptions."""

import csv
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from PIL import Image
from shard_files import caption, picture

from mmscale.config import DataConfig
from mmscale.data.pack import pack
from mmscale.data.shards import Shards
from mmscale.errors import UserError


def packed(folder):
    """[(key, image, caption, record)] of everything in a folder of shards."""
    shards = Shards(sorted(str(path) for path in folder.glob("*.tar")), DataConfig(index_dir=str(folder / "index")))
    raws = [
        shards.read(shard, number, with_record=True)
        for shard, count in enumerate(shards.counts)
        for number in range(count)
    ]
    return [(raw.key, raw.image, raw.captions[0][0], raw.record) for raw in raws]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def pictures(folder, num=7):
    folder.mkdir(parents=True)
    for number in range(num):
        (folder / f"{number}.jpg").write_bytes(picture(number))
        (folder / f"{number}.txt").write_text(caption(number))
    return folder


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Most tests need no pool of processes; what is packed is the same."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("mmscale.data.pack.ProcessPoolExecutor", lambda count, _: ThreadPoolExecutor(count))


def test_a_folder_with_sidecars_becomes_shards(tmp_path):
    source = pictures(tmp_path / "pictures")
    (source / "3.txt").unlink()
    (source / "3.json").write_text('{"caption": "from json", "license": "CC0"}')
    pack(str(source), str(tmp_path / "out"), shard_size=3)
    rows = packed(tmp_path / "out")
    assert [row[0] for row in rows] == [f"{number:09d}" for number in range(7)]
    assert [row[1] for row in rows] == [picture(number) for number in range(7)]
    assert rows[3][2:] == ("from json", {"caption": "from json", "license": "CC0"})
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [f"{n:05d}.tar" for n in range(3)]
    assert json.loads((tmp_path / "out" / "00002_stats.json").read_text())["successes"] == 1


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_paths_become_shards(tmp_path, kind):
    pictures(tmp_path / "pictures")
    rows = [{"file": f"pictures/{n}.jpg", "words": f'{caption(n)}, "quoted"', "id": n} for n in range(7)]
    table = tmp_path / f"table.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    elif kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    pack(str(table), str(tmp_path / "out"), image="file", text="words")
    found = packed(tmp_path / "out")
    assert [(row[1], row[2]) for row in found] == [(picture(n), rows[n]["words"]) for n in range(7)]
    assert str(found[4][3]["id"]) == "4"


def test_broken_rows_are_listed_and_left_out(tmp_path, capsys):
    source = pictures(tmp_path / "pictures")
    (source / "1.jpg").write_bytes(b"no image")
    (source / "2.txt").unlink()
    (source / "4.jpg").write_bytes(picture(4)[:300])
    pack(str(source), str(tmp_path / "out"))
    assert [row[0] for row in packed(tmp_path / "out")] == [f"{number:09d}" for number in (0, 3, 5, 6)]
    broken = json.loads((tmp_path / "out" / "00000_stats.json").read_text())["broken"]
    assert [entry["row"] for entry in broken] == [1, 2, 4]
    assert "1 shards, 4 samples, 3 broken rows left out" in capsys.readouterr().out


def test_large_pictures_are_made_smaller_and_odd_formats_recoded(tmp_path):
    source = tmp_path / "pictures"
    source.mkdir()
    big = Image.fromarray(np.zeros((300, 600, 3), dtype=np.uint8))
    for name in ("a.png", "b.bmp", "c.gif"):
        big.save(source / name)
        (source / name).with_suffix(".txt").write_text("black")
    pack(str(source), str(tmp_path / "small"), longest_side=100)
    assert {Image.open(io.BytesIO(row[1])).size for row in packed(tmp_path / "small")} == {(100, 50)}
    pack(str(source), str(tmp_path / "same"))
    assert [Image.open(io.BytesIO(row[1])).format for row in packed(tmp_path / "same")] == ["PNG"] * 3


def test_pictures_are_fetched_from_urls(tmp_path):
    folder = pictures(tmp_path / "pictures", 5)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    rows = [{"image": f"http://127.0.0.1:{server.server_port}/{n}.jpg", "text": caption(n)} for n in range(6)]
    (tmp_path / "urls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(str(tmp_path / "urls.jsonl"), str(tmp_path / "out"))
    server.shutdown()
    assert [row[1] for row in packed(tmp_path / "out")] == [picture(n) for n in range(5)]
    (broken,) = json.loads((tmp_path / "out" / "00000_stats.json").read_text())["broken"]
    assert "404" in broken["reason"]


@pytest.mark.slow
def test_a_pack_that_is_killed_is_completed_byte_for_byte(tmp_path):
    source = pictures(tmp_path / "pictures", 60)
    pack(str(source), str(tmp_path / "whole"), shard_size=4)
    out = tmp_path / "out"
    script = (
        "import sys, time\nfrom mmscale.data import images, pack\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "pack.ProcessPoolExecutor = lambda count, _: ThreadPoolExecutor(count)\n"
        "decode = images.decode\n"
        "images.decode = lambda *a: (time.sleep(0.02), decode(*a))[1]\n"
        "pack.pack(sys.argv[1], sys.argv[2], shard_size=4, processes=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(source), str(out)])
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (out / "00003.tar").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "00014.tar").exists()
    before = {name: os.stat(out / name).st_mtime_ns for name in files(out) if name.endswith(".tar") and name[0] != "."}
    pack(str(source), str(out), shard_size=4)
    assert files(out) == files(tmp_path / "whole")
    assert {name: os.stat(out / name).st_mtime_ns for name in before} == before


@pytest.mark.slow
def test_a_pack_by_processes_is_the_same(tmp_path):
    source = pictures(tmp_path / "pictures", 9)
    pack(str(source), str(tmp_path / "here"), shard_size=4)
    script = "import sys; from mmscale.data.pack import pack; pack(sys.argv[1], sys.argv[2], shard_size=4, processes=2)"
    subprocess.run([sys.executable, "-c", script, str(source), str(tmp_path / "there")], check=True, timeout=600)
    assert files(tmp_path / "here") == files(tmp_path / "there")


def test_bad_sources_and_folders_are_refused(tmp_path):
    source, out = str(pictures(tmp_path / "pictures", 2)), str(tmp_path / "out")
    with pytest.raises(UserError, match="no such folder or table"):
        pack(str(tmp_path / "nowhere"), out)
    (tmp_path / "table.csv").write_text("path,caption\n")
    with pytest.raises(UserError, match=r"no column `image` \(--image\); columns: path, caption"):
        pack(str(tmp_path / "table.csv"), str(tmp_path / "out1"))
    with pytest.raises(UserError, match="is not empty"):
        pack(source, source)
    pack(source, out)
    with pytest.raises(UserError, match="with other options"):
        pack(source, out, shard_size=7)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        pack(str(tmp_path / "empty"), str(tmp_path / "out2"))
