"""Changes of training images by chance: whole batches of uint8 images, on whatever device they are.

Each image has its own random numbers. torchvision's transforms draw one set for a batch, or want a call an image.
"""

import torch
import torch.nn.functional as F

from config import parse_augment


def augment(images: torch.Tensor, augmentations: str, generator: torch.Generator) -> torch.Tensor:
    """Images `(N, 1, 28, 28)`, uint8 in and out, each changed by chance as `augmentations` says ("hflip:0.5,shift:2")."""
    for name, strength in parse_augment(augmentations).items():
        if name != "gan":  # which adds images (training.Generated) and changes none
            images = FUNCTIONS[name](images, strength, generator)
    return images


def warp(images: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Images, float32 `(N, 1, H, W)` in 0..1, through the affine maps `theta` `(N, 2, 3)` from places in the result to
    places in the image, both in -1..1; bilinear, black outside."""
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).clamp_(0, 1)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(count, generator=generator, device=generator.device) * (high - low) + low


def _hflip(images: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < probability
    return torch.where(chosen, images.flip(-1), images)


def _vflip(images: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    return _hflip(images.mT, probability, generator).mT


def _shift(images: torch.Tensor, pixels: float, generator: torch.Generator) -> torch.Tensor:
    reach = int(pixels)
    row, column = torch.randint(2 * reach + 1, (2, len(images)), generator=generator, device=images.device)
    windows = F.pad(images, [reach] * 4).squeeze(1).unfold(1, 28, 1).unfold(2, 28, 1)  # (N, 2r+1, 2r+1, 28, 28), a view
    return windows[torch.arange(len(images), device=images.device), row, column].unsqueeze(1)


def _rotate(images: torch.Tensor, degrees: float, generator: torch.Generator) -> torch.Tensor:
    angle = _uniform(len(images), -degrees, degrees, generator).deg2rad()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    return _to_uint8(warp(images.float() / 255, theta))


def _crop(images: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    side = _uniform(len(images), 1 - share, 1, generator)
    right, down = (_uniform(len(images), -1, 1, generator) * (1 - side) for _ in range(2))
    zero = torch.zeros_like(side)
    theta = torch.stack([side, zero, right, zero, side, down], 1).view(-1, 2, 3)
    return _to_uint8(warp(images.float() / 255, theta))


def _noise(images: torch.Tensor, levels: float, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return (images + noise * levels).round_().clamp_(0, 255).to(torch.uint8)


def _blur(images: torch.Tensor, sigma: float, generator: torch.Generator) -> torch.Tensor:
    from torchvision.transforms.v2.functional import gaussian_blur  # here: torchvision takes a second to import

    share = _uniform(len(images), 0, 1, generator).view(-1, 1, 1, 1)
    blurred = gaussian_blur(images.float(), kernel_size=2 * int(3 * sigma) + 1, sigma=max(sigma, 1e-3))
    return images.float().lerp(blurred, share).round_().to(torch.uint8)


def _erase(images: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """A rectangle of noise: 2 % to 33 % of the image, sides at 0.3 to 3.3. Zhong et al. 2017, arXiv 1708.04896, section 3."""
    count, device = len(images), images.device
    chosen = _uniform(count, 0, 1, generator) < probability
    area = _uniform(count, 0.02, 0.33, generator) * 28 * 28
    ratio = _uniform(count, -1.2, 1.2, generator).exp()  # e^1.2 = 3.3
    line = torch.arange(28, device=device)

    def inside(side: torch.Tensor) -> torch.Tensor:  # (N, 28): which rows, or columns, the rectangle covers
        side = side.round().clamp(1, 27)
        first = (_uniform(count, 0, 1, generator) * (29 - side)).floor().unsqueeze(1)
        return (line >= first) & (line < first + side.unsqueeze(1))

    rows = inside((area * ratio).sqrt()) & chosen.unsqueeze(1)
    columns = inside((area / ratio).sqrt())
    erased = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)  # (N, 1, 28, 28)
    words = torch.randint(-(2**63), 2**63 - 1, (count, 28 * 28 // 8), generator=generator, device=device)  # 8 bytes each
    noise = words.view(torch.uint8).view(images.shape)
    return torch.where(erased, noise, images)


def _to_uint8(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round_().to(torch.uint8)


FUNCTIONS = {
    "hflip": _hflip,
    "vflip": _vflip,
    "rotate": _rotate,
    "shift": _shift,
    "crop": _crop,
    "noise": _noise,
    "blur": _blur,
    "erase": _erase,
}
