"""A model's answer to a photograph, from the views that photo.py makes of it.

The views fail on different photographs, so the answer is a mean of their probabilities. A model that was trained without scenes
(scenes.py) knows garments on black only: it reads the first two.
"""

import torch

from config import FASHION_MNIST, ROOT, ModelFileSettings, parse_augment
from data_preprocessing import CLASS_NAMES, SHOES, task_labels, training_settings
from device import choose_device, move
from model import Classifier, load_model
from photo import CUT_OUT, WHOLE
from trainer import infer

TEMPERATURE = 1.5  # of each view's softmax; the mean is sharpened by it again. 1, the plain mean, is too unsure
# Of a model trained on scenes, whose answers to photographs are too often Bag, Shirt and Coat: factors of the classes' odds,
# and an exponent that makes it surer. Fitted to photographs of shops and phones, each class having the same weight; then the
# shoes' were raised by a quarter and the bag's lowered by as much, for the balanced accuracy of clothes or shoe.
ODDS = {
    "Trouser": 1.2,
    "Pullover": 2.2,
    "Dress": 1.2,
    "Coat": 0.7,
    "Sandal": 1.5,
    "Shirt": 0.6,
    "Sneaker": 2.5,
    "Bag": 0.25,
    "Ankle boot": 1.25,
}
SHARPNESS = 1.2


def load_for_photographs(settings: ModelFileSettings) -> tuple[Classifier, bool]:
    """The model that the settings name or, if they name none, that of recipe=photo; whether it predicts clothes or shoe."""
    is_named = bool(settings.recipe or settings.out_dir or settings.checkpoint)
    path = settings.model_path if is_named else ROOT / "runs" / "photo" / "best_model.pt"
    model = load_model(path)
    return move(model, choose_device(settings.device)), not is_named and tuple(model.metadata["class_names"]) == CLASS_NAMES


def reads_scenes(model: Classifier) -> bool:
    return "scene" in parse_augment(training_settings(model.metadata)["augment"])


def reads_all_views(model: Classifier) -> bool:
    """Whether it reads a photograph's views at once, not one by one."""
    return model.metadata["architecture"] == "cnn_photo" or training_settings(model.metadata)["prepare"] == "views"


def select_views(model: Classifier, views: torch.Tensor) -> torch.Tensor:
    """Those of N photographs' views, uint8 `(N, V, 28, 28)`, that the model was trained to read, `(N, V', 28, 28)`."""
    if reads_scenes(model) or training_settings(model.metadata)["prepare"] == "views":
        return views
    if training_settings(model.metadata)["data"] != FASHION_MNIST:
        return views[:, [CUT_OUT]]  # as it was trained
    cut_outs = face_left(views[:, :WHOLE].flatten(0, 1)).unflatten(0, (-1, WHOLE))
    return torch.cat([cut_outs, views[:, WHOLE:]], 1) if reads_all_views(model) else cut_outs


def classify(model: Classifier, views: torch.Tensor) -> torch.Tensor:
    """Probabilities `(N, C)` of photographs with views, uint8 `(N, V, 28, 28)`: the mean of the views' softened probabilities,
    sharpened again, and weighed by ODDS if the model was trained on scenes. Of equal views, they are a single one's: an image
    of the data set is no photograph."""
    if reads_all_views(model) or "shots" in training_settings(model.metadata):  # Task 2's last layer reads mean features
        logits = infer(model, views).unsqueeze(1)  # (N, 1, C)
    else:
        logits = infer(model, views.flatten(0, 1).unsqueeze(1)).unflatten(0, views.shape[:2])  # (N, V, C)
    probabilities = (logits / TEMPERATURE).softmax(2).mean(1) ** TEMPERATURE
    names = model.metadata["class_names"]
    if reads_scenes(model) and tuple(names) == CLASS_NAMES:
        odds = torch.tensor([ODDS.get(name, 1.0) for name in names])
        is_photograph = (views != views[:, :1]).flatten(1).any(1, keepdim=True)  # (N, 1)
        probabilities = torch.where(is_photograph, (probabilities * odds) ** SHARPNESS, probabilities)
    return probabilities / probabilities.sum(1, keepdim=True)


def clothes_or_shoe(probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities of ten classes `(..., 10)` -> of clothes and of shoes `(..., 2)`."""
    shoe = probabilities[..., list(SHOES)].sum(-1)
    return torch.stack([1 - shoe, shoe], -1)


def face_left(views: torch.Tensor) -> torch.Tensor:
    """Each view, uint8 `(N, 28, 28)`, or its horizontal flip: the one to which Task 1's model gives more probability of a shoe.

    Every shoe in the data set points to the left, and a model that never saw another one classifies most that point to the
    right as clothes; clothes and bags look much the same both ways. Raises UserError if Task 1's model is missing.
    """
    model = load_model(ROOT / "best_model.pt")
    both = torch.stack([views, views.flip(-1)])  # (2, N, 28, 28)
    logits = infer(model, both.flatten(0, 1).unsqueeze(1))  # (2 * N, C)
    shoes = task_labels(torch.tensor(SHOES), model.metadata["output_dim"]).unique()
    probability = logits.softmax(1)[:, shoes].sum(1).view(2, -1)  # (2, N)
    return both[probability.argmax(0), torch.arange(len(views))]
