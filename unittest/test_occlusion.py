"""What mattered: the fall of the probability when a part of the image is covered."""

import pytest
import torch

from config import ROOT
from model import load_model
from occlusion import occlusion_maps
from trainer import infer


@pytest.fixture(scope="module")
def model():
    return load_model(ROOT / "runs" / "compact_cnn_plus" / "best_model.pt")


@pytest.mark.parametrize("row, column", [(0, 0), (9, 18), (27, 27)])
def test_at_a_patchs_centre_it_is_the_fall_under_that_patch(row, column, model, train_data):
    image, label = train_data[0][5], 2
    covered = image.clone()
    covered[:, max(0, row - 3) : row + 4, max(0, column - 3) : column + 4] = 0
    before, after = infer(model, torch.stack([image, covered])).softmax(1)[:, label]
    assert occlusion_maps(model, image, label)[0, row, column] == pytest.approx((before - after).item(), abs=0.01)  # bfloat16


def test_of_two_classes_what_one_loses_the_other_wins(train_data):
    image, two = train_data[0][0], load_model(ROOT / "best_model.pt")
    assert torch.allclose(occlusion_maps(two, image, 0), -occlusion_maps(two, image, 1), atol=1e-6)


def test_patches_have_the_grey_of_the_background(model):
    assert not occlusion_maps(model, torch.full((1, 28, 28), 90, dtype=torch.uint8), 0).any()


def test_where_there_is_nothing_nothing_mattered(model, train_data):
    image = train_data[0][1].clone()
    image[:, :14] = 0
    [fall] = occlusion_maps(model, image, int(train_data[1][1]))
    assert not fall[:9].any() and fall[14:].any()
