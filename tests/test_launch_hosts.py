"""The check before a start on several hosts, and restarts: the scripts as they are, with ssh and training stood in for.

Real hosts are in tests/multihost.sh, which needs root.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmscale.config import load_config
from mmscale.data.toy import make_toy

ROOT = Path(__file__).parents[1]

# Runs the command here, as the host that is named; `gone` is out of reach, and `old` has another version of mmscale.
SSH = """#!/usr/bin/env bash
while [ "$1" = -o ]; do shift 2; done
[ "$1" != gone ] || { echo "ssh: connect to host gone port 22: No route to host" >&2; exit 255; }
export SSH_CONNECTION="127.0.0.1 50000 127.0.0.1 22"
if [ "$1" = old ]; then exec bash -c "${2//PYTHONPATH=$ROOT/PYTHONPATH=$OLD}"; fi
exec bash -c "$2"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A folder with shards, a resolved configuration, an ssh that stays here, and an older mmscale."""
    folder = tmp_path_factory.mktemp("cluster")
    make_toy(folder / "data", samples=16, shards=2, val_samples=4)
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(SSH)
    (folder / "bin/ssh").chmod(0o755)
    (folder / "old").mkdir()
    subprocess.run(["cp", "-r", ROOT / "mmscale", folder / "old/mmscale"], check=True)
    (folder / "old/mmscale/__init__.py").write_text('__version__ = "0.0.0"\n')
    overrides = [f"run.dir={folder}/run", f"data.train={folder}/data/train-*.tar", "tokenizer.path=null"]
    config = load_config(ROOT / "configs/toy.yaml", [*overrides, f"data.val={folder}/data/val-*.tar"])
    (folder / "config.yaml").write_text(config.dump())
    return folder


def check(cluster, hosts, *arguments, config="config.yaml", port=0):
    (cluster / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    environment = os.environ | {
        "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}",
        "ROOT": str(ROOT),
        "OLD": str(cluster / "old"),
        "DS_ACCELERATOR": "cpu",
    }
    files = [cluster / "hosts", cluster / config, "--run-dir", cluster / "run", "--port", str(port)]
    command = [sys.executable, ROOT / "launch/preflight.py", *files, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.slow
def test_check_names_a_wrong_version_and_an_unreachable_host(cluster):
    done = check(cluster, ["here", "old", "gone"])
    assert done.returncode == 2, done.stderr
    table = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert table["here"].endswith("ready")
    assert "mmscale 0.0.0, here" in table["old"]
    assert "not reachable" in table["gone"] and "No route to host" in table["gone"]


@pytest.mark.slow
def test_check_names_an_unreadable_shard_and_a_port_that_is_taken(cluster):
    text = (cluster / "config.yaml").read_text()
    (cluster / "faulty.yaml").write_text(text.replace("train-*.tar", "train-{00000..00002}.tar"))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        done = check(cluster, ["here"], config="faulty.yaml", port=taken.getsockname()[1])
    assert done.returncode == 2
    assert "train-00002.tar" in done.stdout
    assert "Address already in use" in done.stdout


@pytest.mark.slow
def test_fewer_hosts_are_started_when_allowed(cluster):
    assert check(cluster, ["here", "gone"]).returncode == 1  # it may come back: worth another try
    done = check(cluster, ["gone", "here"], "--min-hosts", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (cluster / "run/launch/hosts").read_text() == "here slots=1\n"


# Stands for a launch script: each call does what the next line of `script` says, as `status samples` or `sleep`.
LAUNCHER = """
number=$(cat "$1/calls" 2>/dev/null || echo 0)
number=$((number + 1))
echo "$number" >"$1/calls"
read -r status samples <<<"$(sed -n "${number}p" "$1/script")"
echo "$1" >"$MMSCALE_RUN_DIR_FILE"
[ "$status" != sleep ] || { trap 'exit 75' TERM; touch "$1/asleep"; sleep 30 & wait; }
[ "$status" != silent ] || exit 1
printf '{"status": "%s", "samples": %s, "step": 1, "reason": "why", "time": %s}' "$status" "$samples" "$(date +%s)" \
    >"$1/status.json"
case $status in finished) exit 0 ;; refused) exit 2 ;; preempted) exit 75 ;; *) exit 1 ;; esac
"""


def supervise(folder, script, *options):
    (folder / "script").write_text(script)
    (folder / "launcher.sh").write_text(LAUNCHER)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", ROOT / "launch/supervise.sh", "--backoff", "0", *options, "--", "bash", folder / "launcher.sh"]
    return subprocess.Popen([*command, folder], env=os.environ | {"PATH": path}, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "code", "calls"),
    [
        ("failed 64\nfailed 128\nfinished 256", (), 0, 3),
        ("failed 64\nfailed 64\nfinished 256", (), 1, 2),  # the same error at the same position
        ("silent\nsilent\nfinished 256", (), 0, 3),  # never got to start: says nothing about the next time
        ("silent\nsilent\nsilent\nfinished 256", ("--retries", "2"), 1, 3),
        ("refused 0\nfinished 256", (), 2, 1),
        ("preempted 64\nfinished 256", (), 75, 1),
    ],
)
def test_restarts(tmp_path, script, options, code, calls):
    process = supervise(tmp_path, script, *options)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert int((tmp_path / "calls").read_text()) == calls


@pytest.mark.slow
def test_a_signal_reaches_the_launch_script_and_ends_the_supervision(tmp_path):
    process = supervise(tmp_path, "sleep 0\nfinished 256")
    deadline = time.monotonic() + 20
    while not (tmp_path / "asleep").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert (tmp_path / "calls").read_text() == "1\n"


@pytest.mark.slow
def test_bad_input_ends_a_launch_script_with_2_and_one_line(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", ROOT / "launch/local.sh", ROOT / "configs/toy.yaml", f"run.dir={tmp_path}", "optim.learning_rate=1"],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "did you mean `optim.lr`" in done.stderr
    assert not list(tmp_path.iterdir())
