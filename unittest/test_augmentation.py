"""Augmentation: random for each image, in whole batches, reproducible from the generator's seed."""

import pytest
import torch

import augmentation
from augmentation import FUNCTIONS
from config import AUGMENTATIONS


@pytest.fixture(scope="module")
def images(train_data):
    return train_data[0][:400]


def augment(images, augmentations):
    labels = torch.arange(len(images)) % 10
    return augmentation.augment(images, labels, augmentations, torch.Generator().manual_seed(0))


def test_settings_know_every_augmentation():
    assert set(AUGMENTATIONS) == {*FUNCTIONS, "scene", "gan"}  # gan adds images and changes none


@pytest.mark.parametrize("name", [*FUNCTIONS, "scene"])
def test_strength_0_changes_nothing(name, images):
    assert augment(images, f"{name}:0").equal(images)


@pytest.mark.parametrize("name", [*FUNCTIONS, "scene"])
def test_each_image_has_its_own_random_change(name, images):
    copies = images[:1].expand(200, -1, -1, -1).clone()
    changed = augment(copies, name)
    assert changed.shape == copies.shape and changed.dtype == torch.uint8
    assert len(changed.unique(dim=0)) >= {"hflip": 2, "vflip": 2, "shift": 20}.get(name, 80)
    assert changed.equal(augment(copies, name))
    assert copies.equal(images[:1].expand(200, -1, -1, -1))


@pytest.mark.parametrize("name, axis", [("hflip", -1), ("vflip", -2)])
def test_flips_have_the_given_probability(name, axis, images):
    assert augment(images, f"{name}:1").equal(images.flip(axis))
    flipped = (augment(images, f"{name}:0.25") == images.flip(axis)).flatten(1).all(1)
    assert 0.15 < flipped.double().mean() < 0.35


def test_shift_moves_whole_images_by_at_most_its_strength():
    images = torch.zeros(500, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 14, 14] = 255
    places = augment(images, "shift:2").nonzero()
    assert len(places) == 500  # no pixel is lost
    assert set(places[:, 2].tolist()) == set(places[:, 3].tolist()) == {12, 13, 14, 15, 16}


def test_rotate_rotates_about_the_centre_by_at_most_its_strength():
    images = torch.zeros(500, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 12:16, 22:26] = 255  # its centre is 10 pixels right of the image's, 13.5
    rotated = augment(images, "rotate:30").double()
    row, column = (
        (rotated * torch.arange(28).view(shape)).sum((1, 2, 3)) / rotated.sum((1, 2, 3)) for shape in ((28, 1), (1, 28))
    )
    angle = torch.atan2(row - 13.5, column - 13.5).rad2deg()
    assert angle.abs().max() < 30.5 and angle.min() < -25 and angle.max() > 25
    assert torch.hypot(row - 13.5, column - 13.5) == pytest.approx(torch.full((500,), 10.0), abs=0.2)


def test_crop_enlarges_by_at_most_its_strength():
    images = torch.zeros(500, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 11:17, 11:17] = 255
    sides = (augment(images, "crop:0.5").double() / 255).sum((1, 2, 3)).sqrt()
    assert sides.min() >= 5.9 and sides.max() <= 12.1 and sides.max() > 11


def test_noise_has_the_given_standard_deviation():
    grey = torch.full((200, 1, 28, 28), 128, dtype=torch.uint8)
    assert augment(grey, "noise:20").double().std().item() == pytest.approx(20, rel=0.02)


def test_blur_keeps_the_sum_of_the_pixels_and_smooths_edges():
    images = torch.zeros(200, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 8:20, 8:20] = 200
    blurred = augment(images, "blur:1.5").double()
    assert blurred.sum((1, 2, 3)) == pytest.approx(images.double().sum((1, 2, 3)), rel=0.01)
    assert blurred.diff(dim=3).abs().amax((1, 2, 3)).min() < 100


def test_erase_covers_rectangles_of_the_sizes_in_the_paper():
    black = torch.zeros(1_000, 1, 28, 28, dtype=torch.uint8)
    erased = augment(black, "erase:1").squeeze(1) > 0
    heights, widths = erased.any(2).sum(1), erased.any(1).sum(1)
    area = heights * widths / 784
    assert area.min() > 0.01 and area.max() < 0.36 and 0.1 < area.mean() < 0.25
    assert (heights / widths).log().abs().max() < 2.0
    assert (augment(black, "erase:0.3").flatten(1) > 0).any(1).double().mean().item() == pytest.approx(0.3, abs=0.05)
