"""Which of a run's evaluations is the best, and when there is no use in going on."""

from dataclasses import dataclass, field

from mmscale.errors import UserError


@dataclass
class Selection:
    """Keeps the best evaluation by the score `by` (the first of them when None), where larger is better.

    patience: evaluations in a row without a better one, after which `exhausted` is True; None for never.
    """

    by: str | None = None
    patience: int | None = None
    best: tuple[int, float] | None = field(default=None, init=False)  # step and score
    since_best: int = field(default=0, init=False)

    def add(self, step: int, scores: dict[str, float]) -> bool:
        """Takes an evaluation; True when it is the best so far. Raises UserError when the score is not among them."""
        by = next(iter(scores)) if self.by is None else self.by
        if by not in scores:
            raise UserError(f"adapt.choose_by: there is no score `{by}`; there are {', '.join(scores)}")
        score = scores[by]
        if self.best is not None and not score > self.best[1]:
            self.since_best += 1
            return False
        self.best, self.since_best = (step, score), 0
        return True

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.since_best >= self.patience
