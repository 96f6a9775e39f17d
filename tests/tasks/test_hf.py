"""Networks from transformers configs; nothing here may reach the network, and none has trained weights."""

import copy
import json
import socket
import sys

import pytest
import torch

from blaq.tasks.models import build_model

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {**VIT, "vocab_size": 11}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}

# name, options, input shape, vocabulary (None: an image), logits, transformers' class
NETWORKS = [
    ("hf:resnet", {**RESNET, "classes": 7}, (2, 3, 32, 32), None, (2, 7), "ResNetForImageClassification"),
    ("hf:resnet", {**RESNET, "num_labels": 5, "num_channels": 1}, (2, 1, 8, 8), None, (2, 5), "ResNetForImage"),
    ("hf:vit", {**VIT, "classes": 7, "image_size": 16, "patch_size": 8}, (2, 3, 16, 16), None, (2, 7), "ViTForImage"),
    ("hf:mobilenet_v2", {"depth_multiplier": 0.25, "classes": 7}, (2, 3, 32, 32), None, (2, 7), "MobileNetV2ForImage"),
    ("hf:gpt2", {**GPT2, "classes": 11}, (2, 5), 11, (2, 5, 11), "GPT2LMHeadModel"),
    (
        "hf:gpt2",
        {**GPT2, "vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "classes": 3}
        | {"task": "text-classification"},
        (2, 5),
        11,
        (2, 3),
        "GPT2ForSequenceClassification",
    ),
    ("hf:bert", {**BERT, "classes": 7}, (2, 5), 11, (2, 7), "BertForSequenceClassification"),
    ("hf:bert", BERT | {"task": "text-generation", "is_decoder": True}, (2, 5), 11, (2, 5, 11), "BertLMHeadModel"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a network connection was attempted")

    pytest.importorskip("transformers")
    monkeypatch.setattr(socket.socket, "connect", refuse)


def batch(shape: tuple[int, ...], vocabulary: int | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if vocabulary is None:
        return torch.randn(shape, generator=generator)
    return torch.randint(vocabulary, shape, generator=generator)


@pytest.mark.parametrize(("name", "options", "shape", "vocabulary", "logits", "cls"), NETWORKS)
def test_network_returns_its_logits_and_trains(name, options, shape, vocabulary, logits, cls):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        network = build_model(name, **options)
        states.append(network.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert type(network).__name__.startswith(cls) and network.training
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    output = network(batch(shape, vocabulary))
    assert type(output) is torch.Tensor and output.shape == logits
    output.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_logits_are_those_of_the_plain_transformers_network():
    import transformers

    network = build_model("hf:vit", **VIT, classes=7, image_size=16, patch_size=8).eval()
    plain = transformers.ViTForImageClassification(network.config).eval()
    plain.load_state_dict(network.state_dict())  # the same keys, no prefix
    images = batch((2, 3, 16, 16), None)
    assert torch.equal(network(images), plain(images).logits)
    assert torch.equal(copy.deepcopy(network)(images), network(images))


def test_a_saved_network_comes_back_from_its_folder(tmp_path):
    network = build_model("hf:bert", **BERT, classes=7).eval()
    network.save_pretrained(tmp_path)
    again = build_model(f"hf:{tmp_path}").eval()
    assert again.config.num_labels == 7
    tokens = batch((2, 5), 11)
    assert not torch.equal(again(tokens), network(tokens))  # the config alone was read
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(tokens), network(tokens))
    assert build_model(f"hf:{tmp_path}", classes=3, num_hidden_layers=2)(tokens).shape == (2, 3)


def test_a_folder_keeps_the_task_its_config_was_saved_for(tmp_path):
    fields = {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"], "pad_token_id": 0, **GPT2}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    assert type(build_model(f"hf:{tmp_path}", classes=3)).__name__ == "GPT2ForSequenceClassification"
    assert type(build_model(f"hf:{tmp_path}", task="text-generation")).__name__ == "GPT2LMHeadModel"


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **GPT2}), encoding="utf-8-sig")
    assert type(build_model(f"hf:{tmp_path}")).__name__ == "GPT2LMHeadModel"


def test_a_config_saved_in_bfloat16_is_trained_in_torchs_default_dtype(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "dtype": "bfloat16", **GPT2}))
    assert {p.dtype for p in build_model(f"hf:{tmp_path}").parameters()} == {torch.float32}


ERRORS = [
    ("hf:resnt", {}, r"build_model\(name='hf:resnt'\): .*CONFIG_MAPPING.*; did you mean 'resnet'\?"),
    (
        "hf:resnet",
        {"depth": [1]},
        r"build_model\(name='hf:resnet'\): unknown option depth=\[1\].*; did you mean 'depths'",
    ),
    ("hf:resnet", {"depths": "a"}, r"build_model\(name='hf:resnet'\): .*depths"),
    ("hf:resnet", {"classes": 3, "num_labels": 3}, r"classes=3 and num_labels=3 mean the same"),
    ("hf:resnet", {"task": "text-generation"}, r"task='text-generation': expected one of image-classification\."),
    ("hf:sam", {}, r"expected a model type with a head for one of image-classification, text-"),
    ("hf:vit", {"id2label": 5}, r"name='hf:vit'\): transformers refuses the config \(AttributeError: "),
    ("hf:vit", {"hidden_act": "nope"}, r"name='hf:vit'\): transformers refuses the config \(.*nope"),
    (
        "hf:bert",
        {**BERT, "num_attention_heads": 7},
        r"name='hf:bert'\): transformers refuses the config \(.*hidden.size",
    ),
    ("hf:./no-such-folder", {}, r"expected a folder with a config\.json; nothing is downloaded"),
]


@pytest.mark.parametrize(("name", "options", "message"), ERRORS)
def test_errors_name_the_option_and_the_way_out(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **options)


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_config_is_said(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"name='hf:.*'\): '.*config\.json' is not the JSON of a config"):
        build_model(f"hf:{tmp_path}")


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'blaq\[hf\]'"):
        build_model("hf:resnet")
