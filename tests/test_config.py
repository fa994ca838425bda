"""The configuration: what is read, what is refused, and in what words."""

from pathlib import Path

import pytest
import torch
import yaml

from mmscale.config import Config, all_keys, load_config
from mmscale.errors import UserError
from mmscale.model.presets import build_model, build_model_config

MINIMAL = {"run": {"dir": "runs/x"}, "train": {"samples": 1000, "global_batch": 8}}
CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/*.yaml"))


@pytest.fixture
def config_file(tmp_path):
    def write(text: str | dict) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return path

    return write


def test_overrides_win_over_the_file_and_are_typed(config_file):
    config = load_config(config_file(MINIMAL), ["optim.lr=3e-4", "train.samples=2000", "data.train=[a.tar, b.tar]"])
    assert (config.optim.lr, config.train.samples, config.data.train) == (3e-4, 2000, ["a.tar", "b.tar"])


def test_scientific_notation_without_a_point_is_a_number(config_file):
    assert (
        load_config(config_file("run: {dir: x}\ntrain: {samples: 10, global_batch: 2}\noptim: {lr: 5e-4}")).optim.lr
        == 5e-4
    )


def test_a_dumped_configuration_loads_as_the_same_one(config_file):
    config = load_config(config_file(MINIMAL), ["data.crop_scale=[0.5, 1.0]", "deepspeed.steps_per_print=5"])
    assert load_config(config_file(config.dump())) == config


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (MINIMAL, ["optim.learning_rate=1e-3"], ["run.yaml", "optim.learning_rate", "did you mean `optim.lr`"]),
        (MINIMAL, ["train.global_bach=8"], ["train.global_bach", "did you mean `train.global_batch`"]),
        (MINIMAL, ["global_batch=8"], ["global_batch", "did you mean `train.global_batch`"]),
        (MINIMAL, ["model.vision.widht=8"], ["did you mean `model.vision.width`"]),
        (MINIMAL, ["data.sources=[{shard: a.tar}]"], ["data.sources.0.shard", "did you mean `data.sources.0.shards`"]),
        (MINIMAL, ["data.zzzz=1"], ["valid here:", "workers"]),
        (MINIMAL, ["train.samples=many"], ["train.samples", "'many'"]),
        (MINIMAL, ["train.samples=-5"], ["train.samples", "greater than 0"]),
        (MINIMAL, ["optim.lr=.nan"], ["optim.lr"]),
        (MINIMAL, ["train.samples"], ["key.sub=value"]),
        (MINIMAL, ["run.dir.name=1"], ["`run.dir` is not a section"]),
        (MINIMAL, ["data.train=[a"], ["not valid YAML"]),
        (MINIMAL, ["data.train=a.tar", "data.sources=[{shards: b.tar}]"], ["either `train` or `sources`"]),
        ({"run": {"dir": "x"}}, [], ["`train` is required"]),
        ("run: [unclosed", [], ["not valid YAML"]),
        ("run: {dir: x}\nrun: {dir: y}", [], ["`run` is given twice"]),
        ("just words", [], ["expected sections"]),
        ("!!python/object/apply:os.system ['true']", [], ["not valid YAML"]),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_mend(config_file, text, overrides, words):
    with pytest.raises(UserError) as caught:
        load_config(config_file(text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such config file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "noise.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as a text file"):
        load_config(tmp_path / "noise.yaml")


def test_the_keys_that_others_rely_on_are_there():
    fixed = """
        run.dir run.seed run.save_every run.keep_last
        data.train data.val data.sources data.workers data.decode data.cache_dir data.max_bad_fraction
        tokenizer.path model.preset objective.contrastive objective.contrastive_weight objective.caption_weight
        optim.lr optim.weight_decay optim.warmup_samples
        train.samples train.global_batch train.micro_batch train.precision train.zero_stage train.grad_clip train.freeze
        eval.every log.every log.wandb
    """
    sections = {key.rpartition(".")[0] for key in all_keys()}
    assert set(fixed.split()) <= set(all_keys()) | sections
    assert list(Config.model_fields) == "run data tokenizer model objective optim train eval log deepspeed".split()  # noqa: SIM905


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_opens_with_its_purpose_hardware_command_and_result(path):
    head = path.read_text().split("\nrun:")[0]
    assert head.startswith("#")
    for word in ("Hardware:", "Command:", "Expect:"):
        assert word in head


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_its_model_and_divides_its_batch(path):
    config = load_config(path)
    with torch.device("meta"):
        model = build_model(build_model_config(config.model, 32_000), config.model.checkpoint)
    parts = dict(model.named_children())
    assert set(config.train.freeze) <= set(parts)
    assert sum(p.numel() for p in model.parameters()) > 1_000_000
    share = config.train.micro_batch or 1
    assert config.train.global_batch % share == 0
