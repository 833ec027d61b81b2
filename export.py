"""Export a model for programs without PyTorch: `python export.py [recipe=NAME] [checkpoint=FILE] [key=value ...]`.

Writes model.onnx into out_dir. It takes uint8 images `(N, 1, 28, 28)` of any N, garment bright on black, or the views
`(N, 5, 28, 28)` of photographs if the model reads all, and returns probabilities `(N, classes)`. Its metadata say what the
classes are, how to prepare an image, and where the model comes from. Before it is written, onnxruntime computes 1,000 test
images; if it differs from PyTorch, the exit code is 1.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the shared modules, also under PYTHONSAFEPATH

import checkpoint
from config import ModelFileSettings
from data_preprocessing import load_data, training_settings
from model import Classifier, load_model
from photo import VIEWS
from script import import_extra, load_settings, run_script
from trainer import infer
from views import reads_all_views

MAX_DIFFERENCE = 1e-4  # of a probability


def to_onnx(model: Classifier, views: int = 1) -> bytes:
    """The contents of an ONNX file of the model with softmax, for images `(N, views, 28, 28)`. Raises UserError if a package is
    missing."""
    import_extra("onnx")
    import_extra("onnxscript")
    images = torch.zeros(2, views, 28, 28, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.onnx.export(
            torch.nn.Sequential(model, torch.nn.Softmax(1)).eval(),
            (images,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: "N"},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # as with dynamo=True
    proto = program.model_proto
    for key, value in describe(model, views).items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()


def describe(model: Classifier, views: int) -> dict[str, str]:
    """The metadata of the ONNX file; `class_names`, `settings`, `best`, `versions` and `machine` are JSON."""
    content = (
        "one garment, bright (255) on black (0). Of a photograph: cut the object out, longest side 28 pixels, in grey, dark on "
        "light inverted, centred on black; photo.py does it"
        if views == 1
        else "the views that photo.py makes of a photograph"
    )
    preparation = (
        f"uint8 (N, {views}, 28, 28); {content}. The model itself normalises: "
        f"pixels / 255, minus {model.mean.item():.6g}, divided by {model.std.item():.6g}"
    )
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in model.metadata.items()}
    return {"preparation": preparation, **texts}


def main(arguments: list[str]) -> None:
    settings = load_settings(arguments, ModelFileSettings)
    print("settings:", settings)
    onnxruntime = import_extra("onnxruntime")
    model = load_model(settings.model_path)
    images = load_data("test", settings.data_path, training_settings(model.metadata, settings)).images[:1000]
    if reads_all_views(model):
        images = images.expand(-1, VIEWS, -1, -1)  # an image of the data set is its only view
    contents = to_onnx(model, images.shape[1])
    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    pixels, singles = images.numpy(), images[:100, None].numpy()  # (1000, V, 28, 28), (100, 1, V, 28, 28)
    started = time.perf_counter()
    for single in singles:
        session.run(None, {"images": single})
    middle = time.perf_counter()
    probabilities = torch.from_numpy(session.run(None, {"images": pixels})[0])
    alone_seconds = (middle - started) / len(singles)  # per image
    batch_seconds = (time.perf_counter() - middle) / len(pixels)
    difference = (infer(model, images).softmax(1) - probabilities).abs().max().item()
    report = f"largest difference from PyTorch on {len(images):,} test images {difference:.1e}"
    if not difference <= MAX_DIFFERENCE:
        print(f"error: {report}; at most {MAX_DIFFERENCE:.0e} is allowed; nothing was written", file=sys.stderr)
        raise SystemExit(1)
    path = settings.out_path / "model.onnx"
    checkpoint.write_atomically(path, contents)
    print(
        f"{report}; {len(contents) / 1e6:.2f} MB; onnxruntime: {alone_seconds * 1e3:.2f} ms per image one by one, "
        f"{batch_seconds * 1e3:.2f} ms in a batch of {len(pixels):,}; wrote {path}"
    )


if __name__ == "__main__":
    run_script(main)
