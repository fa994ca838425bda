"""How good class scores are: accuracy, likelihood, and how far confidence is from accuracy.

All functions take log scores [samples, classes], whatever made them, of which only differences within a row count; and
targets int64 [samples].
"""

import numpy as np
import torch
from torch import Tensor

BINS = 15


def expected_calibration_error(scores: Tensor, targets: Tensor, bins: int = BINS) -> float:
    """Mean distance between confidence and accuracy, over equal bins of confidence, weighted by their samples
    (https://arxiv.org/abs/1706.04599, equation 3)."""
    confidence, predicted = scores.softmax(1).max(1)
    confidence, right = confidence.double().numpy(), (predicted == targets).double().numpy()
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs((confidence - right)[bin_of == number].sum()) for number in range(bins)]
    return float(sum(gaps) / len(confidence))


def accuracy(scores: Tensor, targets: Tensor) -> float:
    return float((scores.argmax(1) == targets).double().mean())


def balanced_accuracy(scores: Tensor, targets: Tensor) -> float:
    """The mean of the classes' own accuracies, over the classes that occur."""
    right = scores.argmax(1) == targets
    return float(torch.stack([right[targets == number].double().mean() for number in targets.unique()]).mean())


def balanced_log_likelihood(scores: Tensor, targets: Tensor) -> float:
    """The mean log-probability of the right class, each class counting alike."""
    right = scores.log_softmax(1).gather(1, targets[:, None])[:, 0].double()
    return float(torch.stack([right[targets == number].mean() for number in targets.unique()]).mean())


def merit(scores: Tensor, targets: Tensor) -> tuple[float, float]:
    """What a search goes by: balanced accuracy, and where it is the same, likelihood."""
    return balanced_accuracy(scores, targets), balanced_log_likelihood(scores, targets)


def describe(scores: Tensor, targets: Tensor) -> dict[str, float]:
    """The three numbers of a report."""
    return {
        "accuracy": accuracy(scores, targets),
        "balanced_accuracy": balanced_accuracy(scores, targets),
        "calibration_error": expected_calibration_error(scores, targets),
    }
