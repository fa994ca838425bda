"""Settings of the method `explain`."""

from pydantic import Field

from mmscale.config import NonNegativeInt, PositiveInt, Section


class ExplainConfig(Section):
    """Method `explain`: pictures with what mattered in them, and a pointing game where it is known what is where."""

    pictures: list[str] | None = Field(None, description="files, folders, URLs or shards to explain; data.val if unset")
    samples: PositiveInt = Field(16, description="of these, the first so many are shown")
    nearest: NonNegativeInt = Field(4, description="training examples beside each; from data.train, 0 for none")
    window: PositiveInt = Field(1, description="patches, each way, that are covered together")
    batch: PositiveInt = Field(64, description="covered pictures of a forward pass")
    object_name: str = Field("shape", description="key of an object's name, in the `objects` of a sample's JSON")
