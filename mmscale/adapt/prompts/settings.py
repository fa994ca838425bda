"""Settings of method `prompts`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmscale.config import NonNegativeInt, Paths, PositiveInt, Section


class GuideConfig(Section):
    """One guide of kind `guide`: a text, and what is to be read from the image embedding under it."""

    text: str = Field(description='what is asked about, such as "the colour"')
    label: str = Field(description="JMESPath of the answer in a sample's JSON")
    classes: list[str] | dict[str, Paths] | None = Field(None, description="as `classes` of the section")


class PromptsConfig(Section):
    """Prompts that are searched among words, or learned as vectors."""

    kind: Literal["words", "triggers", "context", "prefix", "image", "guide"] = Field(
        "words",
        description="words: templates, label words, calibration; triggers: tokens searched by gradient; context: "
        "vectors before class names; prefix: keys and values in the decoder; image: tokens beside the patches; guide: "
        "texts that steer the image embedding",
    )
    label: str | None = Field(None, description="JMESPath of the class in a sample's JSON: `class_name`")
    classes: list[str] | dict[str, Paths] | None = Field(
        None, description="names, or name: word (or several, the first by hand); those found in data.train when unset"
    )
    templates: Paths = Field(
        ["a {}"], description="by hand: a file with one a line, or a list; `{}` for the class word"
    )
    scorer: Literal["contrastive", "caption"] = Field(
        "contrastive", description="compare embeddings, or let the decoder judge how likely the sentence is"
    )
    shots: PositiveInt | None = Field(
        None, description="examples of each class to learn from; all of data.train when unset"
    )

    # words
    from_captions: NonNegativeInt = Field(50, description="candidates: most frequent captions with the class cut out")
    written_by: Literal["people", "model"] = Field("people", description="whose captions of the training pictures")
    recombined: NonNegativeInt = Field(100, description="candidates: put together from others")
    ensemble: PositiveInt = Field(4, description="most templates whose embeddings are averaged")
    vocabulary: bool = Field(False, description="try every word of the tokenizer as a label word, too")
    sample: PositiveInt = Field(1024, description="training pictures that candidates are drawn from")

    # triggers
    triggers: PositiveInt = Field(4, description="tokens before the class word")
    candidates: PositiveInt = Field(16, description="tokens that are tried in each round")
    rounds: PositiveInt = 40

    # context, prefix, image
    tokens: PositiveInt = Field(4, description="learned vectors")
    init: str = Field("", description="context: words whose embeddings the vectors start from; random when empty")
    context: Literal["unified", "class", "image"] = Field(
        "unified", description="one context for all classes, one for each, or one that the picture shifts"
    )
    depth: Literal["shallow", "deep"] = Field("deep", description="image: before the first block, or before each")

    guides: list[GuideConfig] = Field([], description="guide: what is asked about")
    temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="guide: of the loss; the model's own when unset"
    )

    @model_validator(mode="after")
    def _says_what_to_learn(self) -> "PromptsConfig":
        if self.kind == "guide" and len(self.guides) < 2:
            raise ValueError("kind guide needs at least two `guides`, or there is nothing to tell apart")
        if self.kind != "guide" and self.label is None:
            raise ValueError(f"kind {self.kind} needs `label`: where a sample's class is, such as class_name")
        return self
