"""The benchmarks' own arithmetic: pairing, spread, and what counts as a change."""

import gzip
import json
import sys
import time

import pytest

from benchmarks import gpu, run
from benchmarks.common import Report, paired, ratios, write_json
from benchmarks.compare import main as compare
from benchmarks.fleet import Fleet
from benchmarks.render import newest_reports, render


@pytest.fixture
def result_file(tmp_path):
    def write(name: str, readings: list[float], better="lower", unit="s", cpu="one") -> str:
        report = Report("sleep")
        report.add("nap", unit, readings, better)
        content = {"benchmark": "sleep", "environment": {"cpu": cpu, "cores": 2, "gpus": []}, "results": report.results}
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    return write


def test_cases_are_timed_in_turn_and_their_readings_belong_together():
    calls = []
    ticks = iter(range(1000))
    readings = paired(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1, clock=lambda: next(ticks)
    )
    assert "".join(calls) == "abababab"
    assert readings == {"a": [1, 1, 1], "b": [1, 1, 1]}
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_a_report_keeps_all_readings_with_median_and_spread(tmp_path):
    report = Report("sleep")
    assert report.add("nap", "s", [float(i) for i in range(101)], batch=8) == 50
    report.finish(tmp_path / "out.json")
    row = json.loads((tmp_path / "out.json").read_text())["results"][0]
    assert (row["p10"], row["p90"], row["n"], len(row["readings"]), row["facts"]) == (10, 90, 101, 101, {"batch": 8})


STEADY = [1.0, 1.01, 0.99] * 10


@pytest.mark.parametrize(
    ("new", "better", "code"),
    [
        (STEADY, "lower", 0),
        ([1.3 * x for x in STEADY], "lower", 1),
        ([1.3 * x for x in STEADY], "higher", 0),
        ([0.7 * x for x in STEADY], "higher", 1),
        ([1.05 * x for x in STEADY], "lower", 0),  # beyond the spread, within the threshold
        ([0.5, 1.3, 2.0] * 10, "lower", 0),  # beyond the threshold, within the spread
    ],
)
def test_only_a_change_beyond_threshold_and_spread_is_a_regression(result_file, new, better, code):
    assert compare([result_file("old.json", STEADY, better), result_file("new.json", new, better)]) == code


def test_times_of_two_machines_are_not_compared_but_ratios_are(result_file):
    slower = [2 * x for x in STEADY]
    assert compare([result_file("a.json", STEADY), result_file("b.json", slower, cpu="two")]) == 0
    assert (
        compare([result_file("a.json", STEADY, unit="ratio"), result_file("b.json", slower, unit="ratio", cpu="two")])
        == 1
    )


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(SystemExit, match="not a result file"):
        compare([str(tmp_path / "x.json"), str(tmp_path / "x.json")])


ENVIRONMENT = {
    "cpu": "one",
    "cores": 2,
    "memory_gib": 8,
    "gpus": [],
    "packages": {},
    "python": "3.12",
    "commit": "abc",
    "uncommitted_changes": "",
}


def make_report(name: str, date: str, readings: list[float], **environment) -> dict:
    report = Report(name)
    report.add("nap", "s", readings, batch=8)
    command = f"python -m benchmarks.{name}"
    here = ENVIRONMENT | {"date": date} | environment
    return {"benchmark": name, "command": command, "environment": here, "results": report.results}


def test_the_page_shows_the_newest_readings_of_each_benchmark_on_each_machine(tmp_path):
    old = [make_report("sleep", "2026-01-01", [1.5]), make_report("dream", "2026-01-01", [7.25])]
    write_json(tmp_path / "old.json", {"benchmarks": old})
    write_json(tmp_path / "new.json", make_report("sleep", "2026-02-01", [2.5, 2.5, 2.75]))
    write_json(tmp_path / "gpu.json", make_report("sleep", "2026-01-02", [0.5], gpus=["H100"]))
    page = render(sorted(tmp_path.glob("*.json")), tmp_path).read_text()
    assert "| nap (batch 8) | 2.5 | 2.5 | 2.7 | s | 3 |" in page
    assert all(word in page for word in ("7.25", "| 0.5 ", "Machine: H100", "`python -m benchmarks.sleep`", "new.json"))
    assert "1.5" not in page
    assert {path.name for path in tmp_path.glob("*.png")} == {"sleep.png", "dream.png", "sleep_gpu.png"}


def test_a_run_keeps_what_its_file_holds_of_other_benchmarks(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "environment", lambda: ENVIRONMENT | {"date": "2026-01-01T10:00"})
    for name, reading in (("loader", 1.0), ("loss", 2.0), ("loader", 3.0)):
        reports = [make_report(name, f"2026-01-01T10:0{reading:.0f}", [reading])]
        monkeypatch.setattr(run, "run", lambda *_, reports=reports: (reports, []))
        assert run.main(["--only", name]) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.name == "2026-01-01_one-2-cores_abc.json"
    found = {report["benchmark"]: report["results"][0]["readings"] for report in newest_reports([path])}
    assert found == {"loader": [3.0], "loss": [2.0]}


def test_a_fleet_stands_still_between_its_turns(tmp_path):
    reading_ahead = tmp_path / "count"
    loop = f"""
import threading, time
from benchmarks.fleet import Gate
def read_ahead():
    for number in range(10**6):
        open({str(reading_ahead)!r}, "w").write(str(number))
        time.sleep(0.001)
threading.Thread(target=read_ahead, daemon=True).start()
gate = Gate({{"parameters": 7}})
while True:
    time.sleep(0.01)
    gate.passed(waited=0.25)
"""
    with Fleet({}, command=[sys.executable, "-c", loop]) as fleet:
        assert fleet.facts == {"parameters": 7}
        seconds = fleet.steps(3)
        assert len(seconds) == 3
        assert min(seconds) >= 0.01
        assert fleet.waited == [0.25] * 3
        before = reading_ahead.read_text()
        time.sleep(0.2)
        assert reading_ahead.read_text() == before


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs(tmp_path):
    trace, output = tmp_path / "trace.json.gz", tmp_path / "gpu.json"
    gpu.main(["--dry", "--trace", str(trace), "--output", str(output)])
    cases = {row["case"]: row["median"] for row in json.loads(output.read_text())["results"]}
    for name in ("step", "loader, exact / synthetic, step time", "loss, forward and backward", "peak memory"):
        assert name in cases
    assert cases["generation, pictures encoded"] > 0
    assert len(json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]) > 1000
