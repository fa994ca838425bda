"""Learned context vectors against templates by hand, from 1 to 16 examples of a class, over several seeds.

    python -m benchmarks.few_shot CONFIG [key.sub=value ...] [--seeds 5] [--shots 1,2,4,8,16] [--output FILE.json]

CONFIG is one of `mmscale adapt` with method `prompts` and kind `context`, whose `adapt.prompts.templates` are those by
hand. Beside them: the template that is best on *test* (so nothing chosen honestly can be better), what the search of
kind `words` finds on dev, and a logistic regression on the frozen image embeddings of the same examples. Each run goes
through the trainer. Writes a picture beside FILE.json.
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression

from benchmarks.common import RESULTS, Report, parser
from mmscale.adapt.base import load_base
from mmscale.adapt.command import adapt
from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.prompts.classes import find_classes
from mmscale.adapt.prompts.metrics import accuracy
from mmscale.adapt.prompts.pictures import encode_splits
from mmscale.adapt.prompts.scorers import ContrastiveScorer
from mmscale.adapt.prompts.shots import draw_shots, encode_shots
from mmscale.config import load_config
from mmscale.evaluate.zeroshot import read_templates


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("config")
    arguments.add_argument("overrides", nargs="*")
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--shots", default="1,2,4,8,16")
    arguments.add_argument("--contexts", default="unified,class,image")
    options = arguments.parse_args()
    seeds, shots = range(2 if options.quick else options.seeds), [int(number) for number in options.shots.split(",")]
    output = Path(options.output or RESULTS / "few_shot.json")
    config = load_config(options.config, options.overrides, AdaptConfig)
    report = Report("few_shot")

    templates = _by_hand(config)
    report.add("templates by hand", "accuracy", list(templates.values()), "higher")
    best = max(templates, key=templates.__getitem__)
    report.add("the best by hand, on test", "accuracy", [templates[best]], "higher", prompt=best)
    found = _run(options, {"kind": "words"})
    report.add("searched on dev", "accuracy", [found["scores"][found["chosen"]]["accuracy"]], "higher")
    for number in shots:
        probe = [_probe(options, number, seed) for seed in seeds]
        report.add("logistic regression", "accuracy", probe, "higher", shots=number)
        for context in options.contexts.split(","):
            settings = {"kind": "context", "context": context, "shots": number}
            readings = [_run(options, settings, seed)["scores"]["none"]["accuracy"] for seed in seeds]
            report.add(f"context, {context}", "accuracy", readings, "higher", shots=number)
    report.finish(output)
    _plot(report, output.with_suffix(".png"), f"{Path(options.config).stem}: {config.adapt.prompts.label}")


def _by_hand(config: AdaptConfig) -> dict[str, float]:
    """The accuracy on test of each template with each word of the classes (the last where a class has fewer)."""
    base = load_base(config)
    classes = find_classes(config, config.adapt.prompts.label, config.adapt.prompts.classes, "adapt.prompts")
    test = encode_splits(config, base, classes, tokens=False)["test"]
    scorer = ContrastiveScorer(base.model, base.tokenizer)
    found = {}
    for number in range(max(map(len, classes.words.values()))):
        words = [own[min(number, len(own) - 1)] for own in classes.words.values()]
        for template in read_templates(config.adapt.prompts.templates):
            scores = scorer(test, words, [template])
            found[f"{template}: {', '.join(words)}"] = accuracy(scores, test.targets)
    return found


def _probe(options, shots: int, seed: int) -> float:
    config = _config(options, {"shots": shots}, seed, "unused")
    base = load_base(config)
    classes = find_classes(config, config.adapt.prompts.label, config.adapt.prompts.classes, "adapt.prompts")
    drawn = draw_shots(config, base.tokenizer, classes, base.image_size, base.context_length)
    learn = encode_shots(base.model, drawn, classes)
    test = encode_splits(config, base, classes, tokens=False)["test"]
    probe = LogisticRegression(C=100.0, max_iter=1000).fit(learn.image_embeds.numpy(), learn.targets.numpy())
    return float(probe.score(test.image_embeds.numpy(), test.targets.numpy()))


def _run(options, settings: dict, seed: int = 0) -> dict:
    """One adaptation, through the command's own door; its report."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            adapt(_config(options, settings, seed, folder))
        return json.loads((Path(folder) / "report.json").read_text())


def _config(options, settings: dict, seed: int, folder: str) -> AdaptConfig:
    overrides = [*options.overrides, f"run.dir={folder}", f"run.seed={seed}"]
    overrides += [f"adapt.prompts.{key}={value}" for key, value in settings.items()]
    return load_config(options.config, overrides, AdaptConfig)


def _plot(report: Report, path: Path, title: str) -> None:
    """Medians, with bands from the worst to the best seed."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    curves: dict[str, list[dict]] = {}
    for row in report.results:
        curves.setdefault(row["case"], []).append(row)
    for case, rows in curves.items():
        if "shots" in rows[0]["facts"]:
            shots = [row["facts"]["shots"] for row in rows]
            (line,) = axis.plot(shots, [row["median"] for row in rows], marker="o", label=case)
            low, high = ([pick(row["readings"]) for row in rows] for pick in (np.min, np.max))
            axis.fill_between(shots, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        elif len(rows[0]["readings"]) == 1:
            axis.axhline(rows[0]["median"], linestyle="--" if "best" in case else ":", color="#444444", label=case)
    axis.set_xscale("log", base=2)
    axis.set_xticks(shots, [str(number) for number in shots])
    axis.set(xlabel="examples of each class", ylabel="accuracy on test", title=title)
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
