"""Random augmentation of training images: whole batches of uint8 images, on their device.

Each image has its own random numbers; torchvision's transforms draw one set for a batch, or need one call per image.
"""

import torch
import torch.nn.functional as F

from config import parse_augment
from scenes import add_scenes


def augment(images: torch.Tensor, fine_labels: torch.Tensor, augmentations: str, generator: torch.Generator) -> torch.Tensor:
    """Images `(N, V, 28, 28)`, uint8 in and out, each of the V views changed at random as `augmentations` says
    ("hflip:0.5,shift:2"). `scene` needs one view, and `fine_labels`, int64 `(N,)`."""
    shape, images = images.shape, images.view(-1, 1, 28, 28)
    for name, strength in parse_augment(augmentations).items():
        if name == "scene":
            images = add_scenes(images, fine_labels, strength, generator)
        elif name != "gan":  # which adds images (gan.networks.add_generated) and changes none
            images = FUNCTIONS[name](images, strength, generator)
    return images.reshape(shape)


def warp(images: torch.Tensor, *theta: torch.Tensor) -> torch.Tensor:
    """Images, uint8 `(N, 1, H, W)` -> float32 in 0..1, through affine maps from coordinates in the result to coordinates in
    the image, both in -1..1; bilinear, black outside. `theta`: the six entries of the maps, row by row, `(N,)` each."""
    grid = F.affine_grid(torch.stack(theta, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images.float() / 255, grid, align_corners=False).clamp_(0, 1)


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(count, generator=generator, device=generator.device) * (high - low) + low


def hflip(images: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    chosen = uniform(len(images), 0, 1, generator).view(-1, 1, 1, 1) < probability
    return torch.where(chosen, images.flip(-1), images)


def vflip(images: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    return hflip(images.mT, probability, generator).mT


def shift(images: torch.Tensor, pixels: float, generator: torch.Generator) -> torch.Tensor:
    reach = int(pixels)
    row, column = torch.randint(2 * reach + 1, (2, len(images)), generator=generator, device=images.device)
    windows = F.pad(images, [reach] * 4).squeeze(1).unfold(1, 28, 1).unfold(2, 28, 1)  # (N, 2r+1, 2r+1, 28, 28), a view
    return windows[torch.arange(len(images), device=images.device), row, column].unsqueeze(1)


def rotate(images: torch.Tensor, degrees: float, generator: torch.Generator) -> torch.Tensor:
    angle = uniform(len(images), -degrees, degrees, generator).deg2rad()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return (warp(images, cos, -sin, zero, sin, cos, zero) * 255).round_().to(torch.uint8)


def crop(images: torch.Tensor, fraction: float, generator: torch.Generator) -> torch.Tensor:
    side = uniform(len(images), 1 - fraction, 1, generator)
    right, down = (uniform(len(images), -1, 1, generator) * (1 - side) for _ in range(2))
    zero = torch.zeros_like(side)
    return (warp(images, side, zero, right, zero, side, down) * 255).round_().to(torch.uint8)


def noise(images: torch.Tensor, levels: float, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(images.shape, generator=generator, device=images.device)
    return (images + normal * levels).round_().clamp_(0, 255).to(torch.uint8)


def blur(images: torch.Tensor, sigma: float, generator: torch.Generator) -> torch.Tensor:
    from torchvision.transforms.v2.functional import gaussian_blur  # here: torchvision takes a second to import

    weight = uniform(len(images), 0, 1, generator).view(-1, 1, 1, 1)
    blurred = gaussian_blur(images.float(), kernel_size=2 * int(3 * sigma) + 1, sigma=max(sigma, 1e-3))
    return images.float().lerp(blurred, weight).round_().to(torch.uint8)


def erase(images: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """A rectangle of noise: 2 % to 33 % of the image, sides at 0.3 to 3.3. Zhong et al. 2017, arXiv 1708.04896, section 3."""
    count, device = len(images), images.device
    chosen = uniform(count, 0, 1, generator) < probability
    area = uniform(count, 0.02, 0.33, generator) * 28 * 28
    ratio = uniform(count, -1.2, 1.2, generator).exp()  # e^1.2 = 3.3
    line = torch.arange(28, device=device)

    def inside(side: torch.Tensor) -> torch.Tensor:  # (N, 28): which rows, or columns, the rectangle covers
        side = side.round().clamp(1, 27)
        first = (uniform(count, 0, 1, generator) * (29 - side)).floor().unsqueeze(1)
        return (line >= first) & (line < first + side.unsqueeze(1))

    rows = inside((area * ratio).sqrt()) & chosen.unsqueeze(1)
    columns = inside((area / ratio).sqrt())
    erased = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)  # (N, 1, 28, 28)
    words = torch.randint(-(2**63), 2**63 - 1, (count, 28 * 28 // 8), generator=generator, device=device)  # 8 bytes each
    return torch.where(erased, words.view(torch.uint8).view(images.shape), images)


FUNCTIONS = {function.__name__: function for function in (hflip, vflip, rotate, shift, crop, noise, blur, erase)}
