"""VGG-16 with batch norm for 32 x 32 images."""

from __future__ import annotations

from torch import nn

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and number of convolutions of each stage, which ends with a max pooling."""


def vgg16_bn_cifar(num_classes: int = 10, channels: int = 3) -> nn.Module:
    """Make VGG-16 (Simonyan and Zisserman 2015, arXiv:1409.1556, configuration D) with batch norm and
    one linear layer: one ``nn.Sequential``; 14,724,042 parameters for CIFAR-10."""
    layers: list[nn.Module] = []
    for width, convolutions in STAGES:
        for _ in range(convolutions):
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, num_classes))
