"""The model card: what the model is, how it was trained, what it scores, and how to load it."""

from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCardData

from mmscale.config import Config
from mmscale.model.configuration_mmscale import MMScaleConfig

_METRICS = {
    "zeroshot_top1": ("zero-shot-image-classification", "Zero-shot classification", "accuracy", "Top-1 accuracy"),
    "zeroshot_top5": ("zero-shot-image-classification", "Zero-shot classification", "accuracy", "Top-5 accuracy"),
    "zeroshot_mean_per_class": (
        "zero-shot-image-classification",
        "Zero-shot classification",
        "accuracy",
        "Mean accuracy per class",
    ),
    "retrieval_image_to_text_r1": ("image-text-retrieval", "Image-text retrieval", "recall", "Image to text R@1"),
    "retrieval_image_to_text_r5": ("image-text-retrieval", "Image-text retrieval", "recall", "Image to text R@5"),
    "retrieval_image_to_text_r10": ("image-text-retrieval", "Image-text retrieval", "recall", "Image to text R@10"),
    "retrieval_text_to_image_r1": ("image-text-retrieval", "Image-text retrieval", "recall", "Text to image R@1"),
    "retrieval_text_to_image_r5": ("image-text-retrieval", "Image-text retrieval", "recall", "Text to image R@5"),
    "retrieval_text_to_image_r10": ("image-text-retrieval", "Image-text retrieval", "recall", "Text to image R@10"),
    "caption_exact_match": ("image-to-text", "Image captioning", "exact_match", "Caption exact match"),
}


@dataclass(frozen=True)
class CardFacts:
    """What the card tells beyond the configurations.

    Attributes:
        name: of the model, as the folder is called.
        num_parameters: of the whole model.
        dtype: of the weights, `fp32`, `bf16`, `fp16` or `int8`.
        samples, step: how far the training had come.
        license: as the Hub spells it (`apache-2.0`, `cc-by-4.0`, ...); left out when unknown.
        data: what the model was trained on, in the user's words.
        scores: of `mmscale eval`; `scored_on` says on what.
    """

    name: str
    num_parameters: int
    dtype: str
    samples: int
    step: int
    license: str | None = None
    data: str | None = None
    scores: Mapping[str, float] | None = None
    scored_on: str = "a held-out split"


def model_card(model: MMScaleConfig, run: Config | None, facts: CardFacts) -> str:
    """The text of `README.md`: the Hub's metadata (with `model-index` when there are scores) and a page of Markdown.

    run: what the model was trained with; the card is silent about it when None.
    """
    parts = [f"---\n{_metadata(model, facts)}\n---\n", f"# {facts.name}\n", _introduction(model, facts)]
    if run is not None:
        parts.append(_training(run, facts))
    if known := _known_scores(facts):
        parts.append(_score_table(known, facts))
    parts.append(_usage(model, facts))
    return "\n".join(parts)


def _metadata(model: MMScaleConfig, facts: CardFacts) -> str:
    captions = bool(model.decoder_config.layers)
    results = [
        EvalResult(
            task_type=task,
            task_name=task_name,
            dataset_type="held-out",
            dataset_name=facts.scored_on,
            metric_type=metric,
            metric_name=label,
            metric_value=round(value, 6),
        )
        for (task, task_name, metric, label), value in _known_scores(facts)
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-to-text" if captions else "zero-shot-image-classification",
        tags=["mmscale", "image-text", "contrastive", *(["image-captioning", "coca"] if captions else ["clip"])],
        license=facts.license,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _introduction(model: MMScaleConfig, facts: CardFacts) -> str:
    captions = model.decoder_config.layers
    what = "embeds pictures and texts in one space and writes captions" if captions else "embeds pictures and texts"
    vision, text = model.vision_config, model.text_config
    kind = "contrastive captioner (CoCa)" if captions else "dual encoder (CLIP)"
    return (
        f"A {kind} that {what}, trained with mmscale.\n\n"
        "| | |\n|---|---|\n"
        f"| Parameters | {facts.num_parameters:,} ({facts.dtype}) |\n"
        f"| Pictures | {vision.image_size} x {vision.image_size}, patches of {vision.patch_size} |\n"
        f"| Image tower | {vision.layers} layers, {vision.width} wide, {vision.heads} heads |\n"
        f"| Text tower | {text.layers} layers, {text.width} wide, {text.heads} heads, {text.context_length} tokens |\n"
        f"| Decoder | {captions} layers |\n"
        f"| Embedding | {model.embed_dim} |\n"
        f"| Vocabulary | {model.vocab_size} pieces (SentencePiece unigram, byte fallback) |\n"
    )


def _training(run: Config, facts: CardFacts) -> str:
    rows = {
        "Data": facts.data or "not stated",
        "Samples seen": f"{facts.samples:,} of {run.train.samples:,}",
        "Steps": f"{facts.step:,}",
        "Global batch": f"{run.train.global_batch:,}",
        "Objective": f"{run.objective.contrastive} x {run.objective.contrastive_weight:g}"
        f" + captioning x {run.objective.caption_weight:g}",
        "Optimizer": f"AdamW, betas {run.optim.betas}, decay {run.optim.weight_decay:g}",
        "Learning rate": f"{run.optim.lr:g}",
        "Schedule": f"warm-up over {run.optim.warmup_samples:,} samples, then cosine",
        "Precision": run.train.precision,
        "Seed": str(run.run.seed),
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    return f"## Training\n\n| | |\n|---|---|\n{table}\n"


def _score_table(known: list[tuple[tuple, float]], facts: CardFacts) -> str:
    rows = "\n".join(f"| {task_name} | {label} | {value:.1%} |" for (_, task_name, _, label), value in known)
    return f"## Scores\n\nOn {_cell(facts.scored_on)}:\n\n| task | metric | value |\n|---|---|---|\n{rows}\n"


def _usage(model: MMScaleConfig, facts: CardFacts) -> str:
    caption = (
        """
tokens = model.generate(pixel_values=inputs["pixel_values"])
print(processor.batch_decode(tokens, skip_special_tokens=True))
"""
        if model.decoder_config.layers
        else ""
    )
    return f"""## How to load it

Needs `torch`, `transformers` and `pillow`. The model's code comes with the weights, so Transformers asks for your
trust.

```python
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{facts.name}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{facts.name}", trust_remote_code=True)
inputs = processor(images=[Image.open("picture.jpg")], text=["a red circle", "a blue square"], padding=True,
                   return_tensors="pt")
images = model.get_image_features(inputs["pixel_values"])
texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
print(images @ texts.T)  # cosine similarities
{caption}```

## Limits

The model repeats what its training data holds, biases and mistakes included. Test it on your own task before relying
on it.
"""


def _known_scores(facts: CardFacts) -> list[tuple[tuple, float]]:
    return [(_METRICS[name], value) for name, value in (facts.scores or {}).items() if name in _METRICS]


def _cell(text: str) -> str:
    """Text that stays inside its table cell and is not taken for markup."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
