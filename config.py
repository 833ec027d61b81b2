"""Every setting: its name, type, default, range, unit and meaning; how they are read, merged and refused.

    python SCRIPT.py [recipe=NAME] [key=value ...]

The command line wins over `recipes/NAME.json`, which wins over `config.json`, which wins over the defaults below.
Nothing here needs torch.
"""

import difflib
import io
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

ROOT = Path(__file__).resolve().parent

AUGMENTATIONS = {  # name -> (default strength, largest strength, unit)
    "hflip": (0.5, 1, "probability of mirroring left to right"),
    "vflip": (0.5, 1, "probability of mirroring top to bottom"),
    "rotate": (10, 180, "degrees, at most, either way"),
    "shift": (2, 14, "whole pixels, at most, in each direction"),
    "crop": (0.2, 0.9, "share of the side cut away, at most; the rest is enlarged"),
    "noise": (10, 255, "standard deviation, in grey levels"),
    "blur": (1, 5, "pixels, standard deviation of the strongest"),
    "erase": (0.5, 1, "probability of a rectangle of noise"),
    "gan": (1, 3, "standard deviation of a generator's noise, whose images are gan_share of all"),
}


HELP = {"help", "-h", "--help"}


class UserError(Exception):
    """Something that the user can mend. Its text is one line: what is wrong, where, and what to do."""


def resolve(path: str) -> Path:
    """The path that a setting names; a relative one starts at the repository's root, not at the current folder.

    Raises UserError for ~NAME if there is no such user."""
    try:
        return ROOT / Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no user {path.partition('/')[0]}; write the folder in full") from None


class Settings(BaseModel):
    """What every script knows. A script with settings of its own (`resume`, `index`, ...) adds them in a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    UNREAD: ClassVar[frozenset[str]] = frozenset()  # settings that mean nothing to a script, which then refuses them

    recipe: str = Field("", description="take the settings of recipes/NAME.json; empty = Task 1, as config.json has it")
    data_dir: str = Field("data", min_length=1, description="folder that has, or will have, FashionMNIST/raw/")
    out_dir: str = Field("", description="folder for all that a run writes; empty = . for Task 1, runs/NAME for a recipe")
    seed: int = Field(0, ge=0, lt=2**31, description="of the split, the initial parameters, the order and the augmentation")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where the network runs; auto = a GPU if any")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the network's arithmetic; auto = training in bfloat16 where the device has units for it"
    )
    batch_size: int = Field(192, ge=1, le=60_000, description="images a training step")
    limit: int = Field(0, ge=0, description="for a dry run, use only the first N training images after the shuffle; 0 = all")

    architecture: Literal[
        "cnn",
        "mlp",
        "deep_cnn",
        "deep_cnn_dropout",
        "compact_cnn",
        "resnet8",
        "resnet14",
        "resnet18",
        "resnet18_56",
        "wide_resnet",
        "fast_cnn",
    ] = Field("cnn", description="the network, as networks.py names it")
    pretrained: bool = Field(False, description="resnet18 starts from torchvision's ImageNet weights, which are downloaded")
    dropout: float = Field(-1.0, ge=-1, lt=1, description="probability in every dropout layer; -1 = the network's own")
    activation: Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh"] = Field(
        "relu", description="the network's non-linearity"
    )
    init: Literal["default", "he", "xavier", "orthogonal"] = Field(
        "default", description="of convolutions' and linear layers' weights; default = PyTorch's"
    )
    whiten: bool = Field(
        False, description="the first convolution is set to the principal patterns of the images' patches, and stays"
    )
    batch_norm: bool = Field(
        False,
        description="train with batch normalisation after every convolution and hidden linear layer; it becomes part of "
        "their weights in what is validated and kept",
    )
    output_dim: Literal[2, 10] = Field(2, description="classes: 2 = clothes or shoe, 10 = the garments")
    scaling: Literal["standard", "symmetric"] = Field(
        "standard", description="of the pixels: mean 0 and standard deviation 1 over the training images, or -1 to 1"
    )
    valid_ratio: float = Field(0.1, gt=0, lt=1, description="share of the training images kept for validation")
    folds: int = Field(
        0, ge=0, le=100, description="K > 1: cross-validation, K networks, each validated on its own K-th; 0 = none"
    )
    runs: int = Field(
        1, ge=1, le=100, description="N networks, each with its own split and seed; the lowest validation loss is kept"
    )
    epochs: int = Field(
        7, ge=1, le=100_000, description="passes over the training images, or a share of them (see first_share, hard_share)"
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="sgd has Nesterov momentum 0.9")
    lr: float = Field(0.02, gt=0, description="peak of the schedule")
    weight_decay: float = Field(0.0, ge=0, description="added to the gradient; adamw: decoupled from it")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target given to all classes alike")
    teacher: str = Field(
        "",
        description="a best_model.pt, trained on the same split, whose probabilities are targets too, or a targets.pt, where "
        "teach.py wrote them down; empty = none",
    )
    teacher_share: float = Field(
        0.9, ge=0, le=1, description="of the loss that follows the teacher; the rest follows the labels"
    )
    temperature: float = Field(2.0, gt=0, description="divides the logits of teacher and network where they are compared")
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the weights' exponential moving average (EMA), which is what is validated and kept; 0 = none",
    )
    schedule: Literal["none", "cosine", "one_cycle", "plateau"] = Field(
        "one_cycle",
        description="none = constant; cosine and one_cycle = warm-up, then down to 0 along a cosine or a line; "
        "plateau = a tenth after every 4 epochs without a lower validation loss",
    )
    warmup: float = Field(0.25, ge=0, lt=1, description="share of all steps in which cosine and one_cycle rise linearly")
    augment: str = Field(
        "shift:1",
        description="list of name or name:strength, e.g. hflip:0.5,shift:2; "
        + "; ".join(f"{name}: {unit}, 0 to {top}, default {default}" for name, (default, top, unit) in AUGMENTATIONS.items()),
    )
    gan_share: float = Field(0.3, ge=0, lt=1, description="augment=gan: share of the images to choose from that is generated")
    gan_fresh: bool = Field(False, description="augment=gan: generate other images for each epoch")
    generator: str = Field("runs/gan/generator.pt", description="augment=gan: what gan.py train made")
    auxiliary: float = Field(
        0.5, ge=0, description="weight of a second loss on the ten garments, from a head of its own; 0 = none"
    )
    first_share: float = Field(
        0.4,
        gt=0,
        le=1,
        description="share of the training images, drawn at random, that the first epoch visits; 1 = all",
    )
    hard_share: float = Field(
        0.12,
        gt=0,
        le=1,
        description="share of the training images that each epoch after the first visits: "
        "half those with the highest loss so far, half at random; 1 = all",
    )
    patience: int = Field(0, ge=0, description="stop after N epochs without a lower validation loss; 0 = never")

    @field_validator("augment")
    @classmethod
    def _known_augmentations(cls, text: str) -> str:
        parse_augment(text)
        return text

    @field_validator("dropout")
    @classmethod
    def _minus_one_or_a_probability(cls, dropout: float) -> float:
        if -1 < dropout < 0:
            raise ValueError("it should be a probability, or -1")
        return dropout

    @field_validator("folds")
    @classmethod
    def _several_folds(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("one fold would leave nothing to train on")
        return folds

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.folds and self.runs > 1:
            raise ValueError(f"runs={self.runs} and folds={self.folds}: choose one of the two, leave the other at its default")
        several = f"folds={self.folds}" if self.folds else f"runs={self.runs}" if self.runs > 1 else ""
        if several and (self.teacher or "gan" in parse_augment(self.augment)):
            what = f"teacher={self.teacher}" if self.teacher else f"augment={self.augment}"
            raise ValueError(f"{what}: has learnt from images that other splits validate on; leave {several} out")
        if self.pretrained and not self.architecture.startswith("resnet18"):
            raise ValueError(f"pretrained=true: there are ImageNet weights for resnet18, not for {self.architecture}")
        return self

    def __str__(self) -> str:
        """The command line that gives these settings."""
        return shlex.join(f"{key}={_as_text(value)}" for key, value in self.model_dump(exclude=set(self.UNREAD)).items())

    @property
    def out_path(self) -> Path:
        folder = self.out_dir or (f"runs/{self.recipe}" if self.recipe else ".")
        return resolve(folder)

    @property
    def data_path(self) -> Path:
        return resolve(self.data_dir)


# What a script that trains no network refuses: all but what every script knows.
OF_TRAINING = frozenset(Settings.model_fields) - frozenset(
    "recipe data_dir out_dir seed device precision batch_size limit".split()
)


def parse_augment(text: str) -> dict[str, float]:
    """`"hflip:0.5,shift:2"` -> `{"hflip": 0.5, "shift": 2.0}`. Raises ValueError on an unknown name or strength."""
    strengths = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, strength = item.partition(":")
        if name not in AUGMENTATIONS:
            raise ValueError(f"{name!r} is no augmentation; known: {', '.join(AUGMENTATIONS)}")
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


SomeSettings = TypeVar("SomeSettings", bound=Settings)


def load_settings(arguments: list[str], settings_type: type[SomeSettings]) -> SomeSettings:
    """Merge `config.json`, the recipe and the command line's `key=value` words into checked settings.

    Raises UserError, naming the key, what was given, what is allowed and the nearest valid name.
    `help` prints every setting and exits with 0.
    """
    helps = HELP & set(arguments)
    given = {}
    for word in arguments:
        if word in HELP:
            continue
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not understood; settings are written key=value, and help lists them")
        given[key] = value
    merged, recipe = _read_json(ROOT / "config.json"), {}
    if given.get("recipe"):
        recipes = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.json"))}
        if given["recipe"] not in recipes:
            raise UserError(f"recipe={given['recipe']}: there is no such recipe; known: {', '.join(recipes) or 'none yet'}")
        recipe = _read_json(recipes[given["recipe"]])
        if "recipe" in recipe:
            raise UserError(f"{recipes[given['recipe']]}: names a recipe; recipes don't build on each other, copy its settings")
        merged |= recipe
    if helps:
        print(describe(settings_type, merged | given))
        raise SystemExit(0)
    for key in settings_type.UNREAD & given.keys():
        raise UserError(f"{key}={given[key]}: means nothing here; leave it out (help lists what does)")
    merged |= {key: _typed(settings_type, key, value) for key, value in given.items()}
    try:
        return settings_type(**merged)
    except ValidationError as error:
        problem = error.errors()[0]
        names = set(problem["loc"]) & recipe.keys() - given.keys()
        where = f"recipes/{given['recipe']}.json: " if names else ""
        raise UserError(where + _explain(problem, settings_type)) from None


def _read_json(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected an object of settings, found a {type(settings).__name__}")
    return settings


def _typed(settings_type: type[Settings], key: str, text: str) -> object:
    """The text as the setting's declared type where it reads as one, else unchanged, for pydantic to refuse."""
    field = settings_type.model_fields.get(key)
    if field is None or isinstance(field.default, str):
        return text
    if isinstance(field.default, bool):
        return {"true": True, "false": False}.get(text, text)
    try:
        return int(text) if isinstance(field.default, int) else float(text)
    except ValueError:
        return text


def _explain(problem: ErrorDetails, settings_type: type[Settings]) -> str:
    if not problem["loc"]:  # of two settings together
        return problem["msg"].removeprefix("Value error, ")
    key, given = str(problem["loc"][0]), problem["input"]
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, settings_type.model_fields, n=1, cutoff=0)[0]
        return f"{key}={given}: there is no setting {key!r}; the nearest is {near!r}, and help lists all"
    reason = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return f"{key}={given}: {reason} ({settings_type.model_fields[key].description})"


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe(settings_type: type[Settings], values: dict) -> str:
    """Every setting with its value, its type, its range and its meaning, for `help`."""
    lines = ["usage: python SCRIPT.py [recipe=NAME] [key=value ...]", ""]
    for key, field in settings_type.model_fields.items():
        if key in settings_type.UNREAD:
            continue
        kind = getattr(field.annotation, "__name__", "")
        if kind == "Literal":
            kind = "|".join(map(str, get_args(field.annotation)))
        for sign, bound in ((">=", "ge"), (">", "gt"), ("<=", "le"), ("<", "lt")):
            kind += "".join(f", {sign} {getattr(rule, bound)}" for rule in field.metadata if hasattr(rule, bound))
        lines.append(f"{key}={_as_text(values.get(key, field.default))}  ({kind})\n    {field.description}")
    return "\n".join(lines)


def run_script(main, arguments: list[str] | None = None) -> None:
    """Call `main(arguments)` and turn what the user can mend into one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name need not be Unicode
    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # who reads our output has seen enough of it
        os._exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt as interrupt:
        raise SystemExit(128 + getattr(interrupt, "number", signal.SIGINT)) from None
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is on disk; taking torch down in order would take another half second
