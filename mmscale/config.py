"""The configuration: one YAML file, typed sections, and `key.sub=value` overrides from the command line.

Durations are counted in samples, so that a schedule means the same on any number of GPUs.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmscale.errors import UserError

Paths = str | list[str]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)


class RunConfig(Section):
    """Where a run lives, its seed, and when it is saved."""

    dir: str
    seed: NonNegativeInt = 0
    save_every: PositiveInt | None = Field(None, description="samples between checkpoints; at the end only when unset")
    keep_last: PositiveInt = Field(3, description="whole checkpoints that are kept")
    keep_every: PositiveInt | None = Field(None, description="samples; the first checkpoint past each multiple stays")
    on_save_error: Literal["warn", "stop"] = Field("warn", description="whether training outlives a save that failed")
    max_minutes: Annotated[float, Field(gt=0)] | None = Field(None, description="then save and leave with code 75")
    hang_s: Annotated[float, Field(gt=0)] = Field(600.0, description="without a step for so long, the job is ended")
    deterministic: bool = Field(False, description="deterministic GPU kernels: slower, resumes bit for bit")


class SourceConfig(Section):
    """One of several data sets that are mixed."""

    shards: Paths
    weight: Annotated[float, Field(gt=0)] = 1.0


class DataConfig(Section):
    """What is read, and how a sample becomes pixels and a caption."""

    train: Paths | None = Field(None, description="path, glob, braces, @list.txt or a list of these")
    val: Paths | None = None
    sources: list[SourceConfig] | None = Field(None, description="several weighted data sets, instead of `train`")
    mode: Literal["index", "stream"] = Field(
        "index", description="`stream` for sources that cannot be indexed: they resume only statistically"
    )
    allow_pipe: bool = Field(False, description="lets `pipe:` sources of mode `stream` run their shell command")
    shuffle_buffer: PositiveInt = Field(2000, description="samples that mode `stream` holds and draws from")
    workers: NonNegativeInt = Field(2, description="loader threads or processes of each rank; 0 reads in the step loop")
    lanes: PositiveInt = Field(64, description="interleaved reading positions; part of the stream's fingerprint")
    block: PositiveInt = Field(1024, description="samples of a lane that are permuted together")
    decode: Literal["exact", "fast"] = Field(
        "exact", description="`fast`: JPEGs at the smallest size that will do, resized bilinearly; half the CPU time"
    )
    image_key: str = Field("jpg;jpeg;png;webp", description="member names that hold the picture, by preference")
    text_key: Paths = Field("txt", description="member with the caption: `txt`, `json.caption`, or a list to draw from")
    crop_scale: tuple[Fraction, Fraction] = Field((0.9, 1.0), description="area of the random resized crop")
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = Field(False, description="mirror half of the pictures; wrong for captions that say left and right")
    max_pixels: PositiveInt = Field(100_000_000, description="a larger picture is a bad sample, never decoded")
    max_bad_fraction: Fraction = Field(0.01, description="the run stops when more samples than this are bad")
    max_caption_bytes: PositiveInt = Field(32_768, description="a longer caption is a bad sample")
    slow_sample_s: Annotated[float, Field(gt=0)] = Field(10.0, description="a sample that takes longer is named")
    on_damaged_shard: Literal["stop", "use_rest", "skip"] = Field(
        "stop", description="a damaged tar stops the run, gives its whole samples, or is left out"
    )
    allow_change: bool = Field(False, description="resume although the shards are not those of the checkpoint")
    counts: str | None = Field(
        None, description="manifest with each shard's number of samples, or `stats` for img2dataset's *_stats.json"
    )
    index_dir: str | None = Field(None, description="where sidecar indexes go when a shard's folder is read-only")
    cache_dir: str | None = Field(None, description="node-wide cache for remote shards")
    cache_gib: Annotated[float, Field(gt=0)] = Field(100.0, description="size of the cache; the least used leave it")

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> "DataConfig":
        if self.train is not None and self.sources is not None:
            raise ValueError("give either `train` or `sources`, not both")
        return self


class TokenizerConfig(Section):
    path: str | None = Field(None, description="a SentencePiece model, made by `mmscale tokenizer`")


class VisionSizes(Section):
    """Sizes of the image tower; what is unset comes from the preset."""

    image_size: PositiveInt | None = None
    patch_size: PositiveInt | None = None
    width: PositiveInt | None = None
    layers: PositiveInt | None = None
    heads: PositiveInt | None = None
    mlp_ratio: Annotated[float, Field(gt=0)] | None = None
    pooler_queries: PositiveInt | None = Field(None, description="query 0 is contrastive, the rest feed the decoder")
    pooler_heads: PositiveInt | None = None
    init_from: str | None = Field(None, description="Transformers folder with a CLIP or SigLIP trunk to start from")
    class_token: bool | None = Field(None, description="these five from `init_from`, else as in open_clip's CoCa")
    pre_norm: bool | None = None
    patch_bias: bool | None = None
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] | None = None
    layer_norm_eps: Annotated[float, Field(gt=0)] | None = None


class TextSizes(Section):
    """Sizes of the text tower; what is unset comes from the preset."""

    context_length: PositiveInt | None = Field(None, description="caption tokens, start and end marks included")
    width: PositiveInt | None = None
    layers: PositiveInt | None = None
    heads: PositiveInt | None = None
    mlp_ratio: Annotated[float, Field(gt=0)] | None = None


class DecoderSizes(Section):
    """Sizes of the multimodal decoder; 0 layers leave a CLIP model."""

    layers: NonNegativeInt | None = None
    heads: PositiveInt | None = None
    mlp_ratio: Annotated[float, Field(gt=0)] | None = None


class HeadConfig(Section):
    """A task head of the model; `mmscale adapt` fills in what it found in the data."""

    kind: Literal["classification", "multilabel", "regression", "matching"]
    fusion: Literal["image", "text", "concat", "gated", "cross_attention"] = "image"
    hidden: NonNegativeInt = Field(0, description="width of a hidden layer; 0 for a linear head")
    likelihood: bool = Field(False, description="sees how likely the text is as the picture's caption")
    labels: list[str] = Field([], description="the classes, in the order of the scores")
    mean: float = Field(0.0, description="of the numbers that are predicted: a score of 0")
    std: Annotated[float, Field(gt=0)] = Field(1.0, description="of these numbers: a score of 1")

    @property
    def outputs(self) -> int:
        return len(self.labels) if self.kind in ("classification", "multilabel") else 1


class LoraConfig(Section):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685) on the linear layers of these names."""

    rank: PositiveInt = 4
    alpha: Annotated[float, Field(gt=0)] = Field(8.0, description="the adapters' product is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: list[str] = ["qkv", "out", "query", "key_value"]


class ClassPromptsConfig(Section):
    """Learned context vectors before class names."""

    names: list[str]
    token_ids: list[list[int]] = Field(description="the pieces of each name's word")
    context_tokens: PositiveInt
    kind: Literal["unified", "class", "image"]


class PromptParts(Section):
    """Learned prompts of the model; `mmscale adapt` fills in what a task needs."""

    image_tokens: NonNegativeInt = Field(0, description="beside the patches")
    image_depth: Literal["shallow", "deep"] = "shallow"
    prefix_tokens: NonNegativeInt = Field(0, description="keys and values before the text in the decoder")
    guided_pooling: bool = Field(False, description="texts may steer the image embedding")
    classes: ClassPromptsConfig | None = None


class ModelConfig(Section):
    """The model: a preset, any size over it, and how it is computed."""

    preset: Literal["tiny", "b32", "b16", "l14", "g14"] = "tiny"
    embed_dim: PositiveInt | None = None
    vision: VisionSizes = VisionSizes()
    text: TextSizes = TextSizes()
    decoder: DecoderSizes = DecoderSizes()
    init_from: str | None = Field(None, description="start from: a checkpoint, an export folder, or open_clip:FILE")
    legacy_cls_mask: bool = Field(False, description="open_clip's off-by-one CLS mask, for weights trained with it")
    patch_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    patch_tokens: bool = Field(False, description="the decoder sees all patches, beside what is pooled of them")
    checkpoint: str = Field("none", description="activation checkpointing: none, full, or every_N")
    compile: bool = False
    heads: dict[str, HeadConfig] = Field({}, description="task heads by name; made by `mmscale adapt`")
    lora: LoraConfig | None = None
    prompts: PromptParts = Field(PromptParts(), description="learned prompts; made by `mmscale adapt`")


class ObjectiveConfig(Section):
    """The two losses and their weights."""

    contrastive: Literal["clip", "siglip"] = "clip"
    contrastive_weight: Annotated[float, Field(ge=0)] = 1.0
    caption_weight: Annotated[float, Field(ge=0)] = 2.0
    negatives: Literal["global", "micro"] = Field("global", description="whom a caption is told apart from")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of the captioning targets")
    z_loss: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of the squared log-partition, such as 1e-4")


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-3
    min_lr_fraction: Fraction = Field(0.0, description="of lr, where the cosine ends")
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    warmup_samples: NonNegativeInt = 0
    schedule: Literal["cosine", "constant", "wsd"] = Field(
        "cosine", description="wsd: constant, then a decay at the end"
    )
    decay_fraction: Fraction = Field(0.2, description="of the run, for the decay of `wsd`")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="of the rate, for each block further down"
    )
    unfreeze_every: PositiveInt | None = Field(
        None, description="samples after which the next block further down a tower begins to learn; at once when unset"
    )
    name: Literal["adamw", "muon"] = "adamw"
    muon_lr: Annotated[float, Field(gt=0)] = Field(0.02, description="peak rate of the matrices that Muon steps")
    muon_momentum: Fraction = 0.95


class TrainConfig(Section):
    samples: PositiveInt
    global_batch: PositiveInt
    micro_batch: PositiveInt | None = Field(None, description="per rank and pass; global_batch / ranks unless set")
    precision: Literal["fp32", "bf16", "bf16_params", "fp16"] = "fp32"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    grad_clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest gradient norm; 0 turns clipping off")
    freeze: list[str] = Field([], description="parts that are not trained: vision, text, decoder, ...")
    offload: Literal["none", "optimizer", "all"] = Field("none", description="to host memory; `all`: parameters too")
    grad_dtype: Literal["fp32", "bf16"] | None = Field(
        None, description="gradients are summed in; with bf16_params only"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="keeps averaged weights, too")
    max_skips: PositiveInt = Field(20, description="skipped updates in a row that end the run")
    skip_spikes: bool = Field(False, description="skip an update whose loss or gradient norm leaps out of the last 128")


class EvalConfig(Section):
    every: PositiveInt | None = Field(None, description="samples between evaluations in the loop; never when unset")
    tasks: list[Literal["zeroshot", "retrieval", "caption", "vqa"]] = ["zeroshot", "retrieval", "caption"]
    batch: PositiveInt = 64
    samples: PositiveInt | None = Field(None, description="of the val split, the first so many; all when unset")
    max_minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="an evaluation in the loop that takes longer is scored on what it has seen by then"
    )
    classnames: str | None = Field(None, description="text file, one name a line; from the shards' JSON when unset")
    templates: Paths | None = Field(None, description="text file, one a line, or a list; `{}` for the class name")
    distinct_pairs: PositiveInt | None = Field(
        None, description="retrieval among the first so many pairs that share no caption; among all pairs when unset"
    )
    all_captions: bool = Field(False, description="retrieval with every caption of a picture, not just the first")
    vqa_prompt: str = Field("question: {} answer:", description="what the answer goes on from; `{}` for the question")


class LogConfig(Section):
    every: PositiveInt = Field(10, description="optimizer steps between metrics lines")
    wandb: Literal["online", "offline", "off"] = "off"
    tensorboard: bool = Field(False, description="event files in run.dir/tensorboard")


class Config(Section):
    """The whole of a run's settings."""

    run: RunConfig
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    deepspeed: dict[str, Any] = Field({}, description="passed through to DeepSpeed's own config")

    def dump(self) -> str:
        """The resolved configuration as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: list[str] = (), schema: type[Section] = Config) -> Any:
    """Reads a YAML file, applies `key.sub=value` overrides and checks every key.

    Raises UserError naming the file, the key and, for an unknown key, the nearest valid one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file: {error}") from None
    try:
        raw = yaml.load(text, Loader=_ConfigLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected sections such as `run:` and `data:`, found {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    return validate(raw, schema, str(path))


def validate(raw: dict, schema: type[Section] = Config, where: str = "config") -> Any:
    """A plain dictionary as a typed configuration; `where` opens the error messages."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        # A misspelt key comes before what is missing because of it.
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise UserError("; ".join(_explain(detail, schema, where) for detail in details[:5])) from None


class _ConfigLoader(yaml.SafeLoader):
    """YAML's safe loader with two changes people expect: 4e-4 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_ConfigLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _apply(raw: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"`{override}`: an override is written key.sub=value, such as optim.lr=3e-4")
    node = raw
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if node is None or not isinstance(node, dict):
            raise UserError(f"`{override}`: `{'.'.join(parents[: depth + 1])}` is not a section")
    try:
        node[leaf] = yaml.load(value, Loader=_ConfigLoader)
    except yaml.YAMLError as error:
        raise UserError(f"`{override}`: the value is not valid YAML: {_one_line(error)}") from None


def _explain(detail: dict, schema: type[Section], where: str) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key `{key}`{_nearest(location, schema)}"
    if detail["type"] == "missing":
        return f"{where}: `{key}` is required"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{where}: `{key}`: {message} (found {detail['input']!r:.80})"


def _nearest(location: list[str], schema: type[Section]) -> str:
    """A hint that names the valid key nearest to an unknown one: in its own section first, then anywhere."""
    section: Any = schema
    for part in location[:-1]:
        if not part.isdigit():  # a place in a list, which is still of the section before it
            section = _section_of(section.model_fields[part].annotation)
    siblings = {name: ".".join([*location[:-1], name]) for name in section.model_fields}
    everywhere = {key.rpartition(".")[2]: key for key in all_keys(schema)}
    leaf = location[-1]
    for candidates in (siblings, everywhere):
        # A key that is a part of what was written (`lr` in `learning_rate`) is found by its initials.
        initials = "".join(word[0] for word in leaf.split("_") if word)
        match = initials if len(initials) > 1 and initials in candidates else None
        match = match or next(iter(difflib.get_close_matches(leaf, candidates, n=1)), None)
        if match:
            return f"; did you mean `{candidates[match]}`?"
    return f"; valid here: {', '.join(siblings)}"


def all_keys(schema: type[Section] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration, sections left out."""
    keys = []
    for name, field in schema.model_fields.items():
        section = _section_of(field.annotation)
        keys += all_keys(section, f"{prefix}{name}.") if section else [prefix + name]
    return keys


def _section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds: itself, optional, or as the items of a list; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_of(arg))), None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
