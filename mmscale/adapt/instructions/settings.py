"""The settings of building instructions and of tuning on them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmscale.config import Fraction, NonNegativeInt, PositiveInt, Section


class FactSettings(Section):
    """What is read from the samples of the shards."""

    kinds: list[Literal["captions", "classes", "questions", "objects", "fields", "facts", "instructions"]] = Field(
        ["captions", "classes", "questions", "objects", "facts", "instructions"],
        description="`instructions` keeps those that the shards hold already",
    )
    noun: str = Field("name", description="key of an entry of `objects` that says what it is")
    attributes: dict[str, str] = Field({}, description="its other keys, and the words for them: {color: colour}")
    fields: dict[str, str] = Field({}, description="fields of the JSON to ask for, and the words for them")
    per_task: PositiveInt = Field(3, description="facts of a sample and task, at most")
    per_task_of: dict[str, NonNegativeInt] = Field({}, description="other numbers for some tasks: {relation: 6}")


class CleaningSettings(Section):
    """What is removed."""

    min_words: NonNegativeInt = Field(1, description="of an instruction with its input")
    max_words: PositiveInt = 64
    max_response_words: PositiveInt = 64
    near_duplicate: Fraction = Field(
        0.9, description="likeness from which two instructions of a picture are one; 1: equal"
    )
    scripts: list[str] = Field(["LATIN"], description="as Unicode names them; other letters make another language")
    min_script: Fraction = Field(0.9, description="share of the letters that must be of these scripts")
    open_tasks: list[str] = Field(["describe"], description="tasks with more than one right response")


class BuildInstructionsSettings(Section):
    """From shards to shards of instructions."""

    facts: FactSettings = FactSettings()
    phrasings: str | None = Field(None, description="YAML file, put task by task over the built-in phrasings")
    per_meaning: PositiveInt = Field(2, description="phrasings of each fact in the training split")
    cleaning: CleaningSettings = CleaningSettings()
    clusters: PositiveInt | None = Field(None, description="a folder of shards for each of so many; one when unset")
    vocab_size: PositiveInt | None = Field(
        None, description="trains run.dir/tokenizer.model of so many pieces on the captions and the instructions"
    )
    shard_size: PositiveInt = 1000


class InstructionSettings(Section):
    """Tuning on instructions."""

    prompt: str = Field("question: {} answer:", description="`{}` for the instruction and its input")
    per_picture: PositiveInt = Field(4, description="meanings drawn of each picture, each time it comes up")
    per_meaning: Literal[1, 2] = Field(2, description="phrasings of each of these; two of them can be aligned")
    answer_batch: PositiveInt = Field(256, description="questions that are answered together when scored")
    align: Annotated[float, Field(ge=0)] = Field(0.0, description="lambda, the weight of the alignment loss")
    align_on: Literal["embedding", "state"] = Field(
        "embedding", description="what is aligned: the text embedding, or the state that the response goes on from"
    )

    @model_validator(mode="after")
    def _pairs_to_align(self) -> "InstructionSettings":
        if self.align and self.per_meaning < 2:
            raise ValueError("align needs per_meaning: 2, pairs of phrasings")
        return self
