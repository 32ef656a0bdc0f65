"""The reference nets by name, with the preprocessing they are trained with.

To add one, write its module and add a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from penjing.models.heat_map import FAMILY, heat_map
from penjing.models.lenet import lenet5, lenet_300_100
from penjing.models.mlperf_tiny import mobilenet_v1_025, resnet8
from penjing.models.resnet_cifar import resnet20_cifar, resnet56_cifar
from penjing.models.vgg_cifar import vgg16_bn_cifar
from penjing.tasks.preprocessing import CIFAR, MNIST, Preprocessing


class Reference(NamedTuple):
    """A reference net and the preprocessing it is trained with."""

    factory: Callable[..., nn.Module]
    """Called with ``(num_classes=, channels=)``; a detector has no ``num_classes``."""
    preprocessing: Preprocessing


PIXELS = Preprocessing(size=96, mean=(0.0,) * 3, std=(1.0,) * 3)

REFERENCE = {
    "lenet_300_100": Reference(lenet_300_100, MNIST),
    "lenet5": Reference(lenet5, MNIST),
    "resnet20_cifar": Reference(resnet20_cifar, CIFAR),
    "resnet56_cifar": Reference(resnet56_cifar, CIFAR),
    "vgg16_bn_cifar": Reference(vgg16_bn_cifar, CIFAR),
    "resnet8": Reference(resnet8, CIFAR),
    "mobilenet_v1_025": Reference(mobilenet_v1_025, PIXELS),
    **{f"heat_map_{size // 1000}kb": Reference(partial(heat_map, size), PIXELS) for size in FAMILY},
}
