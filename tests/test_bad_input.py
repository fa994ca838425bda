"""Bad input, as a user meets it: one clear line that says what, where and what to do, exit code 2, nothing written."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import yaml

from mmscale.cli import main
from mmscale.data.toy import make_toy


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Toy shards, a tokenizer, a second tokenizer of another size, and a config that trains in a second."""
    folder = tmp_path_factory.mktemp("bad_input")
    make_toy(folder / "data", samples=64, shards=2, val_samples=16)
    for name, pieces in (("tokenizer", 320), ("other", 300)):
        command("tokenizer", f"{folder}/data/train-*.tar", f"{folder}/{name}.model", "--vocab-size", str(pieces))
    config = {
        "run": {"dir": f"{folder}/run"},
        "data": {"train": f"{folder}/data/train-*.tar", "val": f"{folder}/data/val-*.tar", "workers": 0, "lanes": 2},
        "tokenizer": {"path": f"{folder}/tokenizer.model"},
        "model": {
            "vision": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "heads": 2, "pooler_queries": 4},
            "text": {"width": 16, "layers": 1, "heads": 2},
            "decoder": {"layers": 1, "heads": 2},
            "embed_dim": 16,
        },
        "train": {"samples": 16, "global_batch": 8},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code or 0


def refused(capsys, *arguments: str) -> str:
    """Runs a command that must be refused, and returns its one line."""
    capsys.readouterr()
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("mmscale ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_shards_that_cannot_be_trained_on(workspace, tmp_path, capsys):
    train = ("train", str(workspace / "run.yaml"), f"run.dir={tmp_path}/run")
    assert "none-*.tar" in refused(capsys, *train, f"data.train={workspace}/none-*.tar")

    (tmp_path / "text.tar").write_text("these are just words\n" * 200)
    assert "text.tar" in refused(capsys, *train, f"data.train={tmp_path}/text.tar")

    no_images = write_tar(tmp_path / "words.tar", {f"{i}.txt": b"a caption" for i in range(8)})
    assert "words.tar" in refused(capsys, *train, f"data.train={no_images}")

    empty = write_tar(tmp_path / "empty.tar", {})
    assert "empty.tar" in refused(capsys, *train, f"data.train={empty}")

    assert "data.train" in refused(capsys, *train, "data.train=null")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_misspelt_key_is_told_with_the_right_one(workspace, capsys):
    message = refused(capsys, "train", str(workspace / "run.yaml"), "optim.learning_rate=1e-3")
    assert "run.yaml" in message and "did you mean `optim.lr`?" in message


def test_sizes_that_do_not_fit_together(workspace, tmp_path, capsys):
    train = ("train", str(workspace / "run.yaml"), f"run.dir={tmp_path}/run")
    message = refused(capsys, *train, "train.global_batch=10", "train.micro_batch=4")
    assert "train.micro_batch" in message and "1, 2, 5, 10 would" in message
    assert "heads" in refused(capsys, *train, "model.vision.heads=3")
    assert "patch_size" in refused(capsys, *train, "model.vision.patch_size=64")
    assert "tokenizer.path" in refused(capsys, *train, "tokenizer.path=null")
    assert "none.model" in refused(capsys, *train, f"tokenizer.path={tmp_path}/none.model")
    assert "fp16" in refused(capsys, *train, "train.precision=fp16")
    assert "vison" in refused(capsys, *train, "train.freeze=[vison]")


@pytest.mark.slow
def test_a_trained_run_refuses_what_does_not_belong_to_it(workspace, tmp_path, capsys):
    config, run = str(workspace / "run.yaml"), workspace / "run"
    assert command("train", config) == 0
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["samples"]) == ("finished", 16)

    other = f"tokenizer.path={workspace}/other.model"
    assert "tokenizer" in refused(capsys, "train", config, other, "train.samples=32")
    assert "run.seed" in refused(capsys, "train", config, "run.seed=1", "train.samples=32")
    assert "model.text.width" in refused(capsys, "train", config, "model.text.width=32", "train.samples=32")

    val = f"{workspace}/data/val-*.tar"
    message = refused(capsys, "eval", str(run), "--data", val, "--tokenizer", f"{workspace}/other.model")
    assert "300" in message and "320" in message
    assert "300" in refused(
        capsys, "export", str(run), str(tmp_path / "hub"), "--tokenizer", f"{workspace}/other.model"
    )
    assert not (tmp_path / "hub").exists()

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep me")
    assert "not an empty folder" in refused(capsys, "export", str(run), str(tmp_path / "full"))
    assert "not empty" in refused(capsys, "toy", str(tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious.txt"]

    assert "nowhere" in refused(capsys, "eval", str(tmp_path / "nowhere"), "--data", val)
    assert "precious.txt" in refused(capsys, "caption", str(run), str(tmp_path / "full" / "precious.txt"))
