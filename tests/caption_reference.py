"""200 small corpora of captions, and what COCO's own scorers say of them.

The figures in `tests/data/caption_reference.json` are made in an environment of their own, since the package brings
100 MB of Java that these scorers do not need:

    python -m venv /tmp/coco && /tmp/coco/bin/pip install pycocoevalcap==1.2
    /tmp/coco/bin/python tests/caption_reference.py
"""

import json
import random
from pathlib import Path

NUM_CASES = 200
RESULTS = Path(__file__).parent / "data" / "caption_reference.json"
WORDS = "a the red blue small large circle square on top of two dogs cats don't 3 été 犬".split()  # noqa: SIM905


def corpus(case: int) -> tuple[list[str], list[list[str]]]:
    """Captions and references of one case; some captions are empty, some are a reference, some share nothing."""
    draw = random.Random(case)

    def number(low: int, high: int) -> int:
        return low + int(draw.random() * (high - low + 1))

    def sentence(low: int) -> str:
        return " ".join(WORDS[number(0, len(WORDS) - 1)] for _ in range(number(low, 14)))

    captions, references = [], []
    for _ in range(number(1, 12)):
        own = [sentence(1) for _ in range(number(1, 5))]
        kind = draw.random()
        captions.append(own[0] if kind < 0.2 else " ".join(own[-1].split()[:6]) if kind < 0.5 else sentence(0))
        references.append(own)
    return captions, references


def main() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    results = []
    for case in range(NUM_CASES):
        captions, references = corpus(case)
        generated = {i: [caption] for i, caption in enumerate(captions)}
        truths = dict(enumerate(references))
        bleu, _ = Bleu(4).compute_score(truths, generated, verbose=0)
        scores = {f"bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}
        scores["rouge_l"] = float(Rouge().compute_score(truths, generated)[0])
        scores["cider"] = float(Cider().compute_score(truths, generated)[0])
        results.append(scores)
    RESULTS.write_text(json.dumps({"made_by": "pycocoevalcap 1.2", "scores": results}, indent=0) + "\n")


if __name__ == "__main__":
    main()
