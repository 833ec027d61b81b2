"""Scenes: Fashion-MNIST garments on backgrounds, so that a model learns to read photographs from this data set alone.

A Fashion-MNIST image is cut out already: what is not black is the garment's mask. `add_scenes` gives a garment another look and
pose, lays it on a random background, and adds what photographs have: the second shoe of a pair, a wearer, a shadow, blur,
noise. Some scenes keep a black background, with the faults that cutting a garment out of a photograph leaves.

Cut, paste and learn: Dwibedi et al. 2017, arXiv 1708.01642. Domain randomization: Tobin et al. 2017, arXiv 1703.06907.
Shapes: N images; layers are float32 `(N, 2, 28, 28)`, grey value times mask and mask, both in 0..1. Coordinates are in -1..1.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data_preprocessing import task_labels

TROUSER, BAG = 1, 8  # fine labels
CUT_OUT = 0.4  # fraction of scenes on black
STAND_OUT = 0.35  # fraction of the others from which the background is subtracted
PAIR, WORN = 0.3, 0.2  # fractions of shoes in pairs; of garments, but bags, with a wearer


def indices(chosen: torch.Tensor) -> torch.Tensor:
    """Of the images for which `chosen` `(N, 1, 1, 1)` is true."""
    return torch.nonzero(chosen.flatten()).squeeze(1)


class Random:
    """Random numbers from one generator, on its device, in the shapes that are needed here."""

    def __init__(self, generator: torch.Generator):
        self.options: dict = {"generator": generator, "device": generator.device}

    def uniform(self, count: int, low: float, high: float) -> torch.Tensor:
        """`(count, 1, 1, 1)`, as everything here that is one number per image."""
        return torch.rand(count, 1, 1, 1, **self.options) * (high - low) + low

    def normal(self, count: int, side: int = 1) -> torch.Tensor:
        return torch.randn(count, 1, side, side, **self.options)

    def chance(self, count: int, probability: float) -> torch.Tensor:
        return torch.rand(count, 1, 1, 1, **self.options) < probability

    def sample_indices(self, count: int, probability: float) -> torch.Tensor:
        """Indices of images, each chosen with this probability."""
        return indices(self.chance(count, probability))

    def smooth(self, count: int, side: int) -> torch.Tensor:
        """Normal noise of `side` x `side` values, enlarged: `(count, 1, 28, 28)`."""
        return F.interpolate(self.normal(count, side), size=(28, 28), mode="bilinear")

    def axes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Coordinates down, `(28, 1)`, and to the right, `(28,)`."""
        line = torch.linspace(-1, 1, 28, device=self.options["device"])
        return line.unsqueeze(1), line

    def ramp(self, count: int) -> torch.Tensor:
        """Coordinates along a random direction, `(count, 1, 28, 28)`."""
        (down, right), angle = self.axes(), self.uniform(count, 0, 2 * math.pi)
        return angle.cos() * right + angle.sin() * down

    def texture(self, count: int, strength: float) -> torch.Tensor:
        noise = sum(self.uniform(count, 0, 1) ** 3 * self.smooth(count, side) for side in (3, 7, 14))
        return strength * (noise + 0.6 * self.uniform(count, 0, 1) ** 4 * self.normal(count, 28))

    def stripes(self, count: int) -> torch.Tensor:
        """Waves or hard-edged stripes, in -1..1."""
        waves = (2 * math.pi * self.ramp(count) / self.uniform(count, 0.2, 1.2) + self.uniform(count, 0, 2 * math.pi)).sin()
        hardness = torch.where(self.chance(count, 0.5), 6.0, 1.0)
        return ((waves - self.uniform(count, -0.7, 0.7)) * hardness).clamp(-1, 1)


class Pose(NamedTuple):
    """Where garments are: scale, tilt in radians, centre, width over height, shear, -1 for a flip; `(N, 1, 1, 1)` each."""

    scale: torch.Tensor
    tilt: torch.Tensor
    right: torch.Tensor
    down: torch.Tensor
    aspect: torch.Tensor
    shear: torch.Tensor
    flip: torch.Tensor


def paste(layers: torch.Tensor, pose: Pose, bend: float, draw: Random) -> torch.Tensor:
    """Layers in a pose, empty outside; `bend` is the largest standard deviation, in pixels, of a smooth deformation."""
    if not len(layers):
        return layers
    cos, sin = pose.tilt.cos(), pose.tilt.sin()
    # from a position in the result to the one in the image that comes there
    a, b = (x * pose.flip / (pose.scale * pose.aspect) for x in (cos + pose.shear * sin, sin - pose.shear * cos))
    c, d = (x * pose.aspect / pose.scale for x in (-sin, cos))
    theta = torch.stack([a, b, -a * pose.right - b * pose.down, c, d, -c * pose.right - d * pose.down], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(layers), 1, 28, 28], align_corners=False)
    if bend:
        offsets = F.interpolate(draw.normal(2 * len(layers), 4).view(-1, 2, 4, 4), size=(28, 28), mode="bicubic")
        grid = grid + (offsets * draw.uniform(len(layers), 0, bend / 14)).permute(0, 2, 3, 1)
    return F.grid_sample(layers, grid, align_corners=False).clamp(0, 1)


def over(below: torch.Tensor, layers: torch.Tensor) -> torch.Tensor:
    return below * (1 - layers[:, 1:]) + layers[:, :1]


def cut_out(images: torch.Tensor, draw: Random) -> torch.Tensor:
    """Layers of uint8 garments. Half of the masks are closed: a black speck is a part of the garment, or a gap in it."""
    grey = images.float() / 255
    mask = (grey > 0.04).float()
    closed = -F.max_pool2d(-F.max_pool2d(mask, 3, 1, 1), 3, 1, 1)
    mask = torch.where(draw.chance(len(images), 0.5), closed, mask)
    return torch.cat([grey * mask, mask], 1)


def dress_up(layers: torch.Tensor, draw: Random) -> torch.Tensor:
    """Another look: negative or not (the data set's images are negatives), contrast, stripes, a print."""
    grey, mask = layers[:, :1], layers[:, 1:]
    count, (down, right) = len(layers), draw.axes()
    grey = torch.where(draw.chance(count, 0.5), grey, 1 - grey).clamp(1e-3, 1) ** draw.uniform(count, -0.7, 0.7).exp()
    darkest = draw.uniform(count, 0, 0.6)
    grey = darkest + ((darkest + draw.uniform(count, 0.3, 1)).clamp(max=1) - darkest) * grey
    for probability in (0.15, 0.06):  # twice: checks
        i = draw.sample_indices(count, probability)
        grey[i] += draw.uniform(len(i), -0.35, 0.35) * draw.stripes(len(i))
    i = draw.sample_indices(count, 0.12)
    x = (right - draw.uniform(len(i), -0.2, 0.2)) / draw.uniform(len(i), 0.1, 0.4)
    y = (down - draw.uniform(len(i), -0.4, 0.3)) / draw.uniform(len(i), 0.1, 0.4)
    grey[i] += (x**2 + y**2 < 1) * (draw.uniform(len(i), -0.5, 0.5) + draw.texture(len(i), 0.3))
    return torch.cat([grey.clamp(0, 1) * mask, mask], 1)


def background(count: int, others: torch.Tensor, draw: Random) -> torch.Tensor:
    """Flat, sloping, textured and striped grounds, walls and floors, and parts of other garments (of layers `others`)."""
    ground = draw.uniform(count, 0, 1) + draw.chance(count, 0.5) * draw.uniform(count, 0, 0.2) * draw.ramp(count)
    i = draw.sample_indices(count, 0.5)
    ground[i] += draw.texture(len(i), 0.25)
    for probability in (0.25, 0.1):
        i = draw.sample_indices(count, probability)
        ground[i] += draw.uniform(len(i), -0.25, 0.25) * draw.stripes(len(i))
    for probability in (0.25, 0.1):
        i = draw.sample_indices(count, probability)
        side = ((draw.ramp(len(i)) - draw.uniform(len(i), -0.9, 0.9)) * 10).clamp(-0.5, 0.5) + 0.5
        ground[i] = ground[i].lerp(draw.uniform(len(i), 0, 1).expand_as(side), side)
    i = draw.sample_indices(count, 0.12)
    one = torch.ones_like(draw.uniform(len(i), 0, 1))
    angle, right, down = draw.uniform(len(i), -math.pi, math.pi), draw.uniform(len(i), -1, 1), draw.uniform(len(i), -1, 1)
    pose = Pose(draw.uniform(len(i), 0.6, 1.8), angle, right, down, one, 0 * one, one)
    ground[i] = over(ground[i], paste(others[i], pose, 0, draw))
    return ground.clamp(0, 1)


def add_wearer(ground: torch.Tensor, fine_labels: torch.Tensor, pose: Pose, draw: Random) -> torch.Tensor:
    """Grounds with the parts of a person that show: a head and legs with a top, a body above trousers, a leg above a shoe."""
    count, (down, right) = len(ground), draw.axes()
    is_shoe, is_trouser = (mask.view(-1, 1, 1, 1) for mask in (task_labels(fine_labels, 2).bool(), fine_labels == TROUSER))
    is_top = ~is_shoe & ~is_trouser
    skin, cloth = draw.uniform(count, 0.15, 0.85), draw.uniform(count, 0, 1)
    x, y = (right - pose.right) / pose.scale, (down - pose.down) / pose.scale  # the garment is in -1..1
    head = (x / 0.8) ** 2 + (y + draw.uniform(count, 1.05, 1.25)) ** 2 < draw.uniform(count, 0.22, 0.32) ** 2
    legs = (x.abs() < draw.uniform(count, 0.2, 0.5)) & (y > 0.6) & ~((x.abs() < 0.08) & draw.chance(count, 0.4))
    body = (x.abs() < draw.uniform(count, 0.25, 0.5)) & (y < -0.7)
    leg = x - draw.uniform(count, -0.5, 0.5) - draw.uniform(count, -0.5, 0.5) * y
    leg = (leg.abs() < draw.uniform(count, 0.12, 0.35)) & (y < 0)
    ground = torch.where(is_top & head, skin, ground)
    ground = torch.where((is_top & legs) | (is_trouser & body), cloth, ground)
    return torch.where(is_shoe & leg, torch.where(draw.chance(count, 0.5), skin, cloth), ground)


def stand_out(scenes: torch.Tensor) -> torch.Tensor:
    """What differs from the border's median in the garment's direction: `photo.to_fashion_mnist` on scenes `(N, 1, 28, 28)`."""
    border = torch.cat([scenes[..., 0, :], scenes[..., -1, :], scenes[..., 0], scenes[..., -1]], -1)  # (N, 1, 112)
    ground = border.median(-1, keepdim=True).values.unsqueeze(-1)  # (N, 1, 1, 1)
    is_darker = (scenes - ground).mean((2, 3), keepdim=True) < 0
    return torch.where(is_darker, (ground - scenes) / ground.clamp(min=0.01), (scenes - ground) / (1 - ground).clamp(min=0.01))


def make_scenes(images: torch.Tensor, fine_labels: torch.Tensor, draw: Random) -> torch.Tensor:
    """A scene with each of the garments, uint8 `(N, 1, 28, 28)` in and out."""
    count = len(images)
    layers = dress_up(cut_out(images, draw), draw)
    is_shoe = task_labels(fine_labels, 2).bool().view(-1, 1, 1, 1)
    is_cut_out = draw.chance(count, CUT_OUT)
    is_pair = is_shoe & draw.chance(count, PAIR)
    is_worn = draw.chance(count, WORN) & ~is_pair & ~is_cut_out & (fine_labels != BAG).view(-1, 1, 1, 1)
    stands_upright = is_pair & draw.chance(count, 0.4)  # as a pair photographed from above

    scale = torch.where(is_cut_out, draw.uniform(count, 0.8, 1.08), draw.uniform(count, 0.55, 1.2))
    scale = scale * torch.where(is_pair | is_worn, 0.75, 1.0)
    tilt = 12 * draw.normal(count)  # degrees
    is_turned = draw.chance(count, 0.05) | (is_shoe & draw.chance(count, 0.1))
    tilt = torch.where(is_turned, draw.uniform(count, -180, 180), tilt)
    upright = torch.where(draw.chance(count, 0.5), 90.0, -90.0) + 15 * draw.normal(count)
    tilt = torch.where(stands_upright, upright, tilt).deg2rad()
    room = 0.7 * (1.1 - scale).clamp(min=0.05)
    right, down = draw.uniform(count, -1, 1) * room, draw.uniform(count, -1, 1) * room
    apart, direction = draw.uniform(count, 0.12, 0.33) * is_pair, draw.uniform(count, -math.pi, math.pi) * ~stands_upright
    right_apart, down_apart = apart * direction.cos(), apart * direction.sin()
    flip = torch.where(draw.chance(count, 0.5), -1.0, 1.0)
    shear = draw.uniform(count, -0.2, 0.2) * draw.chance(count, 0.4)
    pose = Pose(scale, tilt, right + right_apart, down + down_apart, draw.uniform(count, -0.2, 0.2).exp(), shear, flip)
    placed = paste(layers, pose, 1.0, draw)

    result = background(count, layers.roll(1, 0), draw)
    i = indices(is_worn)
    result[i] = add_wearer(result[i], fine_labels[i], Pose(*(part[i] for part in pose)), draw)
    shadow = F.avg_pool2d(placed[:, 1:], 5, 1, 2).roll((1, 1), (2, 3))
    result = result * (1 - draw.chance(count, 0.4) * draw.uniform(count, 0, 0.5) * shadow) * ~is_cut_out
    i = indices(is_pair)  # the other shoe
    other = Pose(*(part[i] for part in pose))
    other = other._replace(
        scale=other.scale * draw.uniform(len(i), 0.9, 1.1),
        tilt=other.tilt + draw.normal(len(i)) * torch.where(stands_upright[i], 0.1, 0.4),
        right=(right - right_apart)[i],
        down=(down - down_apart)[i],
        flip=torch.where(stands_upright[i] | draw.chance(len(i), 0.3), other.flip, -other.flip),
    )
    result[i] = over(result[i], paste(layers[i], other, 1.0, draw))
    result = over(result, placed)

    i = indices(is_cut_out & draw.chance(count, 0.3))  # ground that was left
    rest = draw.texture(len(i), 0.25).abs() * (draw.smooth(len(i), 5) > 0.8)
    result[i] = torch.maximum(result[i], rest * (1 - placed[i, 1:]))
    i = indices(is_cut_out & draw.chance(count, 0.12))  # garment that was cut away
    result[i] *= draw.smooth(len(i), 6) > -0.7
    i = indices(~is_cut_out & draw.chance(count, STAND_OUT))
    result[i] = stand_out(result[i]).clamp(0, 1)
    i = draw.sample_indices(count, 0.3)
    blurred = F.avg_pool2d(F.pad(result[i], (1, 1, 1, 1), mode="replicate"), 3, 1)
    result[i] = result[i].lerp(blurred, draw.uniform(len(i), 0, 1).expand_as(blurred))
    i = draw.sample_indices(count, 0.4)
    result[i] += draw.uniform(len(i), 0, 0.04) * draw.normal(len(i), 28)
    return (result.clamp(0, 1) * 255).round().to(torch.uint8)


def plain_count(count: int, fraction: float) -> int:
    """How many of a batch's images, the first ones, stay as they are."""
    return count - round(count * fraction)


def add_scenes(images: torch.Tensor, fine_labels: torch.Tensor, fraction: float, generator: torch.Generator) -> torch.Tensor:
    """uint8 images `(N, 1, 28, 28)` of the classes `fine_labels` `(N,)`, in random order; the last `fraction` become scenes."""
    first = plain_count(len(images), fraction)
    if first == len(images):
        return images
    return torch.cat([images[:first], make_scenes(images[first:], fine_labels[first:], Random(generator))])
