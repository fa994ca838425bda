"""The benchmarks' own arithmetic: pairing, spread, and what counts as a change."""

import json

import pytest

from benchmarks.common import Report, paired, ratios
from benchmarks.compare import main as compare


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
