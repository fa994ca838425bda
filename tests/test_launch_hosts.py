"""The check before a start on several hosts, and restarts: the scripts as they are, with ssh and training stood in for.

Real hosts are in tests/multihost.sh, which needs root.
"""

import os
import re
import shutil
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

# Runs the command here, as the host that is named: `gone` is out of reach, `locked` lets nobody in, `bare` has no such
# Python, `old` has other versions and a clock that is late, and `apart` a folder of its own where the others share one.
SSH = """#!/usr/bin/env bash
while [ "$1" = -o ]; do shift 2; done
export SSH_CONNECTION="127.0.0.1 50000 127.0.0.1 22"
case $1 in
    gone) echo "ssh: connect to host gone port 22: No route to host" >&2; exit 255 ;;
    locked) echo "root@locked: Permission denied (publickey)." >&2; exit 255 ;;
    bare) echo "bash: line 1: python: No such file or directory" >&2; exit 127 ;;
    old) exec bash -c "${2//PYTHONPATH=$ROOT/PYTHONPATH=$OLD}" ;;
    apart) exec bash -c "$2" < <(sed "s#$SHARED#$OLD#g") ;;
esac
exec bash -c "$2"
"""

# What Python imports when it starts.
OLD_PYTHON = """
import platform, time
platform.python_version, now = lambda: "3.9.1", time.time
time.time = lambda: now() - 60
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A folder with shards, a resolved configuration, an ssh that stays here, and an older mmscale."""
    folder = tmp_path_factory.mktemp("cluster")
    make_toy(folder / "data", samples=16, shards=2, val_samples=4)
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(SSH)
    (folder / "bin/ssh").chmod(0o755)
    old = folder / "old"
    shutil.copytree(ROOT / "mmscale", old / "mmscale")
    (old / "mmscale/__init__.py").write_text('__version__ = "0.0.0"\n')
    (old / "sitecustomize.py").write_text(OLD_PYTHON)
    for package, version in (("torch", "2.0.1"), ("deepspeed", "0.9.5")):
        (old / f"{package}-{version}.dist-info").mkdir()
        (old / f"{package}-{version}.dist-info/METADATA").write_text(f"Name: {package}\nVersion: {version}\n")
    (old / "launch").mkdir()
    (old / "launch/nonce").write_text("another run's")
    overrides = [f"run.dir={folder}/run", f"data.train={folder}/data/train-*.tar", "tokenizer.path=null"]
    config = load_config(ROOT / "configs/toy.yaml", [*overrides, f"data.val={folder}/data/val-*.tar"])
    (folder / "config.yaml").write_text(config.dump())
    (old / "config.yaml").write_text(config.dump())
    return folder


def check(cluster, hosts, *arguments, config="config.yaml", port=0):
    (cluster / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    environment = os.environ | {
        "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}",
        "ROOT": str(ROOT),
        "OLD": str(cluster / "old"),
        "SHARED": str(cluster / "run"),
        "DS_ACCELERATOR": "cpu",
    }
    files = [cluster / "hosts", cluster / config, "--run-dir", cluster / "run", "--port", str(port)]
    command = [sys.executable, ROOT / "launch/preflight.py", *files, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.slow
def test_check_names_every_fault_of_every_host(cluster):
    done = check(cluster, ["here", "old", "apart", "bare", "gone"])
    assert done.returncode == 2, done.stderr
    table, host = {}, ""
    for line in done.stdout.splitlines()[1:]:
        *start, fault = re.split("  +", line)
        host = start[0] or host
        table.setdefault(host, []).append(fault)
    assert table["here"] == ["ready"]
    assert [fault.partition(",")[0] for fault in table["old"][:4]] == [
        "python 3.9.1",
        "torch 2.0.1",
        "deepspeed 0.9.5",
        "mmscale 0.0.0",
    ]
    assert table["old"][4].startswith("source of mmscale") and re.fullmatch(
        "clock differs by (5.|6.) s", table["old"][5]
    )
    assert table["apart"] == ["run.dir is not the folder that this machine sees"]
    assert "cannot run the check there" in table["bare"][0] and "No such file" in table["bare"][0]
    assert "not reachable" in table["gone"][0] and "No route to host" in table["gone"][0]


@pytest.mark.slow
def test_check_names_unreadable_shards_and_a_port_that_is_taken(cluster):
    (cluster / "data/train-00002.tar").mkdir()  # found, but not to be read, by root neither
    text = (cluster / "config.yaml").read_text()
    (cluster / "faulty.yaml").write_text(text.replace("val-*.tar", "val-{00000..00001}.tar"))
    try:
        with socket.socket() as taken:
            taken.bind(("", 0))
            taken.listen()
            done = check(cluster, ["here"], config="faulty.yaml", port=taken.getsockname()[1])
    finally:
        (cluster / "data/train-00002.tar").rmdir()
    assert done.returncode == 2
    assert "train-00002.tar: Is a directory" in done.stdout
    assert "data.val" in done.stdout and "val-00001.tar" in done.stdout
    assert "Address already in use" in done.stdout


@pytest.mark.slow
def test_fewer_hosts_are_started_when_allowed(cluster):
    assert check(cluster, ["here", "gone"]).returncode == 1  # it may come back: worth another try
    assert check(cluster, ["here", "locked"], "--min-hosts", "1").returncode == 2  # no use trying again
    for number in ("0", "3"):
        assert check(cluster, ["here", "gone"], "--min-hosts", number).returncode == 2
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
        ("finished 256", ("--retries", "many"), 2, None),
    ],
)
def test_restarts(tmp_path, script, options, code, calls):
    process = supervise(tmp_path, script, *options)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert calls is None or int((tmp_path / "calls").read_text()) == calls
    assert (tmp_path / "calls").exists() == (calls is not None)


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
