"""Uploading to a stand-in of the Hub: private, whole, going on after a break, and nothing on a dry run."""

import pytest
from checkpoints import write_checkpoint
from hub_server import HubServer
from huggingface_hub import constants

from mmscale.errors import UserError
from mmscale.export import hub
from mmscale.export.push import push_folder


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    write_checkpoint(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "verify_export", lambda folder, model, tokenizer: {})
        return hub.export_hub(folder / "run", folder / "hub", shard_bytes=200_000)


@pytest.fixture(autouse=True)
def plain_uploads(monkeypatch):
    """The stand-in speaks git-lfs, not the Hub's own chunk store."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def push(server, folder, **options):
    lines = []
    push_folder(folder, "me/model", endpoint=server.url, token="hf_secret", say=lines.append, **options)
    return lines


def test_every_file_arrives_in_a_private_repository(export):
    with HubServer() as server:
        lines = push(server, export)
    made = server.repos["me/model"]
    assert made.get("visibility") == "private" or made.get("private") is True  # as older and newer clients say it
    assert server.tokens == {"Bearer hf_secret"}
    assert server.files == {("me/model", path.name): path.read_bytes() for path in export.iterdir()}
    assert "uploaded" in lines[-1] and not any("hf_secret" in line for line in lines)


def test_a_dry_run_says_what_would_go_and_asks_nobody(export):
    with HubServer() as server:
        lines = push(server, export, dry_run=True)
    assert not server.repos and not server.tokens
    for path in export.iterdir():
        assert any(line.split() == [f"{path.stat().st_size:,}", path.name] for line in lines)
    assert "private" in lines[-1] and "nothing was sent" in lines[-1]


def test_a_broken_upload_shows_nothing_and_goes_on_where_it_stopped(export):
    with HubServer(broken_after=1) as server:
        with pytest.raises(UserError, match=r"the upload to .* failed: .*goes on where it stopped"):
            push(server, export)
        assert server.files == {}
        server.broken_after = None
        push(server, export)
    assert len(server.uploads) == len(set(server.uploads)) > 2  # nothing was sent twice
    assert server.files == {("me/model", path.name): path.read_bytes() for path in export.iterdir()}


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/mo del", "me/--"])
def test_a_name_that_the_hub_does_not_allow_is_refused(export, name):
    with pytest.raises(UserError, match="--push: `"):
        push_folder(export, name, dry_run=True)


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    with pytest.raises(UserError, match="not a folder made by `mmscale export`"):
        push_folder(tmp_path, "me/model")
