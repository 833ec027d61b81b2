import functools
import os

import pytest
import torch

import data_preprocessing
import test as test_script
from config import Settings
from data_preprocessing import CLASS_NAMES, Dataset, load_images
from model import build_model
from script import keep_freed_memory

# on the CPU, also in the processes that tests start; TEST_GPU=0 chooses the first GPU
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_GPU", "")
keep_freed_memory()  # as in a script: most tests call its main(), not run_script
data_preprocessing.find_idx = functools.cache(data_preprocessing.find_idx)  # unpacked and verified once, not 300 times


@pytest.fixture(scope="session")
def data_path():
    return Settings().data_path


@pytest.fixture(scope="session")
def train_data(data_path):
    return load_images("train", data_path)


@pytest.fixture(scope="session")
def dataset(train_data):
    return Dataset(*train_data, CLASS_NAMES, train_data[1])


@pytest.fixture(scope="session")
def read_training_images(train_data):
    """A function after which scripts read the first `count` training images as either split: no test evaluates test images."""

    def read(patch, count):
        images = train_data[0][:count], train_data[1][:count]
        patch.setattr(data_preprocessing, "load_images", lambda *_: images)

    return read


@pytest.fixture(scope="session")
def draw_nothing():
    """A function after which test.py draws nothing: drawing is most of its work."""

    def draw(patch):
        patch.setattr(test_script, "draw_pictures", lambda *_: None)
        patch.setattr(test_script.predict, "predict_test_image", lambda *_: None)

    return draw


@pytest.fixture(scope="session")
def untrained():
    """The contents of best_model.pt for a model that has not been trained."""
    torch.manual_seed(0)
    model = build_model("cnn", 2)
    model.set_statistics(0.286, 0.353, torch.zeros(0, 1, 28, 28, dtype=torch.uint8))
    return {
        "kind": "best_model",
        "architecture": "cnn",
        "activation": "relu",
        "output_dim": 2,
        "class_names": ["clothes", "shoe"],
        "model": model.state_dict(),
        "epoch": 1,
    }
