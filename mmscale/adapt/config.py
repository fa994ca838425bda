"""The configuration of an adaptation: pretraining's sections, and `adapt`, which says what is done with the model."""

from typing import Literal

from pydantic import Field

from mmscale.config import Config, DataConfig, Paths, Section, TrainConfig

METHODS = {
    "heads": "mmscale.adapt.heads:tune_heads",
}
"""What `adapt.method` may be, and the function that does it: AdaptConfig -> exit code."""


class AdaptDataConfig(DataConfig):
    """`train` to learn from, `val` to choose by (the dev split), `test` to report on, once, at the end."""

    test: Paths | None = Field(None, description="scored once, with the chosen weights; never used to choose")


class AdaptSection(Section):
    """What is done with the pretrained model that `model.init_from` names."""

    method: Literal[tuple(METHODS)]  # type: ignore[valid-type]


class AdaptConfig(Config):
    """The whole of an adaptation's settings."""

    data: AdaptDataConfig = AdaptDataConfig()
    train: TrainConfig | None = Field(None, description="for the methods that train")
    adapt: AdaptSection
