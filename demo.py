"""Try the models in a browser: `python demo.py [recipe=NAME] [key=value ...]` prints the page's address.

*Classify* reads a photograph as predict.py does. *Teach* learns classes of your own from a few photographs of each, as
transfer/train_eval.py does. Only this machine can open the page, and the page asks no other one for anything. The pictures that
it is given are deleted when the script ends.
"""

import html
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the shared modules, also under PYTHONSAFEPATH

import interrupts
import plots
from config import ModelFileSettings, UserError, resolve, setting
from data_preprocessing import CLASS_NAMES, CLOTHES_OR_SHOE, load_images, training_settings
from model import Classifier, freeze, load_model
from occlusion import occlusion_maps
from photo import read_photograph
from predict import load_for_photographs
from script import import_extra, load_settings, run_script
from transfer.shoe_images import load_shoes, make_part
from transfer.train_eval import TransferSettings, learn_classes
from views import classify, clothes_or_shoe, select_views

MAX_CLASSES = 6
EXAMPLES = [0, 1, 5, 6, 19, 23]  # training images
CSS = "footer {display: none !important} .note {border-left: 4px solid #e07b00; padding: 0.4rem 0.8rem}"


class DemoSettings(ModelFileSettings):
    """Demo"""

    port: int = setting(0, "of the page's address; 0 = the first free one from 7860 on", ge=0, lt=2**16)


def draw_views(model: Classifier, views: torch.Tensor, label: int) -> Image.Image:
    """Views, uint8 `(V, 28, 28)`, side by side, and below them what mattered to the probability of class `label`."""
    pixels = (plots.tile(views.numpy(), occlusion_maps(model, views, label).numpy()) * 255).astype(np.uint8)
    return ImageOps.scale(Image.fromarray(pixels), 8, Image.Resampling.NEAREST)


def learn(frozen: Classifier, settings: TransferSettings, names: Sequence[str], files: Sequence[list[str]]) -> Classifier:
    """A model of the classes that have a name or files. Raises UserError if one lacks either, or if they are too few."""
    given = [(" ".join(name.split()), paths) for name, paths in zip(names, files) if name.strip() or paths]
    for name, paths in given:
        if not name or len(paths) < 2:
            raise UserError(f"{name or 'a class without a name'}: each class needs a name and two or more photographs")
    if len(given) < 2 or len({name.casefold() for name, _ in given}) < len(given):
        raise UserError("give two or more classes, each with a name of its own")
    views = torch.stack([read_photograph(Path(path)).views for _, paths in given for path in paths])  # (N, 3, 28, 28)
    classes, paths_by_class = zip(*given)
    return learn_classes(frozen, make_part(classes, paths_by_class, select_views(frozen, views)), settings)


def save_examples(images: torch.Tensor, folder: Path, name: str) -> list[str]:
    """uint8 images `(N, 1, 28, 28)`, large, dark on a pale ground, as photographs are; the paths of their files."""
    paths = [str(folder / f"{name}_{number}.png") for number in range(1, len(images) + 1)]
    for path, image in zip(paths, images):
        large = Image.fromarray(image[0].numpy()).resize((336, 336), Image.Resampling.BICUBIC)
        ImageOps.colorize(ImageOps.expand(large, 48), "#f4f1ea", "#1d2733", mid="#5d7288").save(path)
    return paths


def serve(settings: DemoSettings, folder: Path) -> str:
    """Build the page, with its example images in `folder`, and serve it from a thread; its address."""
    os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    gr = import_extra("gradio")  # reads these variables
    model, _ = load_for_photographs(settings)
    teach_settings = TransferSettings(data_dir=settings.data_dir, seed=settings.seed)
    frozen = freeze(load_model(resolve(teach_settings.checkpoint)))
    garments = save_examples(load_images("train", settings.data_path)[0][EXAMPLES], folder, "garment")
    shoes = load_shoes(("train", "pool"), settings.data_path)
    supports = save_examples(shoes["train"].images, folder, "support")
    queries = save_examples(shoes["pool"].images[[0, 1, -2, -1]], folder, "shoe")

    def note(text: str):
        text = re.sub(rf"{re.escape(str(folder))}\S*[/\\]", "", text)  # files are named as the user named them
        return gr.HTML(f'<p class="note" role="status">{html.escape(text)}</p>', visible=bool(text))

    def show(model: Classifier, path: str | None) -> list:
        """The values of the four outputs of `add_trial`."""
        nothing = [gr.Label(None, visible=False), None, None]
        if not path:
            return [note(""), *nothing]
        try:
            photograph = read_photograph(Path(path), training_settings(model.metadata)["prepare"])
        except UserError as error:
            return [note(str(error)), *nothing]
        names, views = model.metadata["class_names"], select_views(model, photograph.views.unsqueeze(0))  # (1, V, 28, 28)
        probability = classify(model, views)[0]
        shoe = dict(zip(CLOTHES_OR_SHOE, clothes_or_shoe(probability).tolist())) if tuple(names) == CLASS_NAMES else None
        warning = f"This may be wrong: {photograph.warning}." if photograph.warning else ""
        picture = draw_views(model, views[0], int(probability.argmax()))
        return [note(warning), gr.Label(shoe, visible=bool(shoe)), dict(zip(names, probability.tolist())), picture]

    def on_learn(*values):
        files = [[path for path, _ in gallery or ()] for gallery in values[MAX_CLASSES:]]
        try:
            learned = learn(frozen, teach_settings, [name or "" for name in values[:MAX_CLASSES]], files)
        except UserError as error:
            return None, note(str(error)), gr.Column(visible=False), None
        text = f"Learned: {' or '.join(learned.metadata['class_names'])}. Now try a new photograph."
        return learned, note(text), gr.Column(visible=True), None

    def add_trial(title: str, examples: list[str]):
        """A photograph, and the outputs for what `show` says of it."""
        with gr.Row():
            with gr.Column():
                image = gr.Image(label=title, type="filepath", sources=["upload", "webcam", "clipboard"], height=320)
                image.preprocess = lambda file: file and file.path  # gradio's own has no sentence for a broken file
                gr.Examples(examples, image, cache_examples=False)
            with gr.Column():
                outputs = [gr.HTML(visible=False), gr.Label(label="Clothes or shoe", visible=False)]
                outputs.append(gr.Label(label="Class", num_top_classes=3))
                outputs.append(gr.Image(show_label=False, interactive=False, buttons=[]))
                gr.Markdown(f"Above: what the network sees. Below: what mattered; {plots.LEGEND}.")
        return image, outputs

    def add_class(number: int):
        with gr.Column(min_width=280):
            name = gr.Textbox(label=f"Name of class {number}", max_length=40)
            options = {"columns": 4, "fit_columns": False, "height": 170, "show_label": False, "buttons": []}
            return name, gr.Gallery(label=f"Photographs of class {number}", interactive=True, **options)

    with gr.Blocks(title="Fashion-MNIST", analytics_enabled=False) as page:
        gr.Markdown("# Fashion-MNIST\nThis page runs on your machine; no picture leaves it.")
        with gr.Tab("Classify"):
            photograph, outputs = add_trial("A garment or a shoe", garments)
            photograph.change(partial(show, model), photograph, outputs)
        with gr.Tab("Teach"):
            gr.Markdown(
                "Give each class a name and two or more photographs, of each as many. The network's last layer learns them."
            )
            with gr.Row():
                classes = [add_class(number) for number in (1, 2)]
            with gr.Accordion("More classes", open=False), gr.Row():
                classes += [add_class(number) for number in range(3, MAX_CLASSES + 1)]
            names, galleries = zip(*classes)
            with gr.Row():
                example, button = gr.Button("Fill in an example"), gr.Button("Learn", variant="primary")
            told, learned = gr.HTML(visible=False), gr.State()
            with gr.Column(visible=False) as trial:
                query, outputs = add_trial("A new photograph", queries)
            query.change(show, [learned, query], outputs)
            example.click(lambda: ["flats", supports[:2], "heels", supports[2:]], None, [*classes[0], *classes[1]])
            button.click(on_learn, [*names, *galleries], [learned, told, trial, query])

    theme = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    private = {"server_name": "127.0.0.1", "share": False, "ssr_mode": False, "run_history": False, "footer_links": []}
    page_options = {"theme": theme, "css": CSS, "quiet": True, "prevent_thread_lock": True}
    try:
        return page.launch(server_port=settings.port or None, **page_options, **private)[1]
    except OSError:
        raise UserError(f"port={settings.port}: is in use; leave it out, and a free one is found") from None


def main(arguments: list[str]) -> None:
    settings = load_settings(arguments, DemoSettings)
    with tempfile.TemporaryDirectory(prefix="demo-") as folder, interrupts.deferred():
        print(f"open {serve(settings, Path(folder).resolve())} in a browser; Ctrl-C ends", flush=True)
        while True:
            time.sleep(0.2)
            interrupts.check()


if __name__ == "__main__":
    run_script(main)
