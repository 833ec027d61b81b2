import pytest

from config import Settings, load_settings
from data_preprocessing import load_images


@pytest.fixture(scope="session")
def data_path():
    return load_settings([], Settings).data_path


@pytest.fixture(scope="session")
def train_data(data_path):
    return load_images("train", data_path)
