"""The learning rate is a function of the samples, whatever the batch and wherever a run was interrupted."""

import pytest

from mmscale.config import OptimConfig
from mmscale.train.schedule import learning_rate


def curve(optim, batch, total):
    return [learning_rate(optim, samples, batch, total) for samples in range(0, total, batch)]


def test_warmup_rises_to_the_peak_and_the_cosine_falls_to_the_floor():
    optim = OptimConfig(lr=0.4, warmup_samples=40, min_lr_fraction=0.1)
    rates = curve(optim, 10, 440)
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[4] == pytest.approx(0.4)
    assert rates[24] == pytest.approx(0.4 * (0.1 + 0.9 / 2))
    assert learning_rate(optim, 440, 10, 440) == pytest.approx(0.04)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_no_update_is_made_with_a_rate_of_zero():
    assert min(curve(OptimConfig(lr=1.0, warmup_samples=0), 8, 80)) > 0
    assert min(curve(OptimConfig(lr=1.0, warmup_samples=64), 8, 80)) > 0


def test_the_rate_does_not_depend_on_the_batch_after_the_warmup():
    optim = OptimConfig(lr=1.0, warmup_samples=32)
    assert curve(optim, 8, 320)[4::4] == pytest.approx(curve(optim, 32, 320)[1:])


def test_wsd_stays_until_the_last_part_and_constant_for_ever():
    wsd = OptimConfig(lr=1.0, schedule="wsd", decay_fraction=0.25, warmup_samples=8)
    rates = curve(wsd, 8, 320)
    assert rates[1:31] == [1.0] * 30
    assert rates[30:] == pytest.approx([1 - k / 10 for k in range(10)])
    constant = OptimConfig(lr=1.0, schedule="constant", warmup_samples=8)
    assert set(curve(constant, 8, 320)) == {1.0}
