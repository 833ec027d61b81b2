"""model.onnx computes what the model computes, without PyTorch. Skipped where requirements-extra.txt is not installed."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import export
from config import ROOT
from model import build_model, load_model
from trainer import infer

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

TINY_BEST = ROOT / "runs" / "tiny_best" / "best_model.pt"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "runs" / "tiny_best"
    export.main([f"checkpoint={TINY_BEST}", f"out_dir={folder}"])
    return folder


# instance normalisation, resizing, the mean over views
@pytest.mark.parametrize("architecture, views", [("separable14_photo", 1), ("resnet18_56", 1), ("mlp", 5), ("cnn_photo", 5)])
@torch.inference_mode()
def test_it_gives_the_models_probabilities_for_any_number_of_images(architecture, views, train_data):
    torch.manual_seed(0)
    model = build_model(architecture, 10).eval()
    model.set_statistics(0.29, 0.35, train_data[0][:100])
    session = onnxruntime.InferenceSession(export.to_onnx(model, views))
    some = train_data[0][: 7 * views].reshape(7, views, 28, 28)
    for images in (some[:1], some):
        expected = infer(model, images).softmax(1).numpy()
        assert np.abs(session.run(None, {"images": images.numpy()})[0] - expected).max() < export.MAX_DIFFERENCE


def test_it_says_what_its_classes_are_and_where_it_comes_from(out):
    metadata = onnxruntime.InferenceSession(out / "model.onnx").get_modelmeta().custom_metadata_map
    model = load_model(TINY_BEST)
    assert json.loads(metadata["class_names"]) == model.metadata["class_names"]
    assert json.loads(metadata["settings"]) == model.metadata["settings"]
    assert f"minus {model.mean:.6g}, divided by {model.std:.6g}" in metadata["preparation"]


def test_a_model_that_reads_all_views_takes_them(untrained, tmp_path):
    checkpoint.save(tmp_path / "best_model.pt", {**untrained, "settings": {"prepare": "views"}})
    export.main([f"checkpoint={tmp_path / 'best_model.pt'}", f"out_dir={tmp_path}"])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape[1:] == [5, 28, 28]
    assert "the views that photo.py makes" in session.get_modelmeta().custom_metadata_map["preparation"]


def test_what_task_2_learned_can_be_exported(tmp_path):
    export.main([f"checkpoint={ROOT / 'transfer' / 'best_model.pt'}", f"out_dir={tmp_path}"])
    metadata = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == ["flats", "heels"]


def test_a_file_that_computes_something_else_is_not_written(out, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "to_onnx", lambda *_: (out / "model.onnx").read_bytes())
    monkeypatch.setattr(export, "infer", lambda model, images: infer(model, images) * 1.01)
    with pytest.raises(SystemExit) as ended:
        export.main([f"checkpoint={TINY_BEST}", f"out_dir={tmp_path}"])
    assert ended.value.code == 1 and "largest difference" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_guides_lines_classify_without_torch(out, train_data):
    folder = out.parent.parent
    Image.fromarray(255 - train_data[0][1, 0].numpy()).resize((280, 280)).save(folder / "photo.jpg")
    lines = re.findall(r"```python\n(.*?)```", (ROOT / "GUIDE.md").read_text(), re.DOTALL)[0]
    lines += "import sys; assert 'torch' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", lines], cwd=folder, capture_output=True, text=True)
    assert re.fullmatch(r"T-shirt/top \d+\.\d%\n", ended.stdout), ended.stderr
