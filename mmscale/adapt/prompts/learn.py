"""The kinds that train: context vectors, decoder prefixes, image tokens, guided pooling; on pretraining's trainer."""

from collections.abc import Sequence
from typing import Any

import torch

from mmscale.adapt.base import adapted_model, complete, load_base
from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.prompts.calibration import calibration_table
from mmscale.adapt.prompts.classes import Classes, find_classes
from mmscale.adapt.prompts.pictures import encode_content_free, encode_splits
from mmscale.adapt.prompts.settings import PromptsConfig
from mmscale.adapt.prompts.shots import Shot, ShotStream, draw_shots, encode_shots
from mmscale.adapt.prompts.soft import ContextTask, Guide, GuideTask, ImagePromptTask, PrefixTask, encode_guided
from mmscale.adapt.tuning import BuildModel, open_split, tune
from mmscale.config import ClassPromptsConfig, PromptParts
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.zeroshot import read_templates
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.pretrained import load_pretrained


def learn_classes(config: AdaptConfig, settings: PromptsConfig) -> tuple[int, dict[str, Any] | None]:
    """Kinds `context`, `prefix` and `image`: classes told apart by a few trained vectors.

    Returns:
        The trainer's exit code, and the report when it is 0: under `scores`, as they are and with each kind of
        calibration.
    """
    config = complete(config, load_base(config))
    classes = find_classes(config, settings.label, settings.classes, "adapt.prompts")
    config = _with_parts(config, _parts(settings, classes, Tokenizer.load(config.tokenizer.path)))

    drawn: list[Shot] = []

    def shots(model: MMScaleModel, tokenizer: Tokenizer) -> list[Shot]:
        if not drawn:
            sizes = model.config.vision_config.image_size, model.config.text_config.context_length
            drawn.extend(draw_shots(config, tokenizer, classes, *sizes))
        return drawn

    def make_tasks(model: MMScaleModel, tokenizer: Tokenizer) -> Sequence[ContextTask | ImagePromptTask | PrefixTask]:
        if settings.kind == "context":
            frozen = not any(parameter.requires_grad for parameter in model.vision.parameters())
            if settings.shots is None or not frozen:
                return [ContextTask(classes)]
            embeds = encode_shots(model, shots(model, tokenizer), classes).image_embeds
            return [ContextTask(classes, dict(zip((shot.key for shot in drawn), embeds, strict=True)))]
        templates = read_templates(settings.templates)
        if settings.kind == "image":
            return [ImagePromptTask(classes, model, tokenizer, templates)]
        return [PrefixTask(classes, tokenizer, templates[0], model.config.text_config.context_length)]

    def make_stream(
        config: AdaptConfig, model: MMScaleModel, tokenizer: Tokenizer, share: dict[str, int]
    ) -> ShotStream:
        context_length = model.config.text_config.context_length
        of_text = {"pad_id": tokenizer.pad_id, "context_length": context_length}
        return ShotStream(shots(model, tokenizer), **of_text, seed=config.run.seed, **share)

    code = tune(config, make_tasks, _build_model(settings), make_stream if settings.shots else None)
    if code:
        return code, None
    chosen = load_pretrained(config.run.dir)
    (task,) = make_tasks(chosen.model, chosen.tokenizer)
    splits = encode_splits(config, chosen, classes, task.needs_tokens)
    empty = encode_content_free(config, chosen, task.needs_tokens)
    last = list(splits)[-1]
    dev, content_free, test = (task.scores(chosen.model, pictures) for pictures in (splits["dev"], empty, splits[last]))
    table = calibration_table(dev, splits["dev"].targets, content_free, test, splits[last].targets)
    return code, {"classes": classes.names, "checkpoint": chosen.path.name, "scored_on": last, "scores": table}


def learn_guides(config: AdaptConfig, settings: PromptsConfig) -> tuple[int, dict[str, Any] | None]:
    """Kind `guide`: texts that condition the pooling; as `learn_classes`, see `GuideTask.report` for the scores."""
    guides = [
        Guide(guide.text, find_classes(config, guide.label, guide.classes, f"adapt.prompts.guides[{number}]"))
        for number, guide in enumerate(settings.guides)
    ]
    config = _with_parts(complete(config, load_base(config)), PromptParts(guided_pooling=True))

    def make_tasks(model: MMScaleModel, tokenizer: Tokenizer) -> list[GuideTask]:
        return [GuideTask(guides, model, tokenizer, settings.temperature)]

    code = tune(config, make_tasks)
    if code:
        return code, None
    chosen = load_pretrained(config.run.dir)
    (task,) = make_tasks(chosen.model, chosen.tokenizer)
    parts = {"train": (config.data.train, settings.sample), "judged": (config.data.test or config.data.val, None)}
    known, judged = (
        encode_guided(
            chosen.model, open_split(config, chosen.model, chosen.tokenizer, paths, limit), guides, task.embeds
        )
        for paths, limit in parts.values()
    )
    last = "test" if config.data.test is not None else "dev"
    return code, {"checkpoint": chosen.path.name, "scored_on": last, "scores": task.report(known, judged)}


def _parts(settings: PromptsConfig, classes: Classes, tokenizer: Tokenizer) -> PromptParts:
    """What the model gets for this kind."""
    if settings.kind == "image":
        return PromptParts(image_tokens=settings.tokens, image_depth=settings.depth)
    if settings.kind == "prefix":
        return PromptParts(prefix_tokens=settings.tokens)
    token_ids = [tokenizer.encode(word, 1 << 16)[1:-1] for word in classes.first_words]
    return PromptParts(
        classes=ClassPromptsConfig(
            names=classes.names, token_ids=token_ids, context_tokens=settings.tokens, kind=settings.context
        )
    )


def _with_parts(config: AdaptConfig, parts: PromptParts) -> AdaptConfig:
    """Prompts that the model gets; unless something else is chosen they alone are trained."""
    config = config.model_copy(deep=True)
    config.model.prompts = parts
    if config.adapt.trainable is None and config.adapt.top_blocks is None and config.model.lora is None:
        config.adapt.trainable = ["new"]
    return config


def _build_model(settings: PromptsConfig) -> BuildModel:
    """The model on every rank; context vectors start from the words of `init`."""

    def build(config: AdaptConfig, tokenizer: Tokenizer) -> MMScaleModel:
        model = adapted_model(config, load_base(config), tokenizer)
        if settings.kind == "context" and settings.init:
            ids = tokenizer.encode(settings.init, 1 << 16)[1:-1]
            if len(ids) > settings.tokens:
                raise UserError(f"adapt.prompts.init: has {len(ids)} tokens; set adapt.prompts.tokens to as many")
            with torch.no_grad():
                model.class_prompts.context[:, -len(ids) :] = model.text.tokens.weight[ids]
        return model

    return build
