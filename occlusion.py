"""What mattered to a model's answer: cover a part of the image and see how far the probability falls.

Zeiler & Fergus 2014, arXiv 1311.2901, section 4.2.
"""

import torch
import torch.nn.functional as F

from device import choose_precision
from model import Classifier
from trainer import infer

REACH = 3.5  # pixels that a patch covers on each side of its centre
CENTRES = torch.linspace(0, 27, 7)  # rows and columns of the patches' centres


def occlusion_maps(model: Classifier, views: torch.Tensor, label: int) -> torch.Tensor:
    """By how much the probability of class `label` falls when a patch around a pixel is covered: float32 `(V, 28, 28)`, -1..1.

    `views` are uint8 `(V, 28, 28)`. The patches have the grey of the view's background, the median along its border, which is
    black for a garment that is cut out. Pixels between the centres have a value in between.
    """
    border = torch.cat([views[:, 0], views[:, -1], views[:, :, 0], views[:, :, -1]], 1)  # (V, 112)
    background = border.median(1).values.view(-1, 1, 1, 1, 1)
    is_near = (torch.arange(28) - CENTRES[:, None]).abs() <= REACH  # (7, 28)
    is_covered = is_near[:, None, :, None] & is_near[None, :, None, :]  # (7, 7, 28, 28)
    covered = torch.where(is_covered, background, views[:, None, None])  # (V, 7, 7, 28, 28)
    # covering background changes nothing: a fifth of a photograph's images are duplicates, computed once
    images, rows = torch.cat([views, covered.flatten(0, 2)]).unique(dim=0, return_inverse=True)  # rows (V + 49 V,)
    precision = choose_precision("auto", next(model.parameters()).device)  # for a picture, bfloat16 does
    parts = images.unsqueeze(1).split(50)  # all at once need a gigabyte
    probability = torch.cat([infer(model, part, precision) for part in parts]).softmax(1)[rows, label]
    fall = probability[: len(views)].view(-1, 1, 1) - probability[len(views) :].view(-1, 7, 7)
    return F.interpolate(fall.unsqueeze(1), size=(28, 28), mode="bilinear", align_corners=True)[:, 0]
