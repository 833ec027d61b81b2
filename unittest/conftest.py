import os

import pytest
import torch

from config import Settings, load_settings
from data_preprocessing import load_images
from model import build

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bits are compared with the CPU's, also by the processes that tests start


@pytest.fixture(scope="session")
def data_path():
    return load_settings([], Settings).data_path


@pytest.fixture(scope="session")
def train_data(data_path):
    return load_images("train", data_path)


@pytest.fixture(scope="session")
def untrained():
    """What best_model.pt holds, of a network that has not been trained."""
    torch.manual_seed(0)
    return {
        "kind": "best_model",
        "architecture": "cnn",
        "activation": "relu",
        "output_dim": 2,
        "class_names": ["clothes", "shoe"],
        "mean": 0.286,
        "std": 0.353,
        "parameters": build("cnn", 2).state_dict(),
        "epoch": 1,
    }
