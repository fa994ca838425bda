"""A Hub folder: the trained model's outputs for a stranger, whole or not there, and refused when it is not the same."""

import json
import resource
import shutil

import pytest
import torch
import yaml
from checkpoints import WORDS, write_checkpoint
from safetensors.torch import load_file

from mmscale.data.tokenizer import train_tokenizer
from mmscale.errors import UserError
from mmscale.export import hub, stock_check, verify
from mmscale.export.folder import whole_folder
from mmscale.export.hub import code_files, export_hub
from mmscale.pretrained import load_pretrained
from mmscale.weights import ModelWeights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder, ema=True)
    return folder


@pytest.fixture
def unverified(monkeypatch):
    """Leaves out the check in a process of its own, for tests of what comes before it."""
    monkeypatch.setattr(hub, "verify_export", lambda folder, model, tokenizer: {})


@pytest.mark.slow
def test_a_stranger_without_mmscale_gets_the_trained_models_outputs(run, tmp_path):
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"scores": {"zeroshot_top1": 0.9375, "num_samples": 32}, "data": "toy|val"}))
    lines = []
    out = export_hub(run, tmp_path / "hub", scores=scores, license="mit", data="toy <shapes>", say=lines.append)
    assert "loaded in a process without mmscale" in lines[-1]
    trained, exported = load_pretrained(run, device="cpu"), load_pretrained(out, device="cpu")
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(exported.model.state_dict()[name], tensor), name
    assert exported.tokenizer.fingerprint == trained.tokenizer.fingerprint
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["license"] == "mit"
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.9375
    assert "| Samples seen | 24 of 64 |" in text
    assert "toy &lt;shapes>" in text and "toy\\|val" in text


@pytest.mark.slow
def test_a_folder_whose_outputs_differ_is_refused(run, tmp_path, monkeypatch):
    written = hub.write_weights

    def write_other_weights(folder, tensors, *args):
        name = "text.projection.weight"
        entry = tensors[name]
        tensors[name] = hub.Entry(entry.shape, lambda: entry.read() * torch.linspace(1, 1.001, 32))
        return written(folder, tensors, *args)

    monkeypatch.setattr(hub, "write_weights", write_other_weights)
    with pytest.raises(UserError, match="does not reproduce the trained model: text_embeds differ"):
        export_hub(run, tmp_path / "hub")
    assert list(tmp_path.iterdir()) == []


def test_the_check_sees_only_what_a_stranger_has():
    finder = stock_check._StrangersPathFinder()
    for hidden in ("mmscale", "sentencepiece", "simplejpeg", "deepspeed", "webdataset"):
        assert finder.find_spec(hidden) is None, hidden
    for seen in ("torch", "transformers", "PIL", "safetensors", "tokenizers", "numpy", "json"):
        assert finder.find_spec(seen) is not None, seen


def test_a_checkpoint_that_the_run_removes_meanwhile_is_exported_whole(tmp_path, monkeypatch, unverified):
    model, _, folder = write_checkpoint(tmp_path / "run", step=3)
    write = hub.write_weights

    def remove_then_write(*args):
        shutil.rmtree(folder)
        return write(*args)

    monkeypatch.setattr(hub, "write_weights", remove_then_write)
    out = export_hub(tmp_path / "run", tmp_path / "hub")
    assert torch.equal(load_file(out / "model.safetensors")["text.tokens.weight"], model.text.tokens.weight)


def test_a_run_whose_checkpoint_vanishes_before_it_is_read_gives_its_next_one(tmp_path, monkeypatch, unverified):
    write_checkpoint(tmp_path / "run", step=3)
    find = hub.find_checkpoint

    def find_and_lose(path):
        found = find(path)
        if found.name.endswith("3"):
            write_checkpoint(tmp_path / "run", step=4)
            shutil.rmtree(found)
        return found

    monkeypatch.setattr(hub, "find_checkpoint", find_and_lose)
    out = export_hub(tmp_path / "run", tmp_path / "hub")
    assert "| Steps | 4 |" in (out / "README.md").read_text()


def test_code_that_is_not_the_projects_is_never_run(run, tmp_path, monkeypatch):
    (tmp_path / "modeling_mmscale.py").write_text("raise SystemExit('executed')")
    with pytest.raises(AssertionError, match=r"modeling_mmscale.py is not the code"):
        verify._run_stock(tmp_path, tmp_path)


def test_an_output_folder_that_is_not_empty_is_left_alone(run, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists and is not an empty folder"):
        export_hub(run, tmp_path / "hub")
    assert [path.name for path in tmp_path.rglob("*")] == ["hub", "mine.txt"]


def test_an_export_of_the_same_weights_is_reused_and_of_others_is_not(run, tmp_path, unverified):
    out = export_hub(run, tmp_path / "hub")
    before = (out / "model.safetensors").stat().st_mtime_ns
    lines = []
    assert export_hub(run, out, reuse=True, say=lines.append) == out
    assert "reused" in lines[-1] and (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="already exists"):
        export_hub(run, out, reuse=True, ema=True)


def test_a_tokenizer_of_another_vocabulary_is_refused(run, tmp_path):
    other = train_tokenizer(WORDS * 20, tmp_path / "other.model", 285)
    with pytest.raises(UserError, match=rf"has {other.vocab_size} pieces, but the model in .* was trained with \d+"):
        export_hub(run, tmp_path / "hub", tokenizer=other.path)
    assert not (tmp_path / "hub").exists()


def test_large_weights_are_written_in_parts_with_an_index(run, tmp_path, unverified):
    out = export_hub(run, tmp_path / "hub", shard_bytes=100_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    parts = sorted(out.glob("model-*.safetensors"))
    assert len(parts) > 3 and not (out / "model.safetensors").exists()
    found = {}
    for part in parts:
        tensors = load_file(part)
        assert {name for name, file in index["weight_map"].items() if file == part.name} == tensors.keys()
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100_000
        found |= tensors
    trained = load_pretrained(run, device="cpu").model.state_dict()
    assert found.keys() == trained.keys() and all(torch.equal(found[name], trained[name]) for name in found)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert torch.equal(load_pretrained(out, device="cpu").model.text.tokens.weight, trained["text.tokens.weight"])


@pytest.mark.slow
def test_bf16_is_checked_against_the_trained_model_in_bf16(run, tmp_path):
    assert_weights_are(export_hub(run, tmp_path / "hub", dtype="bf16"), run, torch.bfloat16, 1.0)


def test_fp16_and_averaged_weights_are_what_they_say(run, tmp_path, unverified):
    assert_weights_are(export_hub(run, tmp_path / "hub", dtype="fp16", ema=True), run, torch.float16, 0.5)


def assert_weights_are(out, run, dtype, factor):
    trained = load_pretrained(run, device="cpu").model.state_dict()
    for name, tensor in load_file(out / "model.safetensors").items():
        assert tensor.dtype == dtype and torch.equal(tensor, (trained[name] * factor).to(dtype)), name
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_averaged_weights_that_were_not_kept_are_not_made_up(tmp_path):
    write_checkpoint(tmp_path / "run")
    with pytest.raises(UserError, match="holds no averaged weights"):
        export_hub(tmp_path / "run", tmp_path / "hub", ema=True)


def test_a_full_disk_leaves_nothing_behind(run, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(UserError, match="cannot be written: File too large; nothing was left there"):
            export_hub(run, tmp_path / "hub")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("...")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_only_the_code_that_the_model_needs_travels():
    names = {path.name for path in code_files()}
    assert {"modeling_mmscale.py", "configuration_mmscale.py", "processing_mmscale.py"} < names
    assert "presets.py" not in names and "__init__.py" not in names
    for path in code_files():
        assert "import mmscale" not in path.read_text() and "from mmscale" not in path.read_text(), path


def test_weights_of_another_version_are_refused_with_one_line(run, monkeypatch):
    read = ModelWeights.load

    def renamed(self, **options):
        tensors = read(self, **options)
        return tensors | {"text.old_name": tensors.pop("text.projection.weight")}

    monkeypatch.setattr(ModelWeights, "load", renamed)
    with pytest.raises(UserError, match=r"`text\.\w+`.* load it with the version of mmscale that wrote it"):
        load_pretrained(run, device="cpu")


def test_a_model_folder_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="holds a model of type `clip`"):
        load_pretrained(tmp_path)
