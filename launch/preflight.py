"""Checks the machines of a run before anything is started, over the same ssh that the launcher will use.

python launch/preflight.py HOSTFILE CONFIG --run-dir DIR --port P [--min-hosts N]

CONFIG is the resolved configuration, in a folder that all machines share. Prints a table with what is wrong, and writes
to DIR/launch the hostfile of the ranks to start (`hosts`) and the shell variables that go with it (`variables`).
Ends with 0 when the run can start, 2 when somebody has to mend something, 1 when machines were out of reach.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from route import interface_to

import mmscale
from mmscale.config import Config, load_config
from mmscale.errors import UserError

MAX_CLOCK_DIFFERENCE_S = 5.0
TIMEOUT_S = 90.0
# Every shard is looked up; this many of them, evenly spread, are opened.
SHARDS_TO_OPEN = 64
# What ssh says of a machine that is there, but that will not let us in until somebody has done something about it.
SSH_REFUSALS = ("Permission denied", "Host key verification failed", "Bad configuration option")
MISTAKE, OUT_OF_REACH = 2, 1


@dataclass
class Host:
    """A line of the hostfile, what the machine answered, and what is wrong with it."""

    name: str
    slots: int
    facts: dict = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    reached: bool = False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hostfile", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--min-hosts", type=int, help="start with as few as these (default: all)")
    args = parser.parse_args()
    try:
        hosts = read_hostfile(args.hostfile)
        config = load_config(args.config)
        if args.min_hosts is not None and not 1 <= args.min_hosts <= len(hosts):
            raise UserError(
                f"--min-hosts {args.min_hosts}: {args.hostfile} lists {len(hosts)}; give a number up to that"
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    folder = args.run_dir / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    nonce = folder / "nonce"
    nonce.write_text(uuid.uuid4().hex)
    here = {**versions(), "nonce": nonce.read_text()}
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda host: ask(host, args.config, nonce, args.port, is_first=host is hosts[0]), hosts))
    for host in hosts:
        if host.reached:
            host.wrong += compare(host, here)
    print_table(hosts)

    good = [host for host in hosts if not host.wrong]
    if any(host.wrong and host.reached for host in hosts):
        return MISTAKE
    if len(good) < (args.min_hosts or len(hosts)):
        return OUT_OF_REACH
    total = num_ranks(config, sum(host.slots for host in good))
    write_launch_files(folder, good, total)
    return 0


def read_hostfile(path: Path) -> list[Host]:
    """DeepSpeed's hostfile: `NAME slots=N` a line, `#` for comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the hostfile cannot be read: {error}") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdigit() or int(slots) < 1:
            raise UserError(f"{path}, line {number}: expected `NAME slots=N`, found `{line.strip()}`")
        if words[0] in hosts:
            raise UserError(f"{path}, line {number}: {words[0]} is listed twice")
        hosts[words[0]] = Host(words[0], int(slots))
    if not hosts:
        raise UserError(f"{path}: lists no machines")
    return list(hosts.values())


def ask(host: Host, config: Path, nonce: Path, port: int, is_first: bool) -> None:
    """Runs `probe` on a machine; fills in `facts`, or `wrong` when it cannot be reached."""
    question = {"config": str(config), "nonce": str(nonce), "port": port if is_first else None, "slots": host.slots}
    environment = f"DS_ACCELERATOR={os.environ.get('DS_ACCELERATOR', '')} PYTHONPATH={Path(__file__).parents[1]}"
    command = f"{environment} {shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).absolute()))} --probe"
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=8", *shlex.split(os.environ.get("SSH_ARGS", ""))]
    start = time.time()
    try:
        done = subprocess.run(
            ["ssh", *options, host.name, command],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        host.wrong.append(f"no answer within {TIMEOUT_S:.0f} s")
        return
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode == 255:  # ssh's own
        host.wrong.append(f"not reachable: {last}")
        host.reached = any(refusal in last for refusal in SSH_REFUSALS)
        return
    host.reached = True
    if done.returncode != 0 or not done.stdout.strip():
        host.wrong.append(f"{sys.executable} cannot run the check there: {last}")
        return
    host.facts = json.loads(done.stdout.splitlines()[-1])
    host.facts["clock_difference"] = clock_difference(host.facts["time"], start, time.time())


def clock_difference(there: float, sent: float, received: float) -> float:
    """Seconds by which a clock is certainly off: 0 when its reading lies between the question and the answer."""
    return max(0.0, sent - there, there - received)


def compare(host: Host, here: dict) -> list[str]:
    """What is wrong with a machine that answered, by its facts and this machine's."""
    if not host.facts:
        return []
    wrong = [
        f"{name} {host.facts[name]}, here {here[name]}"
        for name in ("python", "torch", "deepspeed", "mmscale", "source of mmscale")
        if host.facts[name] != here[name]
    ]
    if host.facts["clock_difference"] > MAX_CLOCK_DIFFERENCE_S:
        wrong.append(f"clock differs by {host.facts['clock_difference']:.0f} s")
    if host.facts["nonce"] != here["nonce"]:
        wrong.append("run.dir is not the folder that this machine sees")
    return wrong + host.facts["wrong"]


def probe(question: dict) -> dict:
    """On one of the machines: its facts. Run over ssh."""
    nonce = Path(question["nonce"])
    facts = {**versions(), "time": time.time(), "wrong": []}
    try:
        facts["nonce"] = nonce.read_text()
        config = load_config(question["config"])
    except (OSError, UserError):
        return {**facts, "nonce": None, **addresses()}
    return {**facts, **addresses(), "wrong": [*wrong_with_data(config), *wrong_with_machine(question)]}


def versions() -> dict[str, str]:
    # Importing deepspeed takes seconds; its metadata tells as much.
    digest = hashlib.sha256()
    root = Path(mmscale.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "mmscale": mmscale.__version__,
        "source of mmscale": digest.hexdigest()[:12],
    }


def addresses() -> dict[str, str]:
    """The address under which other machines reach this one: that of the ssh connection which asks."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    address = connection[2] if len(connection) == 4 else socket.gethostbyname(socket.gethostname())
    return {"address": address, "interface": interface_to(connection[0]) if connection else "lo"}


def wrong_with_data(config: Config) -> list[str]:
    from mmscale.data.paths import expand, is_remote

    wrong = []
    sources = config.data.train or [path for source in config.data.sources or [] for path in as_list(source.shards)]
    for key, paths in (("data.train", sources), ("data.val", config.data.val)):
        if not paths:
            continue
        try:
            shards = [shard for shard in expand(paths, key) if not is_remote(shard)]
        except (OSError, UserError) as error:
            wrong.append(str(error))
            continue
        every = -(-len(shards) // SHARDS_TO_OPEN) or 1
        unreadable = [failure for shard in shards[::every] if (failure := _read_failure(shard))]
        if unreadable:
            wrong.append(f"{key}: {unreadable[0]}" + (f" and {len(unreadable) - 1} more" if unreadable[1:] else ""))
    if config.tokenizer.path and (failure := _read_failure(config.tokenizer.path)):
        wrong.append(f"tokenizer.path: {failure}")
    return wrong


def as_list(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _read_failure(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def wrong_with_machine(question: dict) -> list[str]:
    wrong = []
    if question["port"] is not None:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", question["port"]))
            except OSError as error:
                wrong.append(f"port {question['port']}: {error.strerror} (choose another with MASTER_PORT)")
    if os.environ.get("DS_ACCELERATOR") != "cpu":
        import torch

        if (gpus := torch.cuda.device_count()) < question["slots"]:
            wrong.append(f"{gpus} GPUs, but slots={question['slots']} in the hostfile")
    return wrong


def print_table(hosts: list[Host]) -> None:
    width = max(len(host.name) for host in hosts)
    print(f"{'host':<{width}}  slots  check")
    for host in hosts:
        print(f"{host.name:<{width}}  {host.slots:>5}  {host.wrong[0] if host.wrong else 'ready'}")
        for line in host.wrong[1:]:
            print(f"{'':<{width}}         {line}")


def num_ranks(config: Config, slots: int) -> int:
    """The largest number of ranks that shares the global batch evenly, in whole micro-batches."""
    unit = config.train.micro_batch or 1
    return max(n for n in range(1, slots + 1) if config.train.global_batch % (n * unit) == 0 or n == 1)


def write_launch_files(folder: Path, hosts: list[Host], total: int) -> None:
    left = total
    lines = []
    for host in hosts:
        if slots := min(host.slots, left):
            lines.append(f"{host.name} slots={slots}\n")
        left -= slots
    (folder / "hosts").write_text("".join(lines))
    used = hosts[: len(lines)]
    interfaces = {host.facts["interface"] for host in used}
    variables = {"MASTER_ADDR": used[0].facts["address"], "RANKS_A_HOST": max(host.slots for host in used)}
    if len(interfaces) == 1:
        variables["INTERFACE"] = interfaces.pop()
    (folder / "variables").write_text("".join(f"{key}={shlex.quote(str(v))}\n" for key, v in variables.items()))
    print(f"{total} ranks on {len(used)} of {len(hosts)} machines that are ready")


if __name__ == "__main__":
    if sys.argv[1:] == ["--probe"]:
        print(json.dumps(probe(json.load(sys.stdin))))
    else:
        sys.exit(main())
