"""Confidence that can be believed: corrections of class scores [samples, classes], given as logarithms."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.adapt.prompts.metrics import describe

ROUNDS = 100  # in which a bias is fitted to a prior; it converges in a few


def contextual_bias(content_free: Tensor) -> Tensor:
    """What to add to the scores [classes] so that inputs without content favour no class
    (https://arxiv.org/abs/2102.09690, section 5).

    Args:
        content_free: log scores [inputs, classes] of inputs that say nothing about the class.
    """
    return -content_free.softmax(1).mean(0).clamp_min(torch.finfo(torch.float32).tiny).log()


def prior_bias(scores: Tensor, prior: Tensor) -> Tensor:
    """What to add to the scores [classes] so that the mean prediction over samples is the share of each class.

    Args:
        scores: of samples [samples, classes], whose labels are not looked at.
        prior: share of each class among them [classes].
    """
    scores, wanted = scores.double(), prior.double().clamp_min(1e-6)
    bias = torch.zeros_like(wanted)
    for _ in range(ROUNDS):
        bias += (wanted / (scores + bias).softmax(1).mean(0).clamp_min(1e-12)).log()
    return (bias - bias.mean()).float()


def fit_temperature(scores: Tensor, targets: Tensor) -> float:
    """The divisor of the scores with the highest likelihood on labelled samples (https://arxiv.org/abs/1706.04599)."""
    scores = scores.double()
    log_temperature = torch.zeros((), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], lr=0.5, max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(scores / log_temperature.exp(), targets)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return float(log_temperature.detach().clamp(-5, 5).exp())


def calibration_table(
    dev: Tensor, dev_targets: Tensor, content_free: Tensor, test: Tensor, test_targets: Tensor
) -> dict[str, dict[str, float]]:
    """Accuracy and calibration error on test, as the scores are and corrected in each way.

    Args:
        dev, test: log scores [pictures, classes]. content_free: of pictures that say nothing [pictures, classes].

    `contextual` uses the content-free pictures alone, `prior` the pictures of dev and how many there are of each class,
    `temperature` and what is combined with it the labels of dev, too.
    """
    shares = torch.bincount(dev_targets, minlength=dev.shape[1]) / len(dev_targets)
    biases = {
        "none": torch.zeros(dev.shape[1]),
        "contextual": contextual_bias(content_free),
        "prior": prior_bias(dev, shares),
    }
    table = {}
    for name, bias in biases.items():
        table[name] = describe(test + bias, test_targets)
        temperature = fit_temperature(dev + bias, dev_targets)
        table[f"{name} + temperature"] = describe((test + bias) / temperature, test_targets)
    return table
