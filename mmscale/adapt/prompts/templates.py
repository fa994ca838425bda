"""Templates for class names: where candidates come from, and which are the best on the dev split."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from mmscale.adapt.prompts.metrics import merit

SLOT = "{}"


def templates_of_captions(captions: Iterable[str], words: Sequence[str], limit: int) -> list[str]:
    """Captions with their class word taken out, the most frequent first.

    A caption gives a template when it holds exactly one class word, once. A plural's ending goes with its word.
    """
    ending = "(?:e?s)?" if all(len(word) > 1 for word in words) else ""
    word = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))}){ending}\b")
    found: Counter[str] = Counter()
    for caption in captions:
        caption = " ".join(caption.replace("{", "").replace("}", "").split())
        if len(word.findall(caption)) == 1:
            found[word.sub(SLOT, caption)] += 1
    return [template for template, _ in found.most_common(limit)]


def recombined(templates: Sequence[str], limit: int) -> list[str]:
    """New templates from the beginnings and the ends of others, and from others with one word left out."""
    halves = [template.split(SLOT, 1) for template in templates]
    shorter = []
    for before, after in halves:
        words = [before.split(), after.split()]
        for side in (0, 1):
            for number in range(len(words[side])):
                kept = [list(part) for part in words]
                del kept[side][number]
                shorter.append(" ".join([*kept[0], SLOT, *kept[1]]))
    crossed = [before + SLOT + after for before, _ in halves for _, after in halves]
    known = set(templates)
    fresh = [text for pair in zip(shorter, crossed, strict=False) for text in pair]
    fresh += shorter[len(crossed) :] + crossed[len(shorter) :]
    return [text for text in dict.fromkeys(fresh) if text not in known][:limit]


def rank(candidates: Sequence[str], score: Callable[[Sequence[str]], Tensor], targets: Tensor) -> list[dict]:
    """Each candidate alone, the best first: by balanced accuracy, then by the likelihood of the right class.

    Args:
        score: templates -> log scores [samples, classes].
        targets: [samples].
    """
    rows = []
    for template in candidates:
        accuracy, likelihood = merit(score([template]), targets)
        rows.append({"template": template, "balanced_accuracy": accuracy, "log_likelihood": likelihood})
    return sorted(rows, key=lambda row: (-row["balanced_accuracy"], -row["log_likelihood"]))


def grow_ensemble(
    ranked: Sequence[dict], score: Callable[[Sequence[str]], Tensor], targets: Tensor, most: int
) -> list[str]:
    """The best template, and further ones of the ranking for as long as one makes the whole better on dev."""
    chosen = [ranked[0]["template"]]
    best = merit(score(chosen), targets)
    for row in ranked[1:]:
        if len(chosen) == most:
            break
        found = merit(score([*chosen, row["template"]]), targets)
        if found > best:
            chosen.append(row["template"])
            best = found
    return chosen
