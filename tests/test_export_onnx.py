"""The ONNX towers give the trained model's embeddings for any batch and length, with nothing but stock packages."""

import numpy as np
import pytest
import torch
from checkpoints import SMALL, write_checkpoint
from transformers import AutoTokenizer

from mmscale.errors import UserError
from mmscale.export import onnx as export
from mmscale.export.onnx import export_onnx


@pytest.mark.slow
def test_onnxruntime_gives_the_models_embeddings(tmp_path):
    import onnxruntime

    shallow = {**SMALL, "vision": {**SMALL["vision"], "layers": 1}, "text": {**SMALL["text"], "layers": 1}}
    model, _, _ = write_checkpoint(tmp_path / "run", model=shallow)
    lines = []
    out = export_onnx(tmp_path / "run", tmp_path / "onnx", say=lines.append)
    assert "run in onnxruntime" in lines[-1]
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = tokenizer(["a red circle", "two", "a small blue square above a circle"], padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(out / "text_encoder.onnx")
    (found,) = session.run(None, {name: tokens[name] for name in ("input_ids", "attention_mask")})
    with torch.no_grad():
        right = model.get_text_features(*(torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")))
    assert np.abs(found - right.numpy()).max() < 1e-6
    pixel_values = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(out / "image_encoder.onnx").run(None, {"pixel_values": pixel_values})
    with torch.no_grad():
        assert np.abs(found - model.get_image_features(torch.from_numpy(pixel_values)).numpy()).max() < 1e-6
    assert (out / "processor_config.json").exists()


def test_files_that_give_other_embeddings_are_refused(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "run")
    monkeypatch.setattr(export, "_write", lambda *_: None)
    monkeypatch.setattr(export, "_difference", lambda *_: 1e-3)
    with pytest.raises(UserError, match=r"embeddings differ by 0\.001"):
        export_onnx(tmp_path / "run", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs onnxscript: pip install onnx onnxruntime onnxscript"):
        export_onnx(tmp_path / "run", tmp_path / "onnx")
