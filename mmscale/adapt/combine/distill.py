"""Method `distill`: a smaller model learns what a teacher answers.

    embeddings   1 - cosine of the student's and the teacher's embedding, of pictures and of texts
    contrastive  divergence of the matching distributions: softmax over a bank of texts for a picture, and over a bank
                 of pictures for a text. The bank holds the teacher's embeddings of the first training samples, so that
                 a row's loss depends on nothing else in its batch (the interactive loss of CLIP-KD,
                 https://arxiv.org/abs/2307.12732, with fixed anchors)
    captions     divergence of the next-word distributions (https://arxiv.org/abs/1503.02531), and the cross entropy of
                 the captions themselves

The teacher is no part of what is trained: it is held outside the model, in evaluation mode, and is neither saved nor
sharded. The student takes over its tokenizer, picture size, context length, embedding size and logit scale.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.adapt.base import model_config
from mmscale.adapt.combine.settings import DistillConfig
from mmscale.adapt.combine.sources import evaluate, print_scores, write_report
from mmscale.adapt.config import AdaptConfig
from mmscale.adapt.objective import AdaptationTask, Encoded, masked_sum
from mmscale.adapt.tuning import tune
from mmscale.data.batches import LabelledBatch
from mmscale.data.loader import EvalSet
from mmscale.data.sources import train_shards
from mmscale.data.tokenizer import Tokenizer
from mmscale.errors import UserError
from mmscale.evaluate.encoding import model_device
from mmscale.evaluate.ranks import rank_and_world_size
from mmscale.evaluate.run import run_evaluation
from mmscale.evaluate.splits import WHOLE, open_split
from mmscale.export.initial import take_initial_weights
from mmscale.model.modeling_mmscale import MMScaleModel
from mmscale.model.presets import build_model
from mmscale.objectives.captioning import count_predicted, predicted_tokens
from mmscale.pretrained import EXPORTED_TOKENIZER, Pretrained, load_pretrained
from mmscale.train.optimizer import freeze


def distill(config: AdaptConfig) -> int:
    """Trains the student in `run.dir`, and reports it beside its teacher on `data.test`. Returns the trainer's code."""
    settings = config.adapt.distill
    if settings.teacher is None:
        raise UserError("adapt.distill.teacher: is required: the run, checkpoint or exported folder to learn from")
    teacher = load_pretrained(settings.teacher, device="cpu")
    config = with_teacher_settings(config, teacher)

    def student(config: AdaptConfig, tokenizer: Tokenizer) -> MMScaleModel:
        return build_student(config, tokenizer, teacher.model)

    def make_tasks(model: MMScaleModel, tokenizer: Tokenizer) -> Sequence[AdaptationTask]:
        return distillation_tasks(config, Teacher(teacher, config), tokenizer)

    code = tune(config, make_tasks, student)
    if code == 0 and config.data.test is not None:
        _report(config, teacher)
    return code


def with_teacher_settings(config: AdaptConfig, teacher: Pretrained) -> AdaptConfig:
    """The configuration with what the student takes over from the teacher. Raises UserError where it says otherwise."""
    sizes, raw = teacher.model.config, config.model_dump(mode="json")
    taken = {
        "vision.image_size": sizes.vision_config.image_size,
        "text.context_length": sizes.text_config.context_length,
        "embed_dim": sizes.embed_dim,
    }
    for key, value in taken.items():
        *section, leaf = key.split(".")
        place = raw["model"][section[0]] if section else raw["model"]
        if place[leaf] not in (None, value):
            raise UserError(f"model.{key}: {place[leaf]}, but the teacher's is {value}; leave it out")
        place[leaf] = value
    exported = teacher.path / EXPORTED_TOKENIZER
    raw["tokenizer"]["path"] = str(exported if exported.exists() else teacher.tokenizer.path)
    raw["objective"]["contrastive"] = "clip" if sizes.logit_bias_init is None else "siglip"
    return AdaptConfig.model_validate(raw)


def build_student(config: AdaptConfig, tokenizer: Tokenizer, teacher: MMScaleModel) -> MMScaleModel:
    """A fresh model of the sizes in `model`; what no loss trains is frozen. Raises UserError."""
    settings = config.adapt.distill
    matching, captions = settings.embeddings + settings.contrastive > 0, settings.captions + settings.hard_captions > 0
    if not (matching or captions):
        raise UserError("adapt.distill: all weights are 0: there is nothing to learn")
    torch.manual_seed(config.run.seed)
    try:
        model = build_model(model_config(config, tokenizer), config.model.checkpoint, config.model.compile)
    except ValueError as error:
        raise UserError(str(error)) from None
    if captions and (model.decoder is None or (settings.captions and teacher.decoder is None)):
        who = "student" if model.decoder is None else "teacher"
        raise UserError(f"adapt.distill: the {who} has no decoder; set captions (and hard_captions) to 0")
    take_initial_weights(model, config.model)
    model.logit_scale.load_state_dict(teacher.logit_scale.state_dict())
    unused = [model.logit_scale]
    if not captions and model.decoder is not None:
        unused.append(model.decoder)
    if not matching:
        unused += [model.vision.projection, model.text.norm_final, model.text.projection]
        model.text.cls_token.requires_grad_(False)
    for part in unused:
        part.requires_grad_(False)
    freeze(model, config.train.freeze)
    return model


class Teacher:
    """What the teacher says about a micro-batch, worked out once for all tasks; and its bank of embeddings."""

    def __init__(self, teacher: Pretrained, config: AdaptConfig):
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        self.model = teacher.model.eval().requires_grad_(False).to(device)
        self._batch: Encoded | None = None
        self._answer: Encoded | None = None
        self.bank_images, self.bank_texts = self._embed_bank(teacher, config)

    def on(self, batch: Encoded) -> Encoded:
        """The micro-batch through the teacher."""
        if batch is not self._batch:
            self._batch = batch
            self._answer = Encoded(self.model, batch.pixel_values, batch.input_ids, batch.lengths)
        return self._answer

    @torch.no_grad()
    def _embed_bank(self, teacher: Pretrained, config: AdaptConfig) -> tuple[Tensor, Tensor]:
        """[bank, embed_dim] of pictures and of texts, the same on every rank."""
        split = open_split(
            [path for group in train_shards(config.data)[0] for path in group],
            teacher.model,
            teacher.tokenizer,
            config.data,
            batch_size=config.eval.batch,
            limit=config.adapt.distill.bank,
            ranks=WHOLE,
        )
        images, texts, device = [], [], model_device(self.model)
        for batch in split:
            encoded, valid = Encoded.of(self.model, batch), batch.valid.to(device)
            images.append(encoded.image_embeds[valid].float())
            texts.append(encoded.text_embeds[valid].float())
        return torch.cat(images), torch.cat(texts)


class _Distillation:
    """What the tasks have in common. The one that `leads` scores the student, for all of them."""

    name: str

    def __init__(self, weight: float, settings: DistillConfig, teacher: Teacher):
        self.weight, self.settings, self.teacher = weight, settings, teacher
        self.leads: tuple[Tokenizer, AdaptConfig] | None = None

    def prepare(self, batch: LabelledBatch) -> dict[str, Tensor]:
        return {"count": batch.valid.sum(), "valid": batch.valid}

    def evaluate(self, model: MMScaleModel, split: EvalSet) -> dict[str, float]:
        if self.leads is None:
            return {}
        tokenizer, config = self.leads
        return run_evaluation(model, tokenizer, split, config=config.eval).scores


class EmbeddingDistillation(_Distillation):
    name = "embeddings"

    def loss_sum(self, model: MMScaleModel, encoded: Encoded, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            answer = self.teacher.on(encoded)
            image, text = answer.image_embeds, answer.text_embeds
        cosines = (encoded.image_embeds * image).sum(1) + (encoded.text_embeds * text).sum(1)
        return masked_sum(1 - cosines.float() / 2, inputs["valid"])


class ContrastiveDistillation(_Distillation):
    name = "contrastive"

    def loss_sum(self, model: MMScaleModel, encoded: Encoded, inputs: dict[str, Tensor]) -> Tensor:
        parts = {"image_embeds": self.teacher.bank_texts, "text_embeds": self.teacher.bank_images}
        with torch.no_grad():
            answer = self.teacher.on(encoded)
            wanted = {part: getattr(answer, part) for part in parts}
            scale = self.teacher.model.logit_scale()[0] / self.settings.temperature
        found = {part: getattr(encoded, part) for part in parts}
        with torch.autocast(scale.device.type, enabled=False):
            anchors = {part: scale * bank.T for part, bank in parts.items()}
            divergence = sum(
                _divergence(wanted[part].float() @ anchors[part], found[part].float() @ anchors[part]) for part in parts
            )
        return masked_sum(divergence / 2, inputs["valid"]) * self.settings.temperature**2


class CaptionDistillation(_Distillation):
    """Its weights are within the loss, which is a sum over words."""

    name = "captions"

    def prepare(self, batch: LabelledBatch) -> dict[str, Tensor]:
        return {"count": count_predicted(batch.lengths, batch.valid), "valid": batch.valid}

    def loss_sum(self, model: MMScaleModel, encoded: Encoded, inputs: dict[str, Tensor]) -> Tensor:
        length, temperature = encoded.input_ids.shape[1], self.settings.temperature
        wanted = predicted_tokens(encoded.lengths, inputs["valid"], length)
        logits = self._logits(model, encoded, wanted)
        labels = encoded.input_ids[:, 1:][wanted]
        loss = self.settings.hard_captions * F.cross_entropy(logits, labels, reduction="sum")
        if self.settings.captions:
            with torch.no_grad():
                answer = self._logits(self.teacher.model, self.teacher.on(encoded), wanted)
            divergence = _divergence(answer / temperature, logits / temperature).sum()
            loss = loss + self.settings.captions * temperature**2 * divergence
        return loss

    @staticmethod
    def _logits(model: MMScaleModel, encoded: Encoded, wanted: Tensor) -> Tensor:
        """[words, vocabulary] in fp32, for the words in `wanted` [batch, length - 1]."""
        states = model.decode(encoded.text_tokens[:, :-1], encoded.image_tokens)
        return model.decoder.head(states[wanted]).float()


def distillation_tasks(config: AdaptConfig, teacher: Teacher, tokenizer: Tokenizer) -> list[_Distillation]:
    """The tasks whose weights are not 0."""
    settings = config.adapt.distill
    tasks: list[_Distillation] = [
        EmbeddingDistillation(settings.embeddings, settings, teacher),
        ContrastiveDistillation(settings.contrastive, settings, teacher),
        CaptionDistillation(float(settings.captions + settings.hard_captions > 0), settings, teacher),
    ]
    tasks = [task for task in tasks if task.weight]
    tasks[0].leads = tokenizer, config
    return tasks


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(found)) of every row, of logits [rows, candidates]."""
    return F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def _report(config: AdaptConfig, teacher: Pretrained) -> None:
    student = load_pretrained(config.run.dir, device=model_device(teacher.model))
    models = {"teacher": teacher, "student": student}
    scores = {name: evaluate(config, model, config.data.test, "data.test") for name, model in models.items()}
    parameters = {name: sum(p.numel() for p in model.model.parameters()) for name, model in models.items()}
    if rank_and_world_size()[0] == 0:
        share = parameters["student"] / parameters["teacher"]
        print_scores(f"a student of {share:.1%} of the teacher's parameters, on data.test", scores)
        report = {"teacher": str(teacher.path), "parameters": parameters, "share": share, "test": scores}
        write_report(Path(config.run.dir), report)
