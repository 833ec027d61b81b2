"""Scenes: garments on backgrounds."""

import pytest
import torch

from scenes import Pose, Random, add_scenes, background, cut_out, make_scenes, over, paste


@pytest.fixture
def draw():
    return Random(torch.Generator().manual_seed(0))


def pose(count=1, **parts):
    """A pose that changes nothing, but for these parts."""
    one = torch.ones(count, 1, 1, 1)
    return Pose(one, 0 * one, 0 * one, 0 * one, one, 0 * one, one)._replace(
        **{key: value * one for key, value in parts.items()}
    )


@pytest.fixture
def layers(train_data, draw):
    return cut_out(train_data[0][:8], draw)


def test_a_garment_covers_what_is_below_it(train_data, layers):
    ground = torch.full((8, 1, 28, 28), 0.5)
    result, inside = over(ground, layers), layers[:, 1:] == 1
    assert torch.allclose(result[inside], train_data[0][:8][inside] / 255) and (result[~inside] == 0.5).all()


def test_the_upright_pose_of_full_size_changes_nothing(layers, draw):
    assert torch.allclose(paste(layers, pose(8), 0, draw), layers, atol=1e-5)


@pytest.mark.parametrize(
    "parts, expected", [({"flip": -1}, lambda x: x.flip(-1)), ({"tilt": torch.pi}, lambda x: x.flip(-1, -2))]
)
def test_flips_and_half_turns_are_exact(parts, expected, layers, draw):
    assert torch.allclose(paste(layers, pose(8, **parts), 0, draw), expected(layers), atol=1e-4)


def test_a_pose_moves_and_shrinks_the_garment(draw):
    square = torch.ones(1, 2, 28, 28)
    placed = paste(square, pose(scale=0.5, right=0.5, down=-0.5), 0, draw)[0, 1]
    rows, columns = torch.nonzero(placed > 0.5).unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 13, 14, 27)


def test_the_given_fraction_become_scenes(train_data):
    images, labels = train_data[0][:1000], train_data[1][:1000]
    scenes = add_scenes(images, labels, 0.3, torch.Generator().manual_seed(0))
    assert (scenes != images).flatten(1).any(1).tolist() == [False] * 700 + [True] * 300


@pytest.mark.parametrize("label", [0, 1, 7, 8])  # a top, trousers, a shoe, a bag
def test_a_batch_may_have_one_image(label, train_data, draw):
    for _ in range(30):  # some of which have a pair, a wearer, nothing
        assert make_scenes(train_data[0][:1], torch.tensor([label]), draw).shape == (1, 1, 28, 28)


def test_backgrounds_are_dark_light_and_busy(layers, draw):
    grounds = background(200, layers.repeat(25, 1, 1, 1), draw)
    assert grounds.min() >= 0 and grounds.max() <= 1
    means, stds = grounds.mean((1, 2, 3)), grounds.std((1, 2, 3))
    assert means.min() < 0.2 and means.max() > 0.8 and stds.min() < 1e-6 and stds.max() > 0.2


def test_bags_are_never_worn_nor_in_pairs_but_sneakers_are(train_data, monkeypatch):
    """Counted by the calls that draw them: on average 0.2 * 0.6 of the garments are worn, 0.3 of the shoes are in pairs."""
    import scenes

    worn = []
    monkeypatch.setattr(scenes, "add_wearer", lambda ground, labels, *_: worn.append(len(labels)) or ground)
    for label in (8, 7):
        make_scenes(train_data[0][:500], torch.full((500,), label), Random(torch.Generator().manual_seed(0)))
    assert worn[0] == 0 and worn[1] == pytest.approx(500 * 0.7 * 0.6 * 0.2, abs=20)
