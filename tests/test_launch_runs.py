"""Real runs of the launch scripts, small: several machines that this one plays over its loopback, and a signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import free_port

from mmscale.config import DataConfig
from mmscale.data.samples import iter_captions
from mmscale.data.tokenizer import train_tokenizer
from mmscale.data.toy import make_toy

ROOT = Path(__file__).parents[1]
SMALL = [
    "model.vision.layers=1",
    "model.text.layers=1",
    "model.decoder.layers=1",
    "log.every=1",
    "train.global_batch=8",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_toy(folder / "shards", samples=64, shards=2, val_samples=8)
    captions = iter_captions(f"{folder}/shards/train-*.tar", DataConfig())
    train_tokenizer(captions, str(folder / "tokenizer.model"), 320)
    return [
        f"data.train={folder}/shards/train-*.tar",
        f"data.val={folder}/shards/val-*.tar",
        f"tokenizer.path={folder}/tokenizer.model",
        *SMALL,
    ]


def start(script, run_dir, settings, **variables):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_PORT": str(free_port())} | variables
    command = ["bash", ROOT / "launch" / script, "configs/toy.yaml", f"run.dir={run_dir}", *settings]
    with open(f"{run_dir}-{variables.get('NODE_RANK', 0)}.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_machines_without_ssh_train_alike_with_both_launchers(tmp_path, data):
    found = {}
    for launcher in ("deepspeed", "torchrun"):
        run_dir = tmp_path / launcher
        shared = {"NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LAUNCHER": launcher}
        settings = [*data, "train.samples=80"]
        nodes = [start("no_ssh.sh", run_dir, settings, NODE_RANK=str(rank), **shared) for rank in (0, 1)]
        assert [node.wait(timeout=120) for node in nodes] == [0, 0], Path(f"{run_dir}-0.log").read_text()
        found[launcher] = losses(run_dir)
    assert len(found["deepspeed"]) == 10
    assert found["deepspeed"] == found["torchrun"]


@pytest.mark.slow
def test_a_signal_to_the_script_saves_and_the_same_command_goes_on(tmp_path, data):
    run_dir = tmp_path / "run"
    process = start("local.sh", run_dir, [*data, "train.samples=100000"], NPROC="1")
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75, Path(f"{run_dir}-0.log").read_text()
    saved = json.loads((run_dir / "status.json").read_text())
    assert saved["status"] == "preempted" and saved["samples"] > 0
    # The schedule ends where it is now: one more step, from the checkpoint.
    end = saved["samples"] + 8
    process = start("local.sh", run_dir, [*data, f"train.samples={end}"], NPROC="1")
    assert process.wait(timeout=120) == 0, Path(f"{run_dir}-0.log").read_text()
    assert json.loads((run_dir / "status.json").read_text())["samples"] == end
    assert len(losses(run_dir)) == end // 8
