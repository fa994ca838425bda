"""Settings of the methods `soup`, `ensemble`, `quantize` and `distill`."""

from typing import Annotated, Literal

from pydantic import Field

from mmscale.config import PositiveInt, Section

RETRIEVAL = ["retrieval_image_to_text_r1", "retrieval_text_to_image_r1"]
Weight = Annotated[float, Field(ge=0)]


class SoupConfig(Section):
    """Method `soup`: the mean of the weights of models that were tuned from the same pretrained one."""

    models: list[str] = Field([], description="runs, checkpoints or exported folders, at least two")
    recipe: Literal["greedy", "uniform"] = Field("greedy", description="those that help on data.val, or all of them")
    score: list[str] = Field(RETRIEVAL, description="of `mmscale eval`; the mean of these on data.val is what counts")


class EnsembleConfig(Section):
    """Method `ensemble`: similarities of several models added up, with weights chosen on data.val."""

    models: list[str] = Field([], description="runs, checkpoints or exported folders, at least two, of any sizes")
    score: list[str] = Field(RETRIEVAL, description="retrieval and zero-shot scores; the mean of these on data.val")
    rounds: PositiveInt = Field(20, description="models that are added one by one, the same one again if it helps")


class QuantizeConfig(Section):
    """Method `quantize`: an exported folder with 8-bit weights."""

    batch: PositiveInt = Field(32, description="pictures of a forward pass whose time is measured")
    repeats: PositiveInt = Field(20, description="such passes, in turn with the two models")


class DistillConfig(Section):
    """Method `distill`: a smaller model, whose sizes are in `model`, learns what a teacher answers."""

    teacher: str | None = Field(None, description="run, checkpoint or exported folder; its tokenizer is taken over")
    embeddings: Weight = Field(1.0, description="weight of the distance to the teacher's embeddings")
    contrastive: Weight = Field(1.0, description="weight of the divergence from the teacher's matching scores")
    captions: Weight = Field(1.0, description="weight of the divergence from the teacher's next-word logits")
    hard_captions: Weight = Field(1.0, description="weight of the captioning loss on the captions themselves")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="both models' logits are divided by this")
    bank: PositiveInt = Field(1024, description="training samples that matching scores are taken over")
