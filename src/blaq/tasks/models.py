"""The papers' networks as plain torch modules; none of them knows anything of bits.

The feed-forward networks follow the published code of LAB (Hou, Yao, Kwok, ICLR 2017), which follows BinaryConnect
(Courbariaux et al., NeurIPS 2015):

- every linear layer and convolution is followed by BatchNorm (epsilon 1e-4), and so has no bias;
- BatchNorm comes after the last layer too: the L2-SVM output needs a scale that does not depend on the weights' grid;
- where a stage ends in max-pooling the order is convolution, pooling, BatchNorm, ReLU;
- weights start uniform in +-sqrt(1.5 / (fan_in + fan_out)), half of Glorot's range.

Layers are numbered by kind (conv1, conv2, fc1, fc2); bnK and reluK belong to the K-th layer of the network.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from blaq.tasks.hf import hf_network
from blaq.tasks.hints import did_you_mean
from blaq.tasks.resnet import resnet18, resnet20, resnet56

__all__ = ["MODELS", "CharLSTM", "build_model", "lenet5", "mlp", "vgg"]

_BN_EPS = 1e-4


def build_model(name: str, /, **options: Any) -> nn.Module:
    """Build a network by name, randomly initialised from torch's global generator.

    Args:
        name: a key of `MODELS`; or "hf:" and a transformers model type ("hf:resnet", "hf:gpt2") or a folder with a
            config.json ("hf:./folder"), see `blaq.tasks.hf.hf_network`.
        options: passed on; each model's signature lists its own, all positive integers or sequences of them. For "hf:"
            names the options of the transformers config.

    Returns:
        A module in training mode that maps a batch to logits: (N, classes), for text models (N, T, classes).

    Raises:
        ValueError: unknown name, unknown option, or a value out of range; the message says what is allowed.
        ImportError: an "hf:" name without transformers installed.

    >>> import torch
    >>> network = build_model("mlp", inputs=64, hidden=[256, 256], classes=10)
    >>> network(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    >>> build_model("lenet")
    Traceback (most recent call last):
    ValueError: build_model(name='lenet'): expected one of mlp, lenet5, vgg, resnet20, resnet56, resnet18, char_lstm, \
hf:<model type>, hf:./folder; did you mean 'lenet5'?
    """
    if name.startswith("hf:"):
        return hf_network(name.removeprefix("hf:"), **options)
    if name not in MODELS:
        known = ", ".join([*MODELS, "hf:<model type>", "hf:./folder"])
        raise ValueError(f"build_model(name={name!r}): expected one of {known}{did_you_mean(name, MODELS) or '.'}")
    parameters = inspect.signature(MODELS[name]).parameters
    for key, value in options.items():
        if key not in parameters:
            hint = did_you_mean(key, parameters) or "."
            raise ValueError(f"{name}({key}={value!r}): expected an option of {', '.join(parameters)}{hint}")
        _check_sizes(f"{name}({key}={value!r})", value, like=parameters[key].default)
    return MODELS[name](**options)


def _check_sizes(owner: str, value: object, like: int | tuple[int, ...]) -> None:
    if isinstance(like, int):
        if not _is_size(value):
            raise ValueError(f"{owner}: expected a positive integer.")
    elif isinstance(value, str) or not isinstance(value, Sequence) or not all(map(_is_size, value)):
        raise ValueError(f"{owner}: expected a list of positive integers, such as {list(like)}.")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def mlp(*, inputs: int = 784, hidden: Sequence[int] = (2048, 2048, 2048), classes: int = 10) -> nn.Sequential:
    """Multilayer perceptron 784-2048-2048-2048-10 for MNIST, of BinaryConnect and LAB.

    (N, ...) with `inputs` numbers a sample, flattened inside, -> (N, classes).

    >>> [name for name, _ in mlp(hidden=(32,)).named_children()]
    ['flatten', 'fc1', 'bn1', 'relu1', 'fc2', 'bn2']
    """
    layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    _add_linear(layers, inputs, [*hidden, classes], depth=0)
    return _initialised(layers)


def lenet5(*, classes: int = 10, input_channels: int = 1, image_size: int = 28) -> nn.Sequential:
    """LeNet-5 20C3-MP2-50C3-MP2-500FC-10 for MNIST, of BLAQ: 3x3 convolutions without padding.

    (N, input_channels, image_size, image_size) -> (N, classes).

    Raises:
        ValueError: image_size is below 10, where no pixel is left after the second pooling.

    >>> lenet5().fc1
    Linear(in_features=1250, out_features=500, bias=False)
    """
    side = ((image_size - 2) // 2 - 2) // 2
    if side < 1:
        raise ValueError(f"lenet5(image_size={image_size}): expected at least 10 (two 3x3 convolutions and poolings).")
    layers = OrderedDict[str, nn.Module]()
    _add_conv(layers, 1, input_channels, 20, padding=0, pool=True)
    _add_conv(layers, 2, 20, 50, padding=0, pool=True)
    layers["flatten"] = nn.Flatten()
    _add_linear(layers, 50 * side * side, [500, classes], depth=2)
    return _initialised(layers)


def vgg(
    *,
    channels: Sequence[int] = (128, 256, 512),
    hidden: int = 1024,
    classes: int = 10,
    input_channels: int = 3,
    image_size: int = 32,
) -> nn.Sequential:
    """VGG-like network 2x128C3-MP2-2x256C3-MP2-2x512C3-MP2-2x1024FC-10 for CIFAR-10, of BinaryConnect and LAB.

    (N, input_channels, image_size, image_size) -> (N, classes). Each entry of `channels` is a stage of two 3x3
    convolutions with same padding, the second one pooled; then come two layers of `hidden` units. For SVHN the papers
    halve the channels: (64, 128, 256).

    Raises:
        ValueError: image_size is too small for one halving per stage.

    >>> vgg(channels=(64, 128, 256)).fc1
    Linear(in_features=4096, out_features=1024, bias=False)
    """
    stages = len(channels)
    side = image_size // 2**stages
    if side < 1:
        raise ValueError(
            f"vgg(image_size={image_size}): expected at least {2**stages} for {stages} stages; give fewer channels."
        )
    layers = OrderedDict[str, nn.Module]()
    inputs = input_channels
    for stage, width in enumerate(channels):
        _add_conv(layers, 2 * stage + 1, inputs, width, padding=1, pool=False)
        _add_conv(layers, 2 * stage + 2, width, width, padding=1, pool=True)
        inputs = width
    layers["flatten"] = nn.Flatten()
    _add_linear(layers, inputs * side * side, [hidden, hidden, classes], depth=2 * stages)
    return _initialised(layers)


def _add_conv(
    layers: OrderedDict[str, nn.Module], index: int, inputs: int, outputs: int, *, padding: int, pool: bool
) -> None:
    layers[f"conv{index}"] = nn.Conv2d(inputs, outputs, 3, padding=padding, bias=False)
    if pool:
        layers[f"pool{index}"] = nn.MaxPool2d(2)
    layers[f"bn{index}"] = nn.BatchNorm2d(outputs, eps=_BN_EPS)
    layers[f"relu{index}"] = nn.ReLU()


def _add_linear(layers: OrderedDict[str, nn.Module], inputs: int, widths: Sequence[int], *, depth: int) -> None:
    """Linear and BatchNorm for each width, ReLU between them; `depth` layers with BatchNorm came before."""
    for index, width in enumerate(widths, start=1):
        layers[f"fc{index}"] = nn.Linear(inputs, width, bias=False)
        layers[f"bn{depth + index}"] = nn.BatchNorm1d(width, eps=_BN_EPS)
        if index < len(widths):
            layers[f"relu{depth + index}"] = nn.ReLU()
        inputs = width


def _initialised(layers: OrderedDict[str, nn.Module]) -> nn.Sequential:
    for layer in layers.values():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight, gain=0.5)
    return nn.Sequential(layers)


class CharLSTM(nn.Module):
    """Character LSTM-512 for War and Peace, of LAB: one LSTM layer and a linear layer, (N, T) -> (N, T, classes).

    The logits at a position are those of the next character. The input is one-hot, as in LAB, so `lstm.weight_ih_l0`
    is the characters' embedding and there is no separate one. Every window starts from a zero state.
    `lstm.weight_ih_l0` and `lstm.weight_hh_l0` stack the input, forget, cell and output gates along dim 0.
    Initialisation is LAB's: LSTM weights uniform in +-0.08, forget-gate bias 1, other biases 0, output weights normal
    with standard deviation 0.01.

    Args:
        classes: size of the vocabulary, 87 in War and Peace; tokens are int64 in 0..classes-1.
        hidden: units of the LSTM.

    >>> import torch
    >>> CharLSTM(classes=30, hidden=16)(torch.zeros(2, 7, dtype=torch.int64)).shape
    torch.Size([2, 7, 30])
    """

    def __init__(self, *, classes: int = 87, hidden: int = 512) -> None:
        super().__init__()
        self.classes = classes
        self.lstm = nn.LSTM(classes, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("weight"):
                nn.init.uniform_(parameter, -0.08, 0.08)
            else:
                nn.init.zeros_(parameter)
            if name == "bias_ih_l0":  # torch adds bias_ih and bias_hh, so one of them carries the 1
                nn.init.ones_(parameter[hidden : 2 * hidden])

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, T, classes) of the character after each of tokens (N, T)."""
        characters = F.one_hot(tokens, self.classes).to(self.fc.weight.dtype)
        states, _ = self.lstm(characters)
        logits: Tensor = self.fc(states)
        return logits


MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "lenet5": lenet5,
    "vgg": vgg,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "resnet18": resnet18,
    "char_lstm": CharLSTM,
}
"""Network by the name a recipe uses; the keyword arguments of each are the options of `build_model`."""
