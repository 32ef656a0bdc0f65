"""The loss of a heat-map network: focal loss of centres, IoU loss of boxes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import complete_box_iou_loss

LARGEST_LOG = 6.0
"""Largest absolute logarithm of a distance: e**6 cells are more than any input has, and a box without
any height has no overlap to learn from."""
SPREAD = 0.54 / 6
"""Standard deviation of a box's Gaussian as a share of its side (Liu et al. 2019,
arXiv:1909.00700)."""
NARROWEST = 0.4
"""Smallest standard deviation, cells: an object may be less than a cell high."""
TRAINED = 0.3
"""Smallest value of a box's Gaussian in a cell that learns the box's sides."""
SIDES_WEIGHT = 2.0


def detection_loss(maps: Tensor, target: Tensor) -> Tensor:
    """Compute the scalar loss of ``maps`` float32 ``[N, 5, h, w]`` for boxes ``target`` float32
    ``[N, m, 5]``.

    It is the penalty-reduced focal loss of the centres (CenterNet, arXiv:1904.07850, equation 1) and
    the complete IoU loss of the boxes (Zheng et al. 2020, arXiv:1911.08287) in the cells around a
    centre, both divided by the number of objects. Boxes that are marked 0 are ignored.
    """
    height, width = maps.shape[2:]
    with torch.no_grad():
        heat, owner, ignored, boxes = _draw(target, height, width)
        objects = target[..., 4].eq(1).sum().clamp(min=1)
    centres = _focal(maps[:, 0], heat, ignored).sum() / objects
    return centres + SIDES_WEIGHT * _sides(maps[:, 1:], heat, owner, boxes, objects)


def boxes_of(sides: Tensor) -> Tensor:
    """Convert logarithms of distances ``[N, 4, h, w]`` to boxes in cells, float32 ``[N, h, w, 4]``."""
    height, width = sides.shape[2:]
    x = torch.arange(width, device=sides.device) + 0.5
    y = torch.arange(height, device=sides.device)[:, None] + 0.5
    left, top, right, bottom = sides.clamp(-LARGEST_LOG, LARGEST_LOG).exp().unbind(dim=1)
    return torch.stack([x - left, y - top, x + right, y + bottom], dim=-1)


def _draw(target: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the target heat map ``[N, h, w]``; returns also the box that owns each cell, the cells
    without loss, and the boxes in cells."""
    scale = target.new_tensor([width, height, width, height])
    boxes = target[..., :4] * scale
    real, crowd = target[..., 4] == 1, target[..., 4] == 0
    centre_x, centre_y = (boxes[..., 0] + boxes[..., 2]) / 2, (boxes[..., 1] + boxes[..., 3]) / 2
    side_x, side_y = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    columns = torch.arange(width, device=target.device)
    rows = torch.arange(height, device=target.device)
    along_x = _bell(columns, centre_x, side_x)
    along_y = _bell(rows, centre_y, side_y)
    bells = along_y[..., :, None] * along_x[..., None, :] * real[..., None, None]
    # Cells of overlapping objects belong to the smaller one, which has fewer cells.
    order = (side_x * side_y).masked_fill(~real, torch.inf)
    contested = torch.where(bells >= TRAINED, -order[..., None, None], -torch.inf)
    owner = contested.argmax(dim=1)
    inside_x = (columns + 1 > boxes[..., :1]) & (columns < boxes[..., 2:3])
    inside_y = (rows + 1 > boxes[..., 1:2]) & (rows < boxes[..., 3:4])
    inside = inside_y[..., :, None] & inside_x[..., None, :] & crowd[..., None, None]
    heat = bells.amax(dim=1)
    return heat, owner, inside.any(dim=1) & (heat < TRAINED), boxes


def _bell(cells: Tensor, centre: Tensor, side: Tensor) -> Tensor:
    """Compute Gaussians along one axis, ``[N, m, cells]``, exactly 1 in the centre's cell."""
    deviation = (side * SPREAD).clamp(min=NARROWEST)
    distance = cells - centre.floor()[..., None]
    return torch.exp(-(distance**2) / (2 * deviation[..., None] ** 2))


def _focal(logits: Tensor, heat: Tensor, ignored: Tensor) -> Tensor:
    probability = logits.sigmoid()
    found = heat == 1
    hit = -F.logsigmoid(logits) * (1 - probability) ** 2
    miss = -F.logsigmoid(-logits) * probability**2 * (1 - heat) ** 4
    return torch.where(found, hit, miss).masked_fill(ignored, 0.0)


def _sides(sides: Tensor, heat: Tensor, owner: Tensor, boxes: Tensor, objects: Tensor) -> Tensor:
    image, row, column = torch.nonzero(heat >= TRAINED, as_tuple=True)
    if not len(image):
        return sides.sum() * 0.0
    found = boxes_of(sides)[image, row, column]
    wanted = boxes[image, owner[image, row, column]]
    weight = heat[image, row, column]
    loss = complete_box_iou_loss(found, wanted, reduction="none")
    # Each object counts the same, whatever number of cells it has.
    key = image * boxes.shape[1] + owner[image, row, column]
    total = weight.new_zeros(len(boxes) * boxes.shape[1]).index_add(0, key, weight)
    return (loss * weight / total[key]).sum() / objects
