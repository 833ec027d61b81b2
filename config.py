"""Settings: their names, types, defaults, ranges, units and help texts.

    python SCRIPT.py [recipe=NAME] [key=value ...]

The command line overrides `recipes/NAME.json` or, without a recipe, `config.json` (Task 1). Either file overrides the neutral
defaults below, in which every training trick is off. Nothing here imports torch.
"""

import difflib
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

ROOT = Path(__file__).resolve().parent
FASHION_MNIST = "fashion_mnist"  # the data set unless `data` names another
TITLES = {FASHION_MNIST: "Fashion-MNIST", "mnist": "MNIST", "kmnist": "KMNIST"}  # of the data sets that are no folders
AUGMENTATIONS = {  # name -> (default strength, largest strength, unit)
    "hflip": (0.5, 1, "probability of a horizontal flip"),
    "vflip": (0.5, 1, "probability of a vertical flip"),
    "rotate": (10, 180, "largest angle, degrees"),
    "shift": (2, 14, "largest translation, whole pixels"),
    "crop": (0.2, 0.9, "largest fraction of the side cut away"),
    "noise": (10, 255, "standard deviation of Gaussian noise, grey levels"),
    "blur": (1, 5, "largest standard deviation of a Gaussian blur, pixels"),
    "erase": (0.5, 1, "probability of random erasing"),
    "scene": (0.5, 1, "fraction of garments laid on backgrounds"),
    "gan": (1, 3, "standard deviation of the noise of added generated images"),
}


class UserError(Exception):
    """An error that the user can correct. Its text is one line: what is wrong, where, and what to do."""


def resolve(path: str) -> Path:
    """The path that a setting names; a relative one starts at the repository's root, not at the current folder.

    Raises UserError for ~NAME if there is no such user."""
    try:
        return ROOT / Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no user {path.partition('/')[0]}; write the folder in full") from None


def parse_augment(text: str) -> dict[str, float]:
    """`"hflip:0.5,shift:2"` -> `{"hflip": 0.5, "shift": 2.0}`. Raises ValueError on an unknown name or strength."""
    strengths = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, strength = item.partition(":")
        if name not in AUGMENTATIONS:
            raise ValueError(f"{name!r} is no augmentation; known: {', '.join(AUGMENTATIONS)}")
        if name in strengths:
            raise ValueError(f"{name} is named twice; name it once")
        default, top, _ = AUGMENTATIONS[name]
        try:
            strengths[name] = float(strength or default)
        except ValueError:
            raise ValueError(f"the strength of {name} is {strength!r}, which is no number") from None
        if not 0 <= strengths[name] <= top:
            raise ValueError(f"the strength of {name} is {strength}; allowed: 0 to {top}")
        if name == "shift" and not strengths[name].is_integer():
            raise ValueError(f"the strength of shift is {strength}; it moves whole pixels")
    return strengths


def _check_augment(text: str) -> str:
    parse_augment(text)
    return text


def _check_optimizer(name: str) -> str:
    if name not in ("sgd", "adam", "adamw") and not (name.isidentifier() and name[0].isupper()):
        raise ValueError(f"there is no optimizer {name!r}; known: sgd, adam, adamw, or a class of torch.optim such as RMSprop")
    return name


def _check_dropout(dropout: float) -> float:
    if -1 < dropout < 0:
        raise ValueError("it should be a probability, or -1")
    return dropout


def setting(default, description: str, **limits):
    """A setting's default, help text and, if any, limits: ge, gt, le, lt, min_length."""
    return Field(default, description=description, **limits)


Architecture = Literal[
    "cnn", "mlp", "deep_cnn", "deep_cnn_dropout", "compact_cnn", "resnet8", "resnet14", "cnn_photo",
    "resnet20", "resnet20_wide", "resnet20_wider", "resnet18", "resnet18_56",
    "separable14", "separable14_photo", "separable14_thin", "separable20", "fast_cnn", "fast_cnn_wide", "fast_cnn_deep",
]  # fmt: skip
_STRENGTHS = "\n".join(f"{name}:{value}  {unit}; at most {top}" for name, (value, top, unit) in AUGMENTATIONS.items())
# settings that several scripts declare
Augment = Annotated[
    str,
    AfterValidator(_check_augment),
    Field(description=f"NAME or NAME:STRENGTH, e.g. hflip,shift:1\nThe default strengths are\n{_STRENGTHS}"),
]
ValidRatio = Annotated[float, Field(gt=0, lt=1, description="fraction of the training images used for validation")]


class Settings(BaseModel):
    """Every script"""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    usage: ClassVar[str] = "[key=value ...]"

    data_dir: str = setting(
        "data", "folder with FashionMNIST/raw/ and others; missing files are downloaded to it", min_length=1
    )
    out_dir: str = setting(".", "folder for everything that a run writes", min_length=1)
    seed: int = setting(0, "random seed of split, initial parameters, order and augmentation", ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "auto = a GPU if there is one, else the CPU")
    precision: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto = train in bfloat16 where the device supports it")
    batch_size: int = setting(128, "training images per step", ge=1, le=1_000_000)
    limit: int = setting(0, "use N training images only, for a dry run; 0 = all", ge=0)

    def __str__(self) -> str:
        """The settings that differ from the defaults, as words of a command line."""
        return shlex.join(f"{key}={as_text(value)}" for key, value in self.model_dump(exclude_defaults=True).items())

    @property
    def out_path(self) -> Path:
        return resolve(self.out_dir)

    @property
    def data_path(self) -> Path:
        return resolve(self.data_dir)


class RecipeSettings(Settings):
    """Recipe"""

    usage: ClassVar[str] = "[recipe=NAME] [key=value ...]"
    recipe: str = setting("", "read recipes/NAME.json instead of config.json; empty = Task 1")
    out_dir: str = setting("", "folder of a run's files, its model among them; empty = . for Task 1, runs/NAME for a recipe")

    @property
    def out_path(self) -> Path:
        return resolve(self.out_dir or (f"runs/{self.recipe}" if self.recipe else "."))


class DataSettings(BaseModel):
    """Data"""

    data: str = setting(
        FASHION_MNIST, "fashion_mnist, mnist, kmnist, or a folder with train/CLASS/*, perhaps test/CLASS/*", min_length=1
    )
    prepare: Literal["photo", "views", "resize"] = setting(
        "photo", "images of a folder: photo = cut out, views = in all five ways of predict.py, resize = in grey, as they are"
    )
    output_dim: int = setting(0, "number of classes; 0 = all that the data set has, 2 = clothes or shoe in Fashion-MNIST", ge=0)

    @model_validator(mode="after")
    def _fits_the_data(self) -> "DataSettings":
        if self.prepare != "photo" and self.data in TITLES:
            raise ValueError(f"prepare={self.prepare}: is for the images of a folder; name data=FOLDER, or leave it out")
        needs_garments = {"scene", "gan"} & parse_augment(getattr(self, "augment", "")).keys()
        if needs_garments and self.data != FASHION_MNIST:
            raise ValueError(f"augment={needs_garments.pop()}: is made for Fashion-MNIST's garments, not for data={self.data}")
        return self


class ModelFileSettings(RecipeSettings):
    """Model file"""

    data: str = setting("", "the data set whose test images are read; empty = the one that the model was trained on")
    checkpoint: str = setting("", "the model's file, a best_model.pt or a checkpoint.pt; empty = best_model.pt in out_dir")

    @property
    def out_path(self) -> Path:
        """Beside a checkpoint that is named without recipe and out_dir: Task 1's files are not those of another model."""
        is_elsewhere = self.checkpoint and not (self.recipe or self.out_dir)
        return resolve(self.checkpoint).parent if is_elsewhere else super().out_path

    @property
    def model_path(self) -> Path:
        return resolve(self.checkpoint) if self.checkpoint else self.out_path / "best_model.pt"


class ModelSettings(BaseModel):
    """Model"""

    architecture: Architecture = setting("cnn", "the model, as model.py names it")
    pretrained: bool = setting(False, "start resnet18 from ImageNet weights, downloaded")
    finetune: str = setting("", "start from this best_model.pt, but for the last layer; empty = random parameters")
    dropout: Annotated[float, AfterValidator(_check_dropout)] = setting(-1.0, "probability; -1 = the model's own", ge=-1, lt=1)
    activation: Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh"] = setting("relu", "activation function")
    init: Literal["default", "he", "xavier", "orthogonal"] = setting("default", "weight initialisation; default = PyTorch's")
    batch_norm: bool = setting(False, "add batch normalisation; the saved model has it fused")
    scaling: Literal["standard", "symmetric"] = setting("standard", "pixels: to mean 0 and standard deviation 1, or to -1..1")


class OptimizationSettings(BaseModel):
    """Optimization"""

    epochs: int = setting(10, "epochs", ge=1, le=100_000)
    optimizer: Annotated[str, AfterValidator(_check_optimizer)] = setting(
        "adam", "adam, adamw, sgd (Nesterov momentum 0.9), or a class of torch.optim such as RMSprop"
    )
    lr: float = setting(0.001, "learning rate; with a schedule, its highest value", gt=0)
    weight_decay: float = setting(0.0, "added to the gradient; with adamw, decoupled from it", ge=0)
    schedule: Literal["none", "cosine", "linear", "plateau"] = setting(
        "none",
        "warm-up, then decay to 0; plateau = a tenth after 4 epochs without a lower loss",
    )
    warmup: float = setting(0.25, "fraction of all steps in which the learning rate rises", ge=0, lt=1)
    ema_decay: float = setting(0.0, "decay of the weights' moving average, which is saved; 0 = none", ge=0, lt=1)
    aux_loss_weight: float = setting(0.0, "weight of the loss of a second head over the data set's classes; 0 = none", ge=0)


class TrainSettings(OptimizationSettings, ModelSettings, DataSettings, RecipeSettings):
    """Training"""

    valid_ratio: float = setting(
        0.1, "fraction of the training images used for validation; 0 = none, and the last epoch's model is kept", ge=0, lt=1
    )
    patience: int = setting(0, "stop after N epochs without a lower validation loss; 0 = never", ge=0)
    label_smoothing: float = setting(0.0, "probability mass that is spread over all classes", ge=0, lt=1)
    class_weights: Literal["none", "balanced"] = setting("none", "balanced = weigh a class by the inverse of its frequency")
    augment: Augment = ""
    gan_fraction: float = setting(0.3, "augment=gan: fraction of generated images", ge=0, lt=1)
    generator: str = setting("runs/gan/generator.pt", "augment=gan: the generator, from gan/train.py")
    first_epoch_fraction: float = setting(1.0, "random fraction of the training images in epoch 1", gt=0, le=1)
    hard_fraction: float = setting(1.0, "the same from epoch 2 on: half had the highest loss when last seen", gt=0, le=1)
    teacher: str = setting("", "distil from this best_model.pt or soft_targets.pt; empty = none")
    distill_weight: float = setting(0.9, "weight of the distillation loss; the labels have the rest", ge=0, le=1)

    @model_validator(mode="after")
    def _pretrained_exists(self) -> "TrainSettings":
        if self.pretrained and not self.architecture.startswith("resnet18"):
            raise ValueError(f"pretrained=true: there are ImageNet weights for resnet18, not for {self.architecture}")
        return self


class RunSettings(TrainSettings):
    """Runs"""

    folds: int = setting(0, "K-fold cross-validation, one model per fold; 0 = none", ge=0, le=100)
    runs: int = setting(1, "N models, each with its own split and seed; keeps the best", ge=1, le=100)
    resume: bool = setting(False, "continue from out_dir/checkpoint.pt")
    log: Literal["none", "tensorboard"] = setting("none", "besides history.jsonl, log to out_dir/tensorboard")

    @property
    def out_path(self) -> Path:
        """Raises UserError if files would be replaced by those of another data set or, of Task 1, by another model's."""
        shipped = {} if self.out_dir else {"data": FASHION_MNIST, **read_config(config_path(self.recipe))}
        for key in ("data",) if self.recipe else ("data", "architecture", "output_dim"):
            if (value := getattr(self, key)) != shipped.get(key, value):
                owner = f"the files of recipe={self.recipe}" if self.recipe else "Task 1's files"
                raise UserError(f"{key}={value}: {owner} would be replaced; add out_dir=FOLDER")
        return super().out_path

    @model_validator(mode="after")
    def _consistent(self) -> "RunSettings":
        if self.folds == 1:
            raise ValueError("folds=1: one fold would leave nothing to train on; use 2 or more")
        if self.folds and self.runs > 1:
            raise ValueError(f"runs={self.runs} and folds={self.folds}: choose one of the two, leave the other at its default")
        validated = {"patience": self.patience > 0, "schedule": self.schedule == "plateau", "runs": self.runs > 1}
        key = next((key for key, is_set in validated.items() if is_set), "")
        if key and not (self.valid_ratio or self.folds):
            raise ValueError(f"{key}={getattr(self, key)}: needs validation images; use a valid_ratio above 0")
        several = f"folds={self.folds}" if self.folds else f"runs={self.runs}" if self.runs > 1 else ""
        has_generated = "gan" in parse_augment(self.augment)
        if several and (self.teacher or self.finetune or has_generated):
            models = {"teacher": self.teacher, "finetune": self.finetune, "augment": self.augment}
            word = next(f"{key}={value}" for key, value in models.items() if value)
            raise ValueError(f"{word}: was trained on images that other splits validate on; leave {several} out")
        return self


def config_path(recipe: str) -> Path:
    """The file of a recipe, or Task 1's without one. Raises UserError if there is no such recipe."""
    if not recipe:
        return ROOT / "config.json"
    recipes = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.json"))}
    if recipe not in recipes:
        raise UserError(f"recipe={recipe}: there is no such recipe; known: {', '.join(recipes) or 'none yet'}")
    return recipes[recipe]


def read_config(path: Path) -> dict:
    """The settings in a JSON file. Raises UserError if it isn't one, or has an unknown setting."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected an object of settings, found a {type(settings).__name__}")
    known = RunSettings.model_fields.keys() - {"recipe", "resume"}
    for key in settings.keys() - known:
        raise UserError(f"{path}: {unknown_setting(key, known)}")
    return settings


def unknown_setting(key: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0)[0]
    return f"there is no setting {key!r} here; the nearest is {nearest!r}, help lists all"


def as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
