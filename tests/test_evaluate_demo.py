"""The demo's page and what it asks for, over HTTP and in a browser where there is one."""

import base64
import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request

import pytest
from checkpoints import write_checkpoint
from small_split import NUM_SAMPLES, write_shard

from mmscale.errors import UserError
from mmscale.evaluate.demo import Demo, start_demo
from mmscale.evaluate.pictures import read_pictures
from mmscale.evaluate.search import open_index
from mmscale.pretrained import load_pretrained

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_checkpoint(folder / "run")
    write_shard(folder / "val.tar")
    pretrained = load_pretrained(folder / "run", device="cpu")
    return Demo(pretrained, open_index(pretrained, [str(folder / "val.tar")], folder / "index"))


@pytest.fixture(scope="module")
def address(demo):
    with start_demo(demo, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def post(url, content, **headers):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_picture_is_described_captioned_classified_and_found_again(demo, address):
    place = 3
    entry = demo.pictures.entries[place]
    _, by_place = post(f"{address}/api/describe", {"place": place, "names": ["circle", "square", " circle "]})
    picture = next(p for p in read_pictures([entry.source], demo.pretrained) if p.place == entry.place)
    assert by_place["nearest"][0]["name"] == picture.name
    assert by_place["nearest"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert by_place["captions"]
    assert {c["name"] for c in by_place["classes"]} == {"circle", "square"}
    assert sum(c["share"] for c in by_place["classes"]) == pytest.approx(1)
    # The picture that the page was shown, given back as an upload, is the same picture.
    upload = by_place["image"].partition(",")[2]
    status, by_upload = post(f"{address}/api/describe", {"image": upload})
    assert status == 200 and by_upload["nearest"][0]["name"] == picture.name


def test_a_text_finds_pictures(address):
    status, found = post(f"{address}/api/search", {"text": "a red circle"})
    assert status == 200 and len(found["nearest"]) == 12
    assert found["nearest"][0]["similarity"] >= found["nearest"][-1]["similarity"]


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("describe", {"image": base64.b64encode(b"not a picture").decode()}, 400),
        ("describe", {"image": "???"}, 400),
        ("describe", {"place": 10**6}, 400),
        ("describe", {"place": 0, "names": "circle"}, 400),
        ("search", {"text": " "}, 400),
        ("search", b"{", 400),
        ("search", [], 400),
        ("delete", {}, 404),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_reason(address, path, content, status):
    found, answer = post(f"{address}/api/{path}", content)
    assert found == status and answer["error"]


def test_other_sites_cannot_use_the_model(address):
    assert post(f"{address}/api/search", {"text": "a"}, **{"Content-Type": "text/plain"})[0] == 415
    assert post(f"{address}/api/search", {"text": "a"}, Host="evil.example")[0] == 403


def test_a_port_that_is_taken_is_refused(demo, address):
    with pytest.raises(UserError, match="choose another --port"):
        start_demo(demo, "127.0.0.1", int(address.rpartition(":")[2]))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_a_browser_shows_captions_classes_and_pictures(address, tmp_path):
    def shown(query):
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
        command += ["--virtual-time-budget=20000", "--dump-dom", f"{address}/{query}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    described = shown("?place=3")
    assert len(re.findall(r'<div class="bar">', described)) == 4
    assert re.search(r'<ul id="captions"><li>', described)
    assert len(re.findall(r'<button title="describe this picture">', described)) == 12
    assert f"{NUM_SAMPLES - 1} pictures to search" in described
    assert re.search(r'id="error" role="alert"></div>', described)
    assert len(re.findall(r'<button title="describe this picture">', shown("?text=red%20circle"))) == 12
