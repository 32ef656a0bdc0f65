"""The loss is lowest where the boxes are, and deaf to what is marked as a crowd."""

import torch
from torch import Tensor

from penjing.attention.decoding import decode
from penjing.attention.loss import boxes_of, detection_loss


def perfect(boxes: list[list[float]], height: int = 12, width: int = 16) -> Tensor:
    """Maps that say exactly where ``boxes`` (in cells) are."""
    maps = torch.full((1, 5, height, width), -9.0)
    for left, top, right, bottom in boxes:
        x, y = int((left + right) / 2), int((top + bottom) / 2)
        maps[0, 0, y, x] = 9.0
        for row in range(max(0, y - 1), min(height, y + 2)):
            for column in range(max(0, x - 1), min(width, x + 2)):
                reach = [
                    column + 0.5 - left,
                    row + 0.5 - top,
                    right - column - 0.5,
                    bottom - row - 0.5,
                ]
                maps[0, 1:, row, column] = torch.tensor(reach).clamp(min=1e-3).log()
    return maps


def target(
    boxes: list[list[float]], kind: float = 1.0, height: int = 12, width: int = 16
) -> Tensor:
    size = torch.tensor([width, height, width, height])
    shares = torch.tensor(boxes) / size
    return torch.cat([shares, torch.full((len(boxes), 1), kind)], dim=1)[None]


BOXES = [[2.0, 1.0, 6.0, 3.0], [9.2, 5.1, 13.4, 8.9]]


def test_perfect_maps_cost_almost_nothing():
    assert detection_loss(perfect(BOXES), target(BOXES)) < 0.05


def test_every_way_to_be_wrong_costs_more():
    best = detection_loss(perfect(BOXES), target(BOXES))
    missed, extra, shifted = (
        perfect(BOXES[:1]),
        perfect([*BOXES, [2.0, 8.0, 5.0, 10.0]]),
        perfect(BOXES),
    )
    shifted[:, 1] += 0.5
    for maps in (missed, extra, shifted):
        assert detection_loss(maps, target(BOXES)) > best + 0.05


def test_nothing_counts_inside_a_crowd():
    empty, crowded = perfect([]), perfect([BOXES[0]])
    crowd = target([[1.0, 0.0, 7.0, 4.0]], kind=0.0)
    assert torch.equal(detection_loss(crowded, crowd), detection_loss(empty, crowd))


def test_gradients_reach_all_maps():
    maps = torch.zeros(2, 5, 12, 16, requires_grad=True)
    detection_loss(maps, target(BOXES).expand(2, -1, -1)).backward()
    assert maps.grad is not None and (maps.grad.abs().sum(dim=(0, 2, 3)) > 0).all()


def test_images_without_objects_have_a_loss():
    nothing = torch.full((1, 3, 5), -1.0)
    assert 0 < float(detection_loss(torch.zeros(1, 5, 12, 16), nothing)) < 1e4


def test_distances_become_boxes_and_back():
    found = decode(perfect(BOXES))[0]
    kept = found[found[:, 4] > 0.5]
    assert len(kept) == 2
    scale = torch.tensor([16.0, 12, 16, 12])
    for box in BOXES:
        assert ((kept[:, :4] * scale - torch.tensor(box)).abs().amax(dim=1) < 1e-3).any()


def test_boxes_of_counts_from_cell_centres():
    boxes = boxes_of(torch.zeros(1, 4, 2, 3))
    assert boxes[0, 1, 2].tolist() == [1.5, 0.5, 3.5, 2.5]
