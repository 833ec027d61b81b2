"""What mattered to a model's answer: cover a part of the image and see how far the probability falls.

Zeiler & Fergus 2014, arXiv 1311.2901, section 4.2.
"""

import torch
import torch.nn.functional as F

from model import Classifier
from trainer import infer

REACH = 3  # pixels that a patch covers on each side of its centre: 7x7 in all
STRIDE = 3  # pixels from one centre to the next: 10x10 patches, centred on 0, 3, ..., 27


def occlusion_map(model: Classifier, image: torch.Tensor, label: int) -> torch.Tensor:
    """By how much the probability of class `label` falls when a patch around each pixel is covered: float32 `(28, 28)`, -1..1.

    `image` is uint8 `(1, 28, 28)`. The patches have the grey of the background, the median along the border, which is black
    for a garment that is cut out. Pixels between two centres have a value in between.
    """
    background = torch.cat([image[0, 0], image[0, -1], image[0, :, 0], image[0, :, -1]]).median()
    pixels = torch.arange(28)
    is_near = (pixels - pixels[::STRIDE, None]).abs() <= REACH  # (10, 28)
    is_covered = is_near[:, None, :, None] & is_near[None, :, None, :]  # (10, 10, 28, 28)
    covered = torch.where(is_covered, background, image).flatten(0, 1)  # (100, 28, 28)
    probability = infer(model, torch.cat([image, covered]).unsqueeze(1)).softmax(1)[:, label]  # (101,)
    fall = (probability[0] - probability[1:]).view(1, 1, *is_covered.shape[:2])
    return F.interpolate(fall, size=(28, 28), mode="bilinear", align_corners=True)[0, 0]
