"""The report shows what a run's files hold, as text and never as markup, and works in a browser without a network."""

import base64
import io
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from mmscale.errors import UserError
from mmscale.report.charts import short, thin, ticks
from mmscale.report.page import write_report
from mmscale.report.runs import read_run

EVIL = "<script>document.title='broken'</script>"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write_run(folder, name=EVIL, steps=50, lr=0.001):
    """A run's files as training leaves them, with markup wherever text can come from outside."""
    folder.mkdir()
    (folder / "config.yaml").write_text(
        json.dumps({"run": {"dir": name}, "optim": {"lr": lr}, "data": {"train": EVIL}})
    )
    (folder / "status.json").write_text(
        json.dumps({"status": "preempted", "samples": 8 * steps, "step": steps, "reason": EVIL})
    )

    def dump(file, lines):
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))

    dump(
        "metrics.jsonl",
        [
            {
                "step": step,
                "samples": 8 * step,
                "epoch": step / 10,
                "loss": 10 / step,
                "loss_contrastive": 4 / step,
                "loss_caption": 3 / step,
                "logit_scale": 14.3,
                "lr": lr,
                "grad_norm": None if step == 7 else 1.0,
                "grad_norm_vision": 0.5,
                "samples_per_s": 100.0 + step,
                "step_s": 0.1,
                "data_wait_s": 0.01,
                "mfu": None,
                "mem_gib": 1.5,
                "skipped": int(step > 6),
                "bad_samples": 1,
            }
            for step in range(1, steps + 1)
        ],
    )
    dump("evaluations.jsonl", [{"step": s, "samples": 8 * s, "zeroshot_top1": s / 100} for s in (20, 40)])
    dump(
        "events.jsonl",
        [
            {"event": "resume", "step": 10, "samples": 80, "time": 1e9, "changes": [f"optim.lr: {EVIL}"]},
            {"event": "save", "step": 20, "samples": 160, "time": 1e9 + 5, "stall_s": 0.01, "total_s": 0.2},
        ],
    )
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "JPEG")
    jpeg = base64.b64encode(picture.getvalue()).decode()
    dump(
        "examples.jsonl",
        [{"step": 40, "samples": 320, "key": EVIL, "generated": EVIL, "references": ["a red square"], "jpeg": jpeg}],
    )
    dump("bad_samples.jsonl", [{"position": 3, "shard": "a.tar", "key": EVIL, "reason": EVIL}])
    return folder


def test_everything_is_on_the_page_and_nothing_comes_from_elsewhere(tmp_path):
    page = write_report(
        [write_run(tmp_path / "one"), write_run(tmp_path / "two", lr=0.002)], tmp_path / "r.html"
    ).read_text()
    assert page.count("<svg") >= 12
    for text in ("Captioning loss", "Gradient norm of vision", "zeroshot_top1", "a red square", "resumed at step 10"):
        assert text in page
    assert re.search(r"<code>optim.lr</code></td><td>0.001</td><td>0.002</td>", page)
    assert page.count("<script>") == 1, "only the page's own"
    assert "&lt;script&gt;document.title" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert not re.search(r"https?://|@import|url\(", page)


def test_a_run_that_has_just_begun_can_be_reported(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("run: {dir: x}\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "sampl')
    assert "No step has been logged yet" in write_report([run], tmp_path / "r.html").read_text()
    with pytest.raises(UserError, match="not a run's folder"):
        read_run(tmp_path / "nothing")


def test_thinning_keeps_spikes_and_order():
    points = [(float(x), 1.0) for x in range(10_000)]
    points[4321] = (4321.0, 99.0)
    kept = thin(points)
    assert len(kept) <= 400
    assert (4321.0, 99.0) in kept
    assert kept == sorted(kept)


@pytest.mark.parametrize("low, high", [(0, 1), (3.2, 3.3), (0, 0), (5, 5), (-2, 7), (1e-5, 4e-4), (0, 123_456_789)])
def test_ticks_cover_the_values_with_few_round_numbers(low, high):
    found = ticks(low, high)
    assert (found[0] <= low and high <= found[-1]) or high == low
    assert 2 <= len(found) <= 8
    assert all(len(short(value)) <= 8 for value in found)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_a_word_of_complaint(tmp_path, width):
    page = write_report([write_run(tmp_path / "one"), write_run(tmp_path / "two")], tmp_path / "r.html")
    probe = "<script>document.title = 'overflow ' + (document.documentElement.scrollWidth > innerWidth)</script>"
    page.write_text(page.read_text().replace("</body>", probe + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in shown.stderr
    assert shown.stdout.count('<polyline class="curve') >= 24
    assert "&lt;script&gt;document.title='broken'" in shown.stdout
    assert "<title>overflow false</title>" in shown.stdout
