"""Residual networks of He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.

ResNet-20 and ResNet-56 are those of section 4.2 (CIFAR-10), with the parameter-free shortcuts (option A) that the paper
uses there. ResNet-18 is the ImageNet network with projection shortcuts (option B), in the layout and with the parameter
names of torchvision, so that its checkpoints load. Convolutions start from Kaiming normal values, fan-out, as in
torchvision.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BasicBlock", "PadShortcut", "resnet18", "resnet20", "resnet56"]


def resnet20(*, classes: int = 10, input_channels: int = 3) -> nn.Sequential:
    """ResNet-20 for CIFAR: 3x3 stem with 16 filters, 3 stages of 3 blocks (16, 32, 64), option A shortcuts.

    Takes (N, input_channels, H, W), returns (N, classes) logits; 0.27 million parameters.

    >>> sum(p.numel() for p in resnet20().parameters())
    269722
    """
    return _cifar_resnet(3, classes, input_channels)


def resnet56(*, classes: int = 10, input_channels: int = 3) -> nn.Sequential:
    """ResNet-56 for CIFAR: as ResNet-20 with 9 blocks in each stage; 0.85 million parameters.

    >>> sum(p.numel() for p in resnet56().parameters())
    853018
    """
    return _cifar_resnet(9, classes, input_channels)


def resnet18(*, classes: int = 1000, input_channels: int = 3) -> nn.Sequential:
    """ResNet-18 for ImageNet: 7x7 stem, 4 stages of 2 blocks (64, 128, 256, 512), projection shortcuts.

    Takes (N, input_channels, H, W), returns (N, classes) logits; state_dict keys and shapes are torchvision's.

    >>> sum(p.numel() for p in resnet18().parameters())
    11689512
    """
    stem = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(input_channels, 64, 7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(),
        maxpool=nn.MaxPool2d(3, stride=2, padding=1),
    )
    return _resnet(stem, widths=(64, 128, 256, 512), blocks=2, projection=True, classes=classes)


def _cifar_resnet(blocks: int, classes: int, input_channels: int) -> nn.Sequential:
    stem = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(input_channels, 16, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(16),
        relu=nn.ReLU(),
    )
    return _resnet(stem, widths=(16, 32, 64), blocks=blocks, projection=False, classes=classes)


def _resnet(
    stem: OrderedDict[str, nn.Module], *, widths: Sequence[int], blocks: int, projection: bool, classes: int
) -> nn.Sequential:
    layers = stem
    inputs = widths[0]
    for stage, width in enumerate(widths, start=1):
        first_stride = 1 if stage == 1 else 2
        stack = [BasicBlock(inputs, width, stride=first_stride, projection=projection)]
        stack += [BasicBlock(width, width, stride=1, projection=projection) for _ in range(blocks - 1)]
        layers[f"layer{stage}"] = nn.Sequential(*stack)
        inputs = width
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(inputs, classes)
    network = nn.Sequential(layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x)).

    (N, inputs, H, W) -> (N, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module
        if stride == 1 and inputs == outputs:
            self.downsample = nn.Identity()
        elif projection:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        else:
            self.downsample = PadShortcut(outputs - inputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x (N, inputs, H, W)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        result: Tensor = self.relu(out + self.downsample(x))
        return result


class PadShortcut(nn.Module):
    """Option A of He et al. (2016), section 3.3: every stride-th pixel, `extra` channels of zeros behind the others.

    >>> import torch
    >>> PadShortcut(extra=2, stride=2)(torch.ones(1, 1, 4, 4)).mean((2, 3))
    tensor([[1., 0., 0.]])
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra = extra
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad x (N, C, H, W) to (N, C + extra, ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        return f"extra={self.extra}, stride={self.stride}"
