"""Remote shards: servers that misbehave, a cache that many share, downloads that are killed."""

import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from hashlib import md5

import pytest
from hub_server import HubServer
from shard_files import write_shards
from test_data_loader import consume

from mmscale.config import DataConfig
from mmscale.data import remote
from mmscale.data.cache import ShardCache
from mmscale.errors import UserError

PAYLOAD = bytes(range(256)) * 4096  # 1 MiB


class Server:
    """Serves `files`; `faults` are names of what goes wrong, one for each request, then nothing."""

    def __init__(self):
        self.files: dict[str, bytes] = {"/a.tar": PAYLOAD}
        self.faults: list[str] = []
        self.requests: list[tuple[str, str | None]] = []
        self.with_etag = True
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                server.answer(self)

        self._httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._httpd.server_port}"
        threading.Thread(target=self._httpd.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request):
        wanted = request.headers.get("Range")
        self.requests.append((request.path, wanted))
        fault = self.faults.pop(0) if self.faults else ""
        request.close_connection = True
        data = self.files.get(request.path)
        if fault.isdigit() or data is None:
            request.send_response(int(fault) if fault else 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        tag = f'"{md5(data).hexdigest()}"'
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        if fault == "no range" or request.headers.get("If-Range") != tag:
            start = 0
        if start >= len(data):
            request.send_response(416)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        body = data[start:]
        request.send_header("Content-Length", str(len(body)))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if self.with_etag:
            request.send_header("ETag", tag)
        if fault == "wrong checksum":
            request.send_header("Content-MD5", b64encode(md5(b"other").digest()).decode())
        request.end_headers()
        if fault == "drop":
            body = body[: len(body) // 2]
        for at in range(0, len(body), 1 << 16):
            request.wfile.write(body[at : at + (1 << 16)])
            if fault == "slow":
                time.sleep(0.05)
            if fault == "stall" and at > len(body) // 3:
                time.sleep(1.5)
                return

    def close(self):
        self._httpd.shutdown()
        self._httpd.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "STALL_S", 0.4)
    server = Server()
    yield server
    server.close()


def cache(tmp_path, max_bytes=1 << 30):
    return ShardCache(str(tmp_path / "cache"), max_bytes, tries=5, first_wait_s=0.01)


def content(path):
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["drop"],
        ["drop", "drop", "drop"],
        ["503", "429", "500"],
        ["stall"],
        ["wrong checksum"],
        ["drop", "no range"],
    ],
)
def test_a_misbehaving_server_costs_tries_and_nothing_else(server, tmp_path, faults):
    server.faults = list(faults)
    assert content(cache(tmp_path).fetch(f"{server.url}/a.tar")) == PAYLOAD
    assert len(server.requests) == len([fault for fault in faults if fault != "no range"]) + 1
    if faults == ["drop"]:
        assert server.requests[1][1] == f"bytes={len(PAYLOAD) // 2}-"
    assert os.listdir(tmp_path / "cache" / "parts") == []


def test_what_is_not_there_fails_at_once_and_a_dead_server_after_some_tries(server, tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.tar cannot be fetched: the server answered 404"):
        cache(tmp_path).fetch(f"{server.url}/nowhere.tar")
    assert len(server.requests) == 1
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="cannot be fetched: no answer"):
            cache(tmp_path).fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar")


@pytest.mark.parametrize("with_etag", [True, False])
def test_a_file_that_changes_during_the_download_is_never_mixed(server, tmp_path, with_etag):
    server.with_etag = with_etag
    server.faults = ["drop", "drop", "drop", "drop", "drop"]
    with pytest.raises(OSError, match="cannot be fetched"):
        cache(tmp_path).fetch(f"{server.url}/a.tar")
    server.files["/a.tar"] = PAYLOAD[::-1]
    assert content(cache(tmp_path).fetch(f"{server.url}/a.tar")) == PAYLOAD[::-1]


def test_many_ranks_fetch_a_shard_once(server, tmp_path):
    server.faults = ["slow"]
    caches = [cache(tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda each: each.fetch(f"{server.url}/a.tar"), caches))
    assert len(paths) == 1 and len(server.requests) == 1


def test_the_least_recently_used_leave_a_full_cache(server, tmp_path):
    for number in range(4):
        server.files[f"/{number}.tar"] = bytes([number]) * 100_000
    full = cache(tmp_path, max_bytes=300_000)
    paths = []
    for number in (0, 1, 2, 0, 3):
        paths.append(full.fetch(f"{server.url}/{number}.tar"))
        time.sleep(0.02)
    assert [os.path.exists(path) for path in paths[:3]] == [True, False, True]
    assert content(full.fetch(f"{server.url}/1.tar")) == server.files["/1.tar"]


@pytest.mark.slow
def test_a_download_that_is_killed_is_completed_by_the_next_call(server, tmp_path):
    server.faults = ["slow"]
    script = (
        "import sys; from mmscale.data.cache import ShardCache; ShardCache(sys.argv[1], 1 << 30).fetch(sys.argv[2])"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "cache"), f"{server.url}/a.tar"])
    part = tmp_path / "cache" / "parts"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if part.exists() and any(0 < file.stat().st_size < len(PAYLOAD) for file in part.glob("*.part")):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.listdir(tmp_path / "cache" / "objects") == []
    assert content(cache(tmp_path).fetch(f"{server.url}/a.tar")) == PAYLOAD
    assert server.requests[-1][1] is not None, "the download did not go on where it ended"


def remote_config(server, folder, counts, **options):
    paths = write_shards(folder, counts)
    for number, path in enumerate(paths):
        server.files[f"/{number:05d}.tar"] = content(path)
    urls = f"{server.url}/{{00000..{len(counts) - 1:05d}}}.tar"
    return paths, DataConfig(train=urls, lanes=4, block=8, cache_dir=str(folder / "cache"), **options)


def test_a_remote_stream_gives_what_the_local_one_gives(server, tmp_path):
    paths, config = remote_config(server, tmp_path, [5, 7, 9])
    found = consume(config, 0, 4, 1, 2)
    expected = consume(paths, 0, 4, 1, 0)
    assert {p: row[1:] for p, row in found.items()} == {p: row[1:] for p, row in expected.items()}
    assert len(server.requests) == 3
    assert consume(config, 24, 2, 2, 1, 3) == {p: row for p, row in found.items() if p >= 24}
    assert len(server.requests) == 3


def test_with_a_manifest_shards_are_fetched_as_they_are_entered(server, tmp_path):
    paths, config = remote_config(server, tmp_path, [20] * 6)
    manifest = tmp_path / "counts.json"
    manifest.write_text(str([{"url": f"x/{n:05d}.tar", "count": 20} for n in range(6)]).replace("'", '"'))
    config = config.model_copy(update={"counts": str(manifest), "lanes": 1, "block": 4})
    local = DataConfig(train=paths, lanes=1, block=4)
    found = consume(config, 0, 1, 1, 0)
    assert {row[1] for row in found.values()} == {row[1] for row in consume(local, 0, 1, 1, 0).values()}
    assert 1 <= len(server.requests) < 6


def test_a_shortfall_against_the_manifest_is_masked_and_said(tmp_path, caplog):
    write_shards(tmp_path, [4, 6])
    for number, successes in enumerate((6, 6)):
        (tmp_path / f"train-{number:05d}_stats.json").write_text(f'{{"successes": {successes}}}')
    config = DataConfig(train=f"{tmp_path}/*.tar", lanes=2, block=4, counts="stats")
    keys = [row[0] for row in consume(config, 0, 1, 1, 0).values()]
    assert sorted(keys)[:2] == ["train-00000/000000", "train-00000/000001"] and keys.count("train-00000/?") == 2
    assert "holds 4 samples, not 6 as counted: the rest is masked" in caplog.text


def test_counts_that_say_nothing_of_a_shard_are_refused(tmp_path):
    paths = write_shards(tmp_path, [4])
    (tmp_path / "counts.jsonl").write_text('{"url": "other.tar", "count": 3}\n')
    with pytest.raises(UserError, match="says nothing about the shard"):
        consume(DataConfig(train=paths, counts=str(tmp_path / "counts.jsonl")), 0, 1, 1, 0)
    others = write_shards(tmp_path / "more", [4])
    (tmp_path / "counts.jsonl").write_text(f'{{"url": "{others[0]}", "count": 3}}\n')
    with pytest.raises(UserError, match="several shards are called train-00000"):
        consume(DataConfig(train=paths + others, counts=str(tmp_path / "counts.jsonl")), 0, 1, 1, 0)
    (tmp_path / "counts.jsonl").write_text("hello")
    with pytest.raises(UserError, match="is no manifest"):
        consume(DataConfig(train=paths, counts=str(tmp_path / "counts.jsonl")), 0, 1, 1, 0)


def test_remote_shards_need_a_cache_that_is_large_enough(server, tmp_path):
    _, config = remote_config(server, tmp_path, [5, 7])
    with pytest.raises(UserError, match=r"is remote: set data\.cache_dir"):
        consume(config.model_copy(update={"cache_dir": None}), 0, 1, 1, 0)
    with pytest.raises(UserError, match=r"data\.cache_gib: 1e-06 GiB cannot hold .* GiB are needed"):
        consume(config.model_copy(update={"cache_gib": 1e-6}), 0, 1, 1, 0)


def test_shards_are_read_from_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import HfFileSystem, constants

    paths = write_shards(tmp_path, [5, 6])
    with HubServer() as hub:
        for name in ("HUGGINGFACE_CO_URL_TEMPLATE", "ENDPOINT"):
            monkeypatch.setattr(constants, name, getattr(constants, name).replace(constants.ENDPOINT, hub.url))
        HfFileSystem.clear_instance_cache()
        hub.files |= {("me/data", f"shards/{number}.tar"): content(path) for number, path in enumerate(paths)}
        config = DataConfig(
            train="hf://datasets/me/data/shards/{0..1}.tar", lanes=4, block=8, cache_dir=str(tmp_path / "cache")
        )
        found = consume(config, 0, 2, 1, 2)
        expected = consume(paths, 0, 2, 1, 0)
        assert {p: row[1:] for p, row in found.items()} == {p: row[1:] for p, row in expected.items()}
        assert len(hub.requests) == 2  # each shard once
        with pytest.raises(UserError, match=r"nowhere\.tar"):
            consume(config.model_copy(update={"train": "hf://datasets/me/data/nowhere.tar"}), 0, 1, 1, 0)
        hub.files["me/data", "more/a.tar"] = b"changed on the way"
        hub.digests["me/data", "more/a.tar"] = "0" * 64
        with pytest.raises(OSError, match="checksum"):
            cache(tmp_path / "more").fetch("hf://datasets/me/data/more/a.tar")
    HfFileSystem.clear_instance_cache()


@pytest.mark.slow
def test_shards_are_read_from_s3(tmp_path, monkeypatch):
    boto3 = pytest.importorskip("boto3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in [
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ]:
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        client = boto3.client("s3")
        deadline = time.monotonic() + 300
        while True:
            try:
                client.create_bucket(Bucket="data")
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        paths = write_shards(tmp_path, [5, 6])
        for number, path in enumerate(paths):
            client.upload_file(path, "data", f"{number}.tar")
        config = DataConfig(train="s3://data/{0..1}.tar", lanes=4, block=8, cache_dir=str(tmp_path / "cache"))
        found = consume(config, 0, 2, 1, 2)
        expected = consume(paths, 0, 2, 1, 0)
        assert {p: row[1:] for p, row in found.items()} == {p: row[1:] for p, row in expected.items()}
        with pytest.raises(UserError, match=r"nowhere\.tar"):
            consume(config.model_copy(update={"train": "s3://data/nowhere.tar"}), 0, 1, 1, 0)
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_indexes_are_made_by_several_processes(tmp_path):
    paths = write_shards(tmp_path / "shards", [3, 4, 5])
    script = (
        "import sys; from mmscale.data import indexing; indexing.WORTH_PROCESSES = 0; "
        "indexing.index_shards(sys.argv[2:], index_dir=sys.argv[1], processes=2)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "index"), *paths]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "3 shards, 12 samples" in ended.stdout, ended.stderr
    assert len(list((tmp_path / "index").rglob("*.index"))) == 3
