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
from script import import_extra, load_settings, run_script
from transfer.last_layer import TransferSettings, beside_photo, learn_classes
from transfer.shoe_images import load_shoes, make_part
from views import classify, clothes_or_shoe, load_for_photographs, select_views

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
    views = torch.stack([read_photograph(Path(path)).views for _, paths in given for path in paths])  # (N, 5, 28, 28)
    classes, paths_by_class = zip(*given)
    return learn_classes(frozen, make_part(classes, paths_by_class, select_views(frozen, views)), settings)


def save_examples(images: torch.Tensor, folder: Path, name: str) -> list[str]:
    """uint8 images `(N, 1, 28, 28)`, large, dark on a pale ground, as photographs are; the paths of their files."""
    paths = [str(folder / f"{name}_{number}.png") for number in range(1, len(images) + 1)]
    for path, image in zip(paths, images):
        large = Image.fromarray(image[0].numpy()).resize((336, 336), Image.Resampling.BICUBIC)
        ImageOps.colorize(ImageOps.expand(large, 48), "#f4f1ea", "#1d2733", mid="#5d7288").save(path)
    return paths


class Page:
    """The page: a tab that classifies, and one that learns classes. Its example images and uploads are in `folder`."""

    def __init__(self, settings: DemoSettings, folder: Path):
        os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
        self.gr = import_extra("gradio")  # reads these variables
        self.folder = folder
        self.model, _ = load_for_photographs(settings)
        self.teach_settings = TransferSettings(data_dir=settings.data_dir, seed=settings.seed)
        self.frozen = freeze(beside_photo(load_model(resolve(self.teach_settings.checkpoint))))
        self.garments = save_examples(load_images("train", settings.data_path)[0][EXAMPLES], folder, "garment")
        shoes = load_shoes(("train", "pool"), settings.data_path)
        self.supports = save_examples(shoes["train"].images, folder, "support")
        self.queries = save_examples(shoes["pool"].images[[0, 1, -2, -1]], folder, "shoe")

    def note(self, text: str):
        text = re.sub(rf"{re.escape(str(self.folder))}\S*[/\\]", "", text)  # files are named as the user named them
        return self.gr.HTML(f'<p class="note" role="status">{html.escape(text)}</p>', visible=bool(text))

    def show(self, model: Classifier, path: str | None) -> list:
        """The values of the four outputs of `add_trial`."""
        nothing = [self.gr.Label(None, visible=False), None, None]
        if not path:
            return [self.note(""), *nothing]
        try:
            photograph = read_photograph(Path(path), training_settings(model.metadata)["prepare"])
        except UserError as error:
            return [self.note(str(error)), *nothing]
        names, views = model.metadata["class_names"], select_views(model, photograph.views.unsqueeze(0))  # (1, V, 28, 28)
        probability = classify(model, views)[0]
        shoe = dict(zip(CLOTHES_OR_SHOE, clothes_or_shoe(probability).tolist())) if tuple(names) == CLASS_NAMES else None
        warning = f"This may be wrong: {photograph.warning}." if photograph.warning else ""
        picture = draw_views(model, views[0], int(probability.argmax()))
        classes = dict(zip(names, probability.tolist()))
        return [self.note(warning), self.gr.Label(shoe, visible=bool(shoe)), classes, picture]

    def on_learn(self, *values) -> tuple:
        """The learned model, what is said of it, whether it can be tried, and an empty photograph."""
        files = [[path for path, _ in gallery or ()] for gallery in values[MAX_CLASSES:]]
        try:
            learned = learn(self.frozen, self.teach_settings, [name or "" for name in values[:MAX_CLASSES]], files)
        except UserError as error:
            return None, self.note(str(error)), self.gr.Column(visible=False), None
        text = f"Learned: {' or '.join(learned.metadata['class_names'])}. Now try a new photograph."
        return learned, self.note(text), self.gr.Column(visible=True), None

    def add_trial(self, title: str, examples: list[str]) -> tuple:
        """A photograph, and the outputs for what `show` says of it."""
        gr = self.gr
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

    def add_class(self, number: int) -> tuple:
        """A class's name and its photographs."""
        with self.gr.Column(min_width=280):
            name = self.gr.Textbox(label=f"Name of class {number}", max_length=40)
            options = {"columns": 4, "fit_columns": False, "height": 170, "show_label": False, "buttons": []}
            return name, self.gr.Gallery(label=f"Photographs of class {number}", interactive=True, **options)

    def build(self):
        gr = self.gr
        with gr.Blocks(title="Fashion-MNIST", analytics_enabled=False) as page:
            gr.Markdown("# Fashion-MNIST\nThis page runs on your machine; no picture leaves it.")
            with gr.Tab("Classify"):
                photograph, outputs = self.add_trial("A garment or a shoe", self.garments)
                photograph.change(partial(self.show, self.model), photograph, outputs)
            with gr.Tab("Teach"):
                text = "Give each class a name and two or more photographs, of each as many. "
                gr.Markdown(text + "The network's last layer learns them.")
                with gr.Row():
                    classes = [self.add_class(number) for number in (1, 2)]
                with gr.Accordion("More classes", open=False), gr.Row():
                    classes += [self.add_class(number) for number in range(3, MAX_CLASSES + 1)]
                names, galleries = zip(*classes)
                with gr.Row():
                    example, button = gr.Button("Fill in an example"), gr.Button("Learn", variant="primary")
                message, learned = gr.HTML(visible=False), gr.State()
                with gr.Column(visible=False) as trial:
                    query, outputs = self.add_trial("A new photograph", self.queries)
                query.change(self.show, [learned, query], outputs)
                filled = ["flats", self.supports[:2], "heels", self.supports[2:]]
                example.click(lambda: filled, None, [*classes[0], *classes[1]])
                button.click(self.on_learn, [*names, *galleries], [learned, message, trial, query])
        return page

    def serve(self, port: int) -> str:
        """Serve the page from a thread; its address. Raises UserError if the port is in use."""
        theme = self.gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
        private = {"server_name": "127.0.0.1", "share": False, "ssr_mode": False, "run_history": False, "footer_links": []}
        options = {"theme": theme, "css": CSS, "quiet": True, "prevent_thread_lock": True}
        try:
            return self.build().launch(server_port=port or None, **options, **private)[1]
        except OSError:
            raise UserError(f"port={port}: is in use; leave it out, and a free one is found") from None


def main(arguments: list[str]) -> None:
    settings = load_settings(arguments, DemoSettings)
    with tempfile.TemporaryDirectory(prefix="demo-") as folder, interrupts.deferred():
        print(f"open {Page(settings, Path(folder).resolve()).serve(settings.port)} in a browser; Ctrl-C ends", flush=True)
        while True:
            time.sleep(0.2)
            interrupts.check()


if __name__ == "__main__":
    run_script(main)
