"""The configuration of an adaptation: pretraining's sections, and `adapt`, which says what is done with the model."""

from typing import Annotated, Literal

from pydantic import Field

from mmscale.adapt.combine.settings import DistillConfig, EnsembleConfig, QuantizeConfig, SoupConfig
from mmscale.adapt.explain.settings import ExplainConfig
from mmscale.adapt.instructions.settings import BuildInstructionsSettings, InstructionSettings
from mmscale.adapt.prompts.settings import PromptsConfig
from mmscale.config import Config, DataConfig, NonNegativeInt, Paths, PositiveInt, Section, TrainConfig

METHODS = {
    "heads": "mmscale.adapt.heads:tune_heads",
    "build_instructions": "mmscale.adapt.instructions.build:build_instructions",
    "instructions": "mmscale.adapt.instructions.command:tune_instructions",
    "prompts": "mmscale.adapt.prompts.tune:tune_prompts",
    "soup": "mmscale.adapt.combine.soup:cook_soup",
    "ensemble": "mmscale.adapt.combine.ensemble:fit_ensemble",
    "quantize": "mmscale.adapt.combine.quantize:quantize",
    "distill": "mmscale.adapt.combine.distill:distill",
    "explain": "mmscale.adapt.explain.method:explain",
}
"""What `adapt.method` may be, and the function that does it: AdaptConfig -> exit code."""


class AdaptDataConfig(DataConfig):
    """`train` to learn from, `val` to choose by (the dev split), `test` to report on, once, at the end."""

    test: Paths | None = Field(None, description="scored once, with the chosen weights; never used to choose")


class HeadTask(Section):
    """One task of method `heads`."""

    kind: Literal["classification", "multilabel", "regression", "matching"]
    label: str | None = Field(None, description="JMESPath of the answer in a sample's JSON: `objects[0].color`")
    fusion: Literal["image", "text", "concat", "gated", "cross_attention"] = Field(
        "image", description="what the head sees; `matching` takes `cross_attention` unless told otherwise"
    )
    hidden: NonNegativeInt = Field(0, description="width of a hidden layer; 0 for a linear head")
    classes: list[str] | None = Field(None, description="those found in data.train when unset")
    class_weights: Literal["none", "balanced"] = Field("none", description="`balanced`: rare classes count more")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="of this task's loss among those of the others")
    source: NonNegativeInt | None = Field(None, description="train on rows of this one of data.sources; all when unset")
    swaps: list[list[str]] = Field(
        [], description="matching: words that may stand for one another; a caption with another one is a negative"
    )
    rerank: PositiveInt = Field(8, description="matching: candidates of retrieval that are scored again")


class AdaptSection(Section):
    """What is done with the pretrained model that `model.init_from` names."""

    method: Literal[tuple(METHODS)]  # type: ignore[valid-type]
    trainable: list[str] | None = Field(
        None,
        description="parts that are trained (`all`, `vision.blocks.3`), beside new ones; all when nothing is chosen",
    )
    top_blocks: NonNegativeInt | None = Field(None, description="train the last so many blocks of every tower")
    new_lr_scale: Annotated[float, Field(gt=0)] = Field(
        1.0, description="factor of optim.lr for the new parts: heads that start at random learn faster than towers"
    )
    choose_by: str | None = Field(None, description="dev score that the best weights are chosen by; the first if unset")
    patience: PositiveInt | None = Field(None, description="evaluations without a better one, after which it ends")
    heads: dict[str, HeadTask] = Field({}, description="method `heads`: the tasks by name")
    build_instructions: BuildInstructionsSettings = BuildInstructionsSettings()
    instructions: InstructionSettings = InstructionSettings()
    prompts: PromptsConfig | None = Field(None, description="method `prompts`")
    soup: SoupConfig = SoupConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    distill: DistillConfig = DistillConfig()
    explain: ExplainConfig = ExplainConfig()


class AdaptConfig(Config):
    """The whole of an adaptation's settings."""

    data: AdaptDataConfig = AdaptDataConfig()
    train: TrainConfig | None = Field(None, description="for the methods that train")
    adapt: AdaptSection
