"""The conditional GAN's generator and discriminator, and sampling from a trained generator.

Classes are weights, float32 `(N, 10)`, that add up to 1: one-hot for a class, anything between for an interpolation.
Miyato & Koyama 2018, arXiv 1802.05637 (projection, conditional batch normalisation); Miyato et al. 2018, arXiv
1802.05957 (spectral normalisation); Odena et al. 2017, arXiv 1610.09585 (auxiliary classifier); Radford et
al. 2016, arXiv 1511.06434 (DCGAN's layers).
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

import checkpoint
from config import TrainSettings, parse_augment, resolve
from data_preprocessing import Dataset, Split, task_labels

CLASSES = 10
NOISE_DIM = 64


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    """int64 `(N,)` -> float32 `(N, 10)`."""
    return F.one_hot(labels, CLASSES).float()


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation with a gain and a bias for each class."""

    def __init__(self, channels: int):
        super().__init__()
        self.normalise = nn.BatchNorm2d(channels, affine=False)
        self.gain = nn.Parameter(torch.ones(CLASSES, channels))
        self.bias = nn.Parameter(torch.zeros(CLASSES, channels))

    def forward(self, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        gain, bias = (classes @ table for table in (self.gain, self.bias))  # (N, 10) -> (N, channels)
        x = self.normalise(x)
        return torch.addcmul(bias[:, :, None, None].to(x.dtype), gain[:, :, None, None].to(x.dtype), x)


class Generator(nn.Module):
    """Noise `(N, 64)`, from a standard normal distribution, and classes -> images `(N, 1, 28, 28)` in -1..1.

    336,993 parameters.
    """

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(NOISE_DIM + CLASSES, 64 * 7 * 7)
        upsample = partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1, bias=False)
        self.layers = nn.ModuleList([upsample(64, 64), upsample(64, 32), nn.Conv2d(32, 1, 3, padding=1)])  # 7 -> 14 -> 28
        self.norms = nn.ModuleList([ConditionalBatchNorm(channels) for channels in (64, 64, 32)])
        self.to(memory_format=torch.channels_last)

    def forward(self, noise: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        x = self.project(torch.cat([noise, classes], 1))  # (N, 3136)
        x = x.view(-1, 7, 7, 64).permute(0, 3, 1, 2)  # (N, 64, 7, 7), channels last
        for norm, layer in zip(self.norms, self.layers):
            x = layer(F.relu(norm(x, classes)))
        return torch.tanh(x.float())


class Discriminator(nn.Module):
    """Images `(N, 1, 28, 28)` in -1..1 and classes -> scores `(N,)`, high for real images of that class, and logits `(N, 10)`
    of an auxiliary classifier."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential()
        for shape in ((1, 32, 4, 2), (32, 64, 4, 2), (64, 128, 3, 1), (128, 256, 3, 2)):  # 28 -> 14 -> 7 -> 7 -> 4
            self.layers.append(spectral_norm(nn.Conv2d(*shape, padding=1)))  # channels in and out, size, stride
            self.layers.append(nn.LeakyReLU(0.1, inplace=True))
        self.score = spectral_norm(nn.Linear(256, 1))
        self.project = spectral_norm(nn.Linear(CLASSES, 256, bias=False))
        self.classify = nn.Linear(256, CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.layers(x).sum((2, 3))  # (N, 256, 4, 4) -> (N, 256)
        score = self.score(features).squeeze(1) + (features * self.project(classes)).sum(1)
        return score, self.classify(features).float()


@torch.inference_mode()
def generate(generator: Generator, classes: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """uint8 images `(N, 1, 28, 28)`, on the generator's device, of `classes` `(N, 10)` from `noise` `(N, 64)`."""
    generator.eval()
    batches = tqdm(list(zip(noise.split(500), classes.split(500))), "generating", delay=1, disable=None, leave=False)
    return torch.cat([generator(*batch).add_(1).mul_(127.5).round_().to(torch.uint8) for batch in batches])


def fixed_noise(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise `(10 * columns, 64)` and classes of a grid of samples: rows are classes, a column has the same noise."""
    noise = torch.randn(columns, NOISE_DIM, generator=torch.Generator().manual_seed(0))
    return noise.repeat(CLASSES, 1), one_hot(torch.arange(CLASSES).repeat_interleave(columns))


def draw(generator: Generator, labels: torch.Tensor, seed: int, noise_std: float = 1.0) -> torch.Tensor:
    """uint8 images `(N, 1, 28, 28)` of the classes `labels` `(N,)`, the same for the same seed.

    `noise_std`: below 1, samples are more typical and less varied (truncation; Brock et al. 2019, arXiv 1809.11096, 3.1).
    """
    device = next(generator.parameters()).device
    noise = torch.randn(len(labels), NOISE_DIM, generator=torch.Generator().manual_seed(seed)) * noise_std
    return generate(generator, one_hot(labels).to(device), noise.to(device))


def load_generator(path: Path) -> tuple[Generator, dict]:
    """A trained generator, in evaluation mode, and the settings under which it was trained.

    Raises UserError if the file is missing, damaged, foreign or of another kind.
    """
    contents = checkpoint.load(path, "generator")
    generator = Generator()
    checkpoint.load_parameters(generator, contents["model"], path)
    return generator.eval(), contents["settings"]


def add_generated(split: Split, settings: TrainSettings) -> Split:
    """The split, with generated images among the training images, as many of each class, if `augment` has "gan".

    Raises UserError if the generator's file is missing or damaged, or if it was trained on this split's validation images.
    """
    noise_std = parse_augment(settings.augment).get("gan")
    if noise_std is None or not settings.gan_fraction:
        return split
    path, device = resolve(settings.generator), split.data.images.device
    generator, generator_settings = load_generator(path)
    checkpoint.check_same_split(path, generator_settings, settings.seed, settings.valid_ratio)
    count = max(1, round(len(split.train) * settings.gan_fraction / (1 - settings.gan_fraction)))
    labels = torch.arange(count, device=device) % CLASSES
    data, task = split.data, task_labels(labels, len(split.data.class_names))
    images = torch.cat([data.images, draw(generator.to(device), labels, settings.seed, noise_std)])
    train = torch.cat([split.train, torch.arange(len(data.images), len(images), device=device)])
    all_labels, all_fine_labels = torch.cat([data.labels, task]), torch.cat([data.fine_labels, labels])
    return Split(Dataset(images, all_labels, data.class_names, all_fine_labels), train, split.valid, generated=count)
