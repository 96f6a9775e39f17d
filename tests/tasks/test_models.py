"""The papers' networks: counts by hand, shapes, order of layers, and plain re-computations of what they compute."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blaq.tasks.models import MODELS, build_model

# Weights, then two BatchNorm parameters per output, as the papers' architecture strings give them.
COUNTS = {
    ("mlp", ()): 784 * 2048 + 2 * 2048 * 2048 + 2048 * 10 + 2 * (3 * 2048 + 10),
    ("mlp", (("inputs", 64), ("hidden", (256, 256)))): 64 * 256 + 256 * 256 + 256 * 10 + 2 * (256 + 256 + 10),
    ("lenet5", ()): 9 * (1 * 20 + 20 * 50) + 50 * 5 * 5 * 500 + 500 * 10 + 2 * (20 + 50 + 500 + 10),
    ("vgg", ()): 9 * (3 * 128 + 128 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512)
    + (512 * 4 * 4 * 1024 + 1024 * 1024 + 1024 * 10)
    + 2 * (2 * 128 + 2 * 256 + 2 * 512 + 2 * 1024 + 10),
    ("vgg", (("channels", (64, 128, 256)),)): 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256)
    + (256 * 4 * 4 * 1024 + 1024 * 1024 + 1024 * 10)
    + 2 * (2 * 64 + 2 * 128 + 2 * 256 + 2 * 1024 + 10),
    # stem; stages of 6 convolutions, the first of stages 2 and 3 widening; BatchNorm; classifier with bias
    ("resnet20", ()): 9 * (3 * 16 + 6 * 16 * 16 + (16 * 32 + 5 * 32 * 32) + (32 * 64 + 5 * 64 * 64))
    + 2 * (16 + 6 * (16 + 32 + 64))
    + (64 * 10 + 10),
    ("resnet56", ()): 9 * (3 * 16 + 18 * 16 * 16 + (16 * 32 + 17 * 32 * 32) + (32 * 64 + 17 * 64 * 64))
    + 2 * (16 + 18 * (16 + 32 + 64))
    + (64 * 10 + 10),
    ("resnet18", ()): 11_689_512,  # as torchvision documents it
    # four gates of 87 characters + 512 states and two biases each; output layer
    ("char_lstm", ()): 4 * 512 * (87 + 512 + 2) + 512 * 87 + 87,
}

# name, options, input, output; small where the default is large
SHAPES = [
    ("mlp", {}, (3, 1, 28, 28), (3, 10)),
    ("mlp", {"inputs": 64, "hidden": [32, 16], "classes": 7}, (3, 1, 8, 8), (3, 7)),
    ("mlp", {"inputs": 12, "hidden": []}, (3, 12), (3, 10)),
    ("lenet5", {}, (3, 1, 28, 28), (3, 10)),
    ("lenet5", {"input_channels": 3, "image_size": 10, "classes": 4}, (3, 3, 10, 10), (3, 4)),
    ("vgg", {"channels": [8, 16, 24], "hidden": 32}, (3, 3, 32, 32), (3, 10)),
    ("vgg", {"channels": [4], "hidden": 8, "input_channels": 1, "image_size": 9}, (3, 1, 9, 9), (3, 10)),
    ("resnet20", {}, (3, 3, 32, 32), (3, 10)),
    ("resnet56", {"classes": 100, "input_channels": 1}, (2, 1, 16, 16), (2, 100)),
    ("resnet18", {}, (2, 3, 64, 64), (2, 1000)),
    ("char_lstm", {"classes": 20, "hidden": 16}, (3, 11), (3, 11, 20)),
]


def batch(shape: tuple[int, ...], classes: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if classes is None:
        return torch.randn(shape, generator=generator)
    return torch.randint(classes, shape, generator=generator)


def randomise_batchnorm(network: nn.Module, variance: float = 0.5) -> None:
    """Statistics and parameters away from their start, negative scales among them: order and pooling then matter.

    A small variance keeps the signal of small weights alive through many layers, and makes epsilon matter.
    """
    generator = torch.Generator().manual_seed(6)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            shape = module.weight.shape
            module.weight.data = torch.randn(shape, generator=generator).to(module.weight)
            module.bias.data = torch.randn(shape, generator=generator).to(module.bias)
            module.running_mean = 0.1 * math.sqrt(variance) * torch.randn(shape, generator=generator).to(module.weight)
            module.running_var = variance * (1.0 + torch.rand(shape, generator=generator).to(module.weight))


def normalise(x: torch.Tensor, state: dict[str, torch.Tensor], name: str, eps: float) -> torch.Tensor:
    """Evaluation-mode BatchNorm, written out."""
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    shape = (1, -1, *[1] * (x.dim() - 2))
    return (x - mean.view(shape)) / torch.sqrt(var.view(shape) + eps) * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize(("name", "options"), COUNTS)
def test_parameter_count_is_the_one_computed_by_hand(name, options):
    with torch.device("meta"):
        network = build_model(name, **dict(options))
    assert sum(p.numel() for p in network.parameters()) == COUNTS[name, options]


def test_every_model_is_counted_and_run():
    assert {name for name, _ in COUNTS} == {name for name, *_ in SHAPES} == set(MODELS)


@pytest.mark.parametrize(("name", "options", "inputs", "outputs"), SHAPES)
def test_output_shape_and_a_gradient_for_every_parameter(name, options, inputs, outputs):
    network = build_model(name, **options)
    x = batch(inputs, options["classes"] if name == "char_lstm" else None)
    logits = network(x)
    assert network.training and logits.shape == outputs and logits.dtype == torch.float32
    logits.square().sum().backward()
    silent = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert silent == []


@pytest.mark.parametrize("name", MODELS)
def test_initialisation_is_a_function_of_the_seed(name):
    small = {"mlp": {"hidden": [8]}, "vgg": {"channels": [4], "hidden": 8}, "char_lstm": {"hidden": 8}}
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(build_model(name, **small.get(name, {})).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def layers(network: nn.Module) -> str:
    return " ".join(name for name, _ in network.named_children())


def test_layers_of_the_papers_in_their_order():
    with torch.device("meta"):
        perceptron, lenet, vgg = build_model("mlp"), build_model("lenet5"), build_model("vgg")
    assert layers(perceptron) == "flatten fc1 bn1 relu1 fc2 bn2 relu2 fc3 bn3 relu3 fc4 bn4"
    assert layers(lenet) == "conv1 pool1 bn1 relu1 conv2 pool2 bn2 relu2 flatten fc1 bn3 relu3 fc2 bn4"
    assert layers(vgg) == (
        "conv1 bn1 relu1 conv2 pool2 bn2 relu2 conv3 bn3 relu3 conv4 pool4 bn4 relu4 "
        "conv5 bn5 relu5 conv6 pool6 bn6 relu6 flatten fc1 bn7 relu7 fc2 bn8 relu8 fc3 bn9"
    )
    assert [tuple(p.shape) for p in lenet.parameters() if p.dim() > 1] == [
        (20, 1, 3, 3), (50, 20, 3, 3), (500, 1250), (10, 500),
    ]  # fmt: skip
    assert [tuple(p.shape) for p in vgg.parameters() if p.dim() > 1] == [
        (128, 3, 3, 3), (128, 128, 3, 3), (256, 128, 3, 3), (256, 256, 3, 3), (512, 256, 3, 3), (512, 512, 3, 3),
        (1024, 8192), (1024, 1024), (10, 1024),
    ]  # fmt: skip


def test_vgg_pools_between_convolution_and_batchnorm():
    network = build_model("vgg", channels=[6, 8], hidden=16, image_size=8).double().eval()
    randomise_batchnorm(network, variance=0.05)
    state = network.state_dict()
    x = images = batch((5, 3, 8, 8)).double()
    for index in (1, 2, 3, 4):
        x = F.conv2d(x, state[f"conv{index}.weight"], padding=1)
        if index in (2, 4):  # the largest of each 2x2 square, by hand
            x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
        x = normalise(x, state, f"bn{index}", 1e-4).clamp_min(0.0)
    x = x.reshape(5, -1)
    for index in (1, 2, 3):
        x = normalise(x @ state[f"fc{index}.weight"].T, state, f"bn{4 + index}", 1e-4)
        x = x.clamp_min(0.0) if index < 3 else x
    assert x.std(0).min() > 0.05  # the images matter: not all units are dead
    torch.testing.assert_close(network(images), x)


def test_feed_forward_weights_start_in_half_of_glorots_range():
    torch.manual_seed(0)
    network = build_model("lenet5")
    for layer, fan_sum in ((network.conv2, 9 * (20 + 50)), (network.fc1, 1250 + 500)):
        bound = math.sqrt(1.5 / fan_sum)
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3.0), rel=0.02)


def plain_cifar_resnet(state: dict[str, torch.Tensor], x: torch.Tensor, blocks: int) -> torch.Tensor:
    """He et al. (2016), section 4.2, from the weights alone."""
    x = normalise(F.conv2d(x, state["conv1.weight"], padding=1), state, "bn1", 1e-5).clamp_min(0.0)
    for stage in (1, 2, 3):
        for block in range(blocks):
            key = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            out = F.conv2d(x, state[f"{key}.conv1.weight"], stride=stride, padding=1)
            out = normalise(out, state, f"{key}.bn1", 1e-5).clamp_min(0.0)
            out = normalise(F.conv2d(out, state[f"{key}.conv2.weight"], padding=1), state, f"{key}.bn2", 1e-5)
            shortcut = torch.zeros_like(out)  # option A: new channels receive zeros
            shortcut[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
            x = (out + shortcut).clamp_min(0.0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 3), ("resnet56", 9)])
def test_cifar_resnet_equals_a_plain_computation_with_option_a(name, blocks):
    network = build_model(name).double().eval()
    randomise_batchnorm(network)
    images = batch((2, 3, 10, 10)).double()  # 10, 5, 3: odd sizes are subsampled too
    expected = plain_cifar_resnet(network.state_dict(), images, blocks)
    assert expected.std(0).max() > 0.01 * expected.abs().max()
    torch.testing.assert_close(network(images), expected)


def test_resnet_convolutions_start_from_kaiming_fan_out():
    torch.manual_seed(0)
    weight = build_model("resnet18").get_parameter("layer3.0.conv1.weight")
    assert weight.std().item() == pytest.approx(math.sqrt(2.0 / (9 * 256)), rel=0.02)
    assert abs(weight.mean().item()) < 1e-3


def test_resnet18_has_torchvisions_state_dict():
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{key}" for key in norm}
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            key = f"layer{stage}.{block}"
            expected |= {f"{key}.conv1.weight", f"{key}.conv2.weight"}
            expected |= {f"{key}.{bn}.{part}" for bn in ("bn1", "bn2") for part in norm}
        if stage > 1:
            expected |= {f"layer{stage}.0.downsample.0.weight"}
            expected |= {f"layer{stage}.0.downsample.1.{part}" for part in norm}
    with torch.device("meta"):
        state = build_model("resnet18").state_dict()
    assert set(state) == expected and len(expected) == 122
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer4.0.conv1.weight"].shape == (512, 256, 3, 3)
    assert state["layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    assert state["fc.weight"].shape == (1000, 512)


def test_resnet18_computes_what_transformers_resnet18_computes():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    peer = transformers.ResNetForImageClassification(config).eval()
    network = build_model("resnet18", classes=10).eval()
    randomise_batchnorm(network)
    theirs = {"fc": "classifier.1", "conv1": "resnet.embedder.embedder.convolution"}
    theirs["bn1"] = "resnet.embedder.embedder.normalization"
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            layer = f"resnet.encoder.stages.{stage - 1}.layers.{block}"
            for part in (1, 2):
                theirs[f"layer{stage}.{block}.conv{part}"] = f"{layer}.layer.{part - 1}.convolution"
                theirs[f"layer{stage}.{block}.bn{part}"] = f"{layer}.layer.{part - 1}.normalization"
            theirs[f"layer{stage}.{block}.downsample.0"] = f"{layer}.shortcut.convolution"
            theirs[f"layer{stage}.{block}.downsample.1"] = f"{layer}.shortcut.normalization"
    state = {}
    for key, value in network.state_dict().items():
        module, _, part = key.rpartition(".")
        state[f"{theirs[module]}.{part}"] = value
    peer.load_state_dict(state)  # strict: every tensor of theirs has one of ours
    images = batch((2, 3, 64, 64))
    with torch.no_grad():
        torch.testing.assert_close(network(images), peer(images).logits, rtol=1e-4, atol=1e-4)


def plain_lstm(state: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The LSTM equations, one character at a time, from a zero state; a one-hot product is a column of the matrix."""
    h = c = torch.zeros(tokens.shape[0], state["lstm.weight_hh_l0"].shape[1], dtype=torch.float64)
    logits = []
    for t in range(tokens.shape[1]):
        gates = state["lstm.weight_ih_l0"][:, tokens[:, t]].T + h @ state["lstm.weight_hh_l0"].T
        gates = gates + state["lstm.bias_ih_l0"] + state["lstm.bias_hh_l0"]
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        logits.append(h @ state["fc.weight"].T + state["fc.bias"])
    return torch.stack(logits, dim=1)


def test_char_lstm_equals_the_lstm_equations_also_after_writing_weights_in_place():
    network = build_model("char_lstm", classes=9, hidden=6).double()
    tokens = batch((4, 7), 9)
    torch.testing.assert_close(network(tokens), plain_lstm(network.state_dict(), tokens))
    before = network(tokens).detach()
    with torch.no_grad():
        for weight in (network.lstm.weight_ih_l0, network.lstm.weight_hh_l0):
            weight.copy_(weight.sign() * weight.abs().mean())
    assert not torch.allclose(network(tokens), before)
    torch.testing.assert_close(network(tokens), plain_lstm(network.state_dict(), tokens))


def test_char_lstm_starts_as_labs_code_does():
    torch.manual_seed(0)
    network = build_model("char_lstm", hidden=64)
    for weight in (network.lstm.weight_ih_l0, network.lstm.weight_hh_l0):
        assert 0.079 < weight.abs().max() <= 0.08
    bias = network.lstm.bias_ih_l0 + network.lstm.bias_hh_l0
    i, f, g, o = bias.chunk(4)
    assert (f == 1).all() and (torch.cat([i, g, o]) == 0).all()
    assert network.fc.weight.std().item() == pytest.approx(0.01, rel=0.05) and (network.fc.bias == 0).all()


ERRORS = [
    ("lenet", {}, r"build_model\(name='lenet'\): expected one of mlp, .*, hf:<model type>.*; did you mean 'lenet5'\?"),
    ("zzz", {}, r"build_model\(name='zzz'\): expected one of mlp, .*hf:\./folder\.$"),
    (
        "mlp",
        {"hiden": [3]},
        r"mlp\(hiden=\[3\]\): expected an option of inputs, hidden, classes; did you mean 'hidden'",
    ),
    ("mlp", {"hidden": 2048}, r"mlp\(hidden=2048\): expected a list of positive integers"),
    ("mlp", {"hidden": "256"}, r"mlp\(hidden='256'\): expected a list of positive integers"),
    ("mlp", {"hidden": [256, 0]}, r"mlp\(hidden=\[256, 0\]\): expected a list of positive integers"),
    ("mlp", {"inputs": 0}, r"mlp\(inputs=0\): expected a positive integer"),
    ("mlp", {"classes": 10.0}, r"mlp\(classes=10\.0\): expected a positive integer"),
    ("mlp", {"classes": True}, r"mlp\(classes=True\): expected a positive integer"),
    ("lenet5", {"image_size": 9}, r"lenet5\(image_size=9\): expected at least 10"),
    ("vgg", {"image_size": 7}, r"vgg\(image_size=7\): expected at least 8 for 3 stages"),
]


@pytest.mark.parametrize(("name", "options", "message"), ERRORS)
def test_errors_name_the_option_and_the_way_out(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **options)


def test_importing_the_models_does_not_import_transformers():
    code = "import sys, blaq.tasks.models; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
