"""A checkpoint is whole or is not there, and a damaged one is named and passed over."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmscale.checkpoint import (
    Checkpoint,
    Fragment,
    commit,
    committed,
    find_checkpoint,
    find_damage,
    folder_name,
    remove_old,
    write_fragments,
    write_whole,
)
from mmscale.errors import UserError

WEIGHT = torch.arange(12.0).reshape(3, 4)


def write(run, step, nonce="n", samples=None, ranks=2):
    """A checkpoint of one 3 x 4 tensor in two fragments, and a scalar that rank 0 holds."""
    folder = run / "checkpoints" / folder_name(step)
    cuts = [0, 5, 12] if ranks == 2 else [0, 12]
    for rank in range(ranks):
        start, stop = cuts[rank : rank + 2]
        fragments = [Fragment("param", "a.weight", (3, 4), start, stop, WEIGHT.flatten()[start:stop] + step)]
        if rank == 0:
            fragments.append(Fragment("step", "a.weight", (), 0, 1, torch.tensor([step])))
        write_fragments(folder, rank, fragments, nonce)
    facts = {"step": step, "samples": samples or 8 * step, "config": {"run": {"seed": 3}}}
    assert commit(folder, ranks, nonce, facts)
    return folder


def test_fragments_come_back_as_the_tensor_they_are_of(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path, 7))
    assert checkpoint.names() == ["a.weight"]
    assert torch.equal(checkpoint.read("a.weight"), WEIGHT + 7)
    assert torch.equal(checkpoint.read("a.weight", "param", 3, 9), WEIGHT.flatten()[3:9] + 7)
    assert checkpoint.read("a.weight", "param", 4, 4).numel() == 0
    assert checkpoint.read("a.weight", "step").item() == 7
    assert checkpoint.step == 7
    assert checkpoint.config == {"run": {"seed": 3}}
    with pytest.raises(UserError, match="holds no param `b`"):
        checkpoint.read("b")


def test_files_are_plain_safetensors(tmp_path):
    folder = write(tmp_path, 1)
    assert torch.equal(load_file(folder / "rank_00000.safetensors")["param/a.weight"], WEIGHT.flatten()[:5] + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_every_type_survives(tmp_path, dtype):
    data = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    write_fragments(tmp_path / "step_00000001", 0, [Fragment("buffer", "x", (5,), 0, 5, data)], "n")
    commit(tmp_path / "step_00000001", 1, "n", {"step": 1, "samples": 1})
    read = Checkpoint.open(tmp_path).read("x", "buffer")
    assert read.dtype == dtype
    assert torch.equal(read, data)


def test_the_newest_whole_one_is_found_from_the_run_its_folder_or_itself(tmp_path):
    write(tmp_path, 1)
    second = write(tmp_path, 2)
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == second.name
    for path in (tmp_path, tmp_path / "checkpoints", second):
        assert find_checkpoint(path) == second


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-4]), "rank_00001.safetensors has .* bytes instead of"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"), "rank_00001.safetensors: its checksum is wrong"),
        (lambda file: file.unlink(), "rank_00001.safetensors: No such file"),
        (lambda file: (file.parent / "manifest.json").write_text('{"format": 1'), "manifest.json cannot be read"),
        (lambda file: (file.parent / "manifest.json").write_text('{"format": 9, "files": {}}'), "newer version"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path, damage, message):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    damage(second / "rank_00001.safetensors")
    warnings = []
    assert find_checkpoint(tmp_path, warn=warnings.append) == first
    assert len(warnings) == 1
    assert str(second) in warnings[0]
    with pytest.raises(UserError, match=message):
        find_checkpoint(second)


def test_every_file_is_summed_by_one_of_the_ranks(tmp_path):
    folder = write(tmp_path, 1)
    file = folder / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    found = [find_damage(folder, share=(rank, 3)) for rank in range(3)]
    assert sum(damage is not None for damage in found) == 1


def test_without_a_manifest_there_is_no_checkpoint(tmp_path):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    (second / "manifest.json").unlink()
    assert find_checkpoint(tmp_path) == first
    with pytest.raises(UserError, match="unfinished checkpoint"):
        find_checkpoint(second)
    (first / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoint(tmp_path / "elsewhere")


def test_the_commit_waits_for_every_rank_of_this_attempt(tmp_path):
    folder = tmp_path / "checkpoints" / folder_name(3)
    fragments = (
        [Fragment("param", "w", (4,), 0, 2, torch.zeros(2))],
        [Fragment("param", "w", (4,), 2, 4, torch.ones(2))],
    )
    write_fragments(folder, 1, fragments[1], "an earlier attempt")
    write_fragments(folder, 0, fragments[0], "now")
    with pytest.raises(TimeoutError, match="rank 1 has not written its part"):
        commit(folder, 2, "now", {"step": 3, "samples": 24}, timeout_s=0.1)
    assert not commit(folder, 2, "now", {"step": 3, "samples": 24}, abandoned=lambda: True, timeout_s=1)
    assert committed(folder.parent) == []
    threading.Thread(target=lambda: (time.sleep(0.1), write_fragments(folder, 1, fragments[1], "now"))).start()
    assert commit(folder, 2, "now", {"step": 3, "samples": 24}, timeout_s=10)
    assert committed(folder.parent) == [folder]


def test_latest_is_replaced_once_the_checkpoint_is_committed(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full_disk(path, content, **options):
        if path.name == "manifest.json":
            raise OSError("no room")
        write_whole(path, content, **options)

    monkeypatch.setattr("mmscale.checkpoint.write_whole", full_disk)
    with pytest.raises(OSError, match="no room"):
        write(tmp_path, 2)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000001\n"


def test_a_tensor_with_a_hole_is_never_committed(tmp_path):
    folder = tmp_path / folder_name(1)
    write_fragments(folder, 0, [Fragment("param", "w", (4,), 0, 3, torch.zeros(3))], "n")
    with pytest.raises(AssertionError, match="elements from 3 on are missing"):
        commit(folder, 1, "n", {"step": 1, "samples": 8})
    assert committed(tmp_path) == []


def test_old_ones_go_but_marks_and_the_newest_stay(tmp_path):
    for step in range(1, 8):
        write(tmp_path, step, samples=100 * step)
    leftover = tmp_path / "checkpoints" / folder_name(2)
    (leftover / "manifest.json").unlink()
    removed = remove_old(tmp_path / "checkpoints", keep_last=2, keep_every=400)
    assert leftover in removed
    assert [folder.name for folder in committed(tmp_path / "checkpoints")] == [folder_name(step) for step in (4, 6, 7)]
    assert not leftover.exists()
    remove_old(tmp_path / "checkpoints", keep_last=1)
    assert [folder.name for folder in committed(tmp_path / "checkpoints")] == [folder_name(7)]


def test_one_that_goes_first_stops_being_a_checkpoint_and_a_save_under_way_stays(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)
    under_way = tmp_path / "checkpoints" / folder_name(3)
    write_fragments(under_way, 0, [], "n")
    monkeypatch.setattr("shutil.rmtree", lambda folder, **options: None)  # as if killed just before
    remove_old(tmp_path / "checkpoints", keep_last=1)
    assert [folder.name for folder in committed(tmp_path / "checkpoints")] == [folder_name(2)]
    monkeypatch.undo()
    remove_old(tmp_path / "checkpoints", keep_last=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == [folder_name(2), folder_name(3)]


def test_a_checkpoint_holds_the_tokenizer(tmp_path):
    (tmp_path / "some.model").write_bytes(b"pieces")
    folder = tmp_path / folder_name(1)
    write_fragments(folder, 0, [], "n")
    commit(folder, 1, "n", {"step": 1, "samples": 8}, tokenizer=tmp_path / "some.model")
    assert Checkpoint.open(folder).tokenizer_path.read_bytes() == b"pieces"
    (folder / "tokenizer.model").write_bytes(b"others")
    assert "checksum" in find_damage(folder)


WRITER = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from mmscale.checkpoint import Fragment, commit, folder_name, write_fragments
step = 0
while True:
    step += 1
    folder = Path(sys.argv[1]) / "checkpoints" / folder_name(step)
    data = torch.full((100_000,), float(step))
    write_fragments(folder, 0, [Fragment("param", "w", (100_000,), 0, 100_000, data)], "n")
    commit(folder, 1, "n", {"step": step, "samples": step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_the_last_commit_readable(tmp_path):
    root = Path(__file__).parents[1]
    for attempt in range(3):
        run = tmp_path / str(attempt)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(run), str(root)], stdout=subprocess.PIPE, text=True
        )
        seen = [int(writer.stdout.readline()) for _ in range(3)]
        time.sleep(0.013 * attempt)
        writer.kill()
        seen += [int(line) for line in writer.stdout.read().splitlines()]
        checkpoint = Checkpoint.open(run)
        assert checkpoint.step in (seen[-1], seen[-1] + 1)
        assert (checkpoint.read("w") == checkpoint.step).all()
        latest = (run / "checkpoints" / "latest").read_text().strip()
        assert json.loads((run / "checkpoints" / latest / "manifest.json").read_text())["step"] >= seen[-1]
