"""The configuration of a small adaptation, of toy shards in `folder/data` and a checkpoint in `folder/base`."""

from mmscale.adapt.config import AdaptConfig
from mmscale.config import validate


def adapt_config(folder, name, *settings, steps, batch):
    """A run in `folder/name` of so many steps; each of `settings` (section -> values) lies over those before it."""
    raw = {
        "run": {"dir": str(folder / name)},
        "data": {"train": str(folder / "data/train-*.tar"), "workers": 0, "crop_scale": [1, 1], "crop_ratio": [1, 1]},
        "model": {"init_from": str(folder / "base")},
        "train": {"samples": batch * steps, "global_batch": batch, "zero_stage": 1},
        "log": {"every": 1},
    }
    for sections in settings:
        for section, values in sections.items():
            raw[section] = raw.get(section, {}) | values
    return validate(raw, AdaptConfig)
