"""param_groups: who is quantized, who is not and why, and what a rule may say."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blaq.grids import Grid
from blaq.optim.groups import EMBEDDING, OTHER, param_groups


def schemes(groups: list[dict[str, Any]]) -> dict[str, tuple[str | None, str | int, str]]:
    return {n: (g["grid"], g["granularity"], g["solver"]) for g in groups for n in g["param_names"]}


def grids(groups: list[dict[str, Any]]) -> dict[str, str | None]:
    return {name: scheme[0] for name, scheme in schemes(groups).items()}


def quantized(groups: list[dict[str, Any]]) -> set[str]:
    return {name for name, grid in grids(groups).items() if grid is not None}


def notes(groups: list[dict[str, Any]]) -> dict[str, str]:
    return {n: note for g in groups for n, note in zip(g["param_names"], g["notes"], strict=True)}


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, bias=False)
        self.fc = nn.Linear(8, 10)


class Transformer(nn.Module):
    """Tied input and output embeddings, the way language models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 6)
        self.position = nn.Parameter(torch.zeros(5, 6))
        self.attention = nn.MultiheadAttention(6, 2, add_bias_kv=True)
        self.norm = nn.LayerNorm([5, 6])
        self.up = nn.Linear(6, 12)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.token.weight


def test_conv_net_by_default() -> None:
    model = ConvNet()
    groups = param_groups(model, bits=2)
    assert groups == [
        {
            "params": [model.conv1.weight, model.conv2.weight, model.fc.weight],
            "param_names": ["conv1.weight", "conv2.weight", "fc.weight"],
            "grid": "ternary",
            "granularity": "tensor",
            "solver": "alternating",
            "notes": ["", "", ""],
        },
        {
            "params": [model.conv1.bias, model.bn1.weight, model.bn1.bias, model.fc.bias],
            "param_names": ["conv1.bias", "bn1.weight", "bn1.bias", "fc.bias"],
            "grid": None,
            "granularity": "tensor",
            "solver": "alternating",
            "notes": ["bias", "normalisation", "normalisation", "bias"],
        },
    ]


def test_transformer_by_default() -> None:
    groups = param_groups(Transformer(), bits="log4")
    assert quantized(groups) == {"attention.in_proj_weight", "attention.out_proj.weight", "up.weight"}
    assert {name: note for name, note in notes(groups).items() if note} == {
        "token.weight": f"{EMBEDDING}; tied with head.weight",
        "position": OTHER,
        "attention.in_proj_bias": "bias",
        "attention.bias_k": "bias",
        "attention.bias_v": "bias",
        "attention.out_proj.bias": "bias",
        "norm.weight": "normalisation",
        "norm.bias": "normalisation",
        "up.bias": "bias",
    }


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.LSTM(3, 4, num_layers=2, proj_size=2), {f"weight_{k}_l{i}" for k in ("ih", "hh", "hr") for i in (0, 1)}),
        (nn.GRUCell(3, 4), {"weight_ih", "weight_hh"}),
        (nn.ConvTranspose2d(3, 4, 2), {"weight"}),
        (nn.Conv1d(3, 4, 2), {"weight"}),
        (nn.Bilinear(2, 3, 4), {"weight"}),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weights_of_every_layer(layer: nn.Module, expected: set[str]) -> None:
    assert quantized(param_groups(layer, bits=1)) == expected


class LlamaRMSNorm(nn.Module):
    """Of another library: known by its name alone, and with two dimensions to be sure that it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))


class BatchNormAct2d(LlamaRMSNorm):
    pass


class LayerNorm2d(LlamaRMSNorm):
    pass


class NormalizedLinear(LlamaRMSNorm):
    pass


class LayerNormLSTM(LlamaRMSNorm):
    pass


class MyLayer(nn.LayerNorm):
    pass


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(3),
        nn.SyncBatchNorm(3),
        nn.InstanceNorm2d(3, affine=True),
        nn.GroupNorm(1, 3),
        nn.RMSNorm([2, 3]),
        MyLayer([2, 3]),
        LlamaRMSNorm(),
        BatchNormAct2d(),
        LayerNorm2d(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_normalisations_stay_float(norm: nn.Module) -> None:
    model = nn.ModuleDict({"norm": norm, "fc": nn.Linear(3, 3, bias=False)})
    groups = param_groups(model, bits=1)
    assert quantized(groups) == {"fc.weight"}
    assert notes(groups)["norm.weight"] == "normalisation"


@pytest.mark.parametrize("layer", [NormalizedLinear(), LayerNormLSTM()], ids=lambda layer: type(layer).__name__)
def test_layers_that_only_sound_like_normalisation(layer: nn.Module) -> None:
    assert quantized(param_groups(layer, bits=1)) == {"weight"}


def test_vectors_are_no_layer_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.PReLU(2))
    assert notes(param_groups(model, bits=1))["1.weight"] == OTHER


def test_one_group_for_each_scheme_float_last() -> None:
    rules = {"conv1": None, "conv2": {"granularity": "channel"}, "fc": {"bits": "log3", "solver": "exact"}}
    groups = param_groups(ConvNet(), 1, rules=rules)
    assert [(g["grid"], g["granularity"], g["solver"], g["param_names"]) for g in groups] == [
        ("binary", "channel", "alternating", ["conv2.weight"]),
        ("log3", "tensor", "exact", ["fc.weight"]),
        (None, "tensor", "alternating", ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "fc.bias"]),
    ]
    assert notes(groups)["conv1.weight"] == notes(groups)["conv1.bias"] == "rule 'conv1'"
    same = param_groups(ConvNet(), 1, rules={"conv1": "binary", "fc": {"bits": Grid.parse(1)}})
    assert same[0]["param_names"] == ["conv1.weight", "conv2.weight", "fc.weight"]


def test_float_group_holds_the_defaults() -> None:
    groups = param_groups(ConvNet(), 1, granularity="channel", solver="alternating", rules={"fc": None})
    assert [(g["grid"], g["granularity"], g["solver"]) for g in groups] == [
        ("binary", "channel", "alternating"),
        (None, "channel", "alternating"),
    ]


@pytest.mark.parametrize("keep", [None, "float"])
def test_without_bits_only_rules_quantize(keep: str | None) -> None:
    groups = param_groups(ConvNet(), bits=keep)
    assert quantized(groups) == set()
    assert len(groups) == 1
    assert notes(groups)["conv1.weight"] == "bits=None"
    assert quantized(param_groups(ConvNet(), bits=keep, rules={"conv*": 3})) == {"conv1.weight", "conv2.weight"}


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [
        ("conv1", {"conv1.weight"}),
        ("conv*", {"conv1.weight", "conv2.weight"}),
        ("conv?", {"conv1.weight", "conv2.weight"}),
        ("conv[13]", {"conv1.weight"}),
        ("conv2.weight", {"conv2.weight"}),
        ("*", {"conv1.weight", "conv2.weight", "fc.weight"}),
        ("fc.*", {"fc.weight"}),
        ("fc.bias", {"fc.bias"}),
        ("*.bias", {"conv1.bias", "fc.bias"}),
        ("bn1.weight", {"bn1.weight"}),
        ("bn1.w*", {"bn1.weight"}),
        ("*.weight", {"conv1.weight", "conv2.weight", "fc.weight"}),
        ("*1.weight", {"conv1.weight"}),
        ("[cb]*t", {"conv1.weight", "conv2.weight"}),
    ],
)
def test_what_a_pattern_with_bits_quantizes(pattern: str, taken: set[str]) -> None:
    assert quantized(param_groups(ConvNet(), bits=None, rules={pattern: 4})) == taken


def test_a_pattern_that_fits_module_and_bias_means_the_module() -> None:
    model = nn.ModuleDict({"blocks": nn.Linear(2, 2)})
    assert quantized(param_groups(model, bits=None, rules={"b*": 4})) == {"blocks.weight"}


def test_pattern_takes_a_nested_block_and_not_its_namesake() -> None:
    model = nn.ModuleDict({"layer1": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "layer10": nn.Linear(2, 2)})
    assert quantized(param_groups(model, None, rules={"layer1.0": 2})) == {"layer1.0.weight"}
    assert quantized(param_groups(model, None, rules={"layer1": 2})) == {"layer1.0.weight", "layer1.1.weight"}
    assert quantized(param_groups(model, None, rules={"layer1*": 2})) == {
        f"layer{i}.weight" for i in ("1.0", "1.1", "10")
    }


def test_patterns_are_case_sensitive() -> None:
    with pytest.raises(ValueError, match=r"rule 'FC' matched no parameter"):
        param_groups(ConvNet(), 1, rules={"FC": None})


def test_first_rule_wins() -> None:
    exact_first = grids(param_groups(ConvNet(), 1, rules={"conv1": 4, "conv*": 2}))
    assert (exact_first["conv1.weight"], exact_first["conv2.weight"]) == ("linear4", "ternary")
    keep_first = param_groups(ConvNet(), 1, rules={"*.bias": None, "fc": 3})
    assert notes(keep_first)["fc.bias"] == "rule '*.bias'"
    # A module's rule takes the bias too, and leaves it in float: the later rule does not get it.
    assert grids(param_groups(ConvNet(), 1, rules={"fc": 3, "*.bias": 8})) == {
        "conv1.weight": "binary",
        "conv2.weight": "binary",
        "fc.weight": "linear3",
        "fc.bias": None,
        "conv1.bias": "linear8",
        "bn1.weight": None,
        "bn1.bias": None,
    }


def test_rules_quantize_embeddings_and_free_parameters() -> None:
    groups = param_groups(Transformer(), 1, rules={"token": "ternary2", "position": 3, "attention": 4})
    assert grids(groups)["token.weight"] == "ternary2"
    assert notes(groups)["token.weight"] == "tied with head.weight"
    assert grids(groups)["position"] == "linear3"
    assert {n for n, grid in grids(groups).items() if grid == "linear4"} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert grids(param_groups(Transformer(), 1, rules={"*.bias_k": 5}))["attention.bias_k"] == "linear5"


def test_rule_without_bits_leaves_the_choice_to_the_default() -> None:
    groups = param_groups(Transformer(), 1, rules={"*": {"granularity": "channel", "solver": "alternating"}})
    assert {n for n, scheme in schemes(groups).items() if scheme == ("binary", "channel", "alternating")} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "up.weight",
    }
    assert len(groups) == 2


def test_tied_weights_appear_once_and_rules_know_all_their_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["c"] = model["a"]
    model["b"].weight = model["a"].weight
    groups = param_groups(model, 1)
    assert [g["param_names"] for g in groups] == [["a.weight"]]
    assert notes(groups) == {"a.weight": "tied with b.weight, c.weight"}
    assert grids(param_groups(model, 1, rules={"c": 4})) == {"a.weight": "linear4"}
    assert grids(param_groups(Transformer(), 1, rules={"head": 4}))["token.weight"] == "linear4"


def test_equal_values_are_not_tied() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].load_state_dict(model[0].state_dict())
    assert [p is q for g in param_groups(model, 1) for p, q in zip(g["params"], model.parameters(), strict=True)] == [
        True,
        True,
    ]


def test_frozen_parameters_are_left_out() -> None:
    model = ConvNet()
    model.conv1.requires_grad_(False)
    names = set(schemes(param_groups(model, 1)))
    assert names == {"conv2.weight", "bn1.weight", "bn1.bias", "fc.weight", "fc.bias"}


def test_groups_go_through_torch_optimizers_and_checkpoints(tmp_path: Any) -> None:
    groups = param_groups(ConvNet(), 2, rules={"fc": {"bits": 4, "granularity": "channel"}})
    optimizer = torch.optim.Adam(groups)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert schemes(optimizer.param_groups) == schemes(
        param_groups(ConvNet(), 2, rules={"fc": {"bits": 4, "granularity": "channel"}})
    )


def frozen_conv1() -> nn.Module:
    model = ConvNet()
    model.conv1.requires_grad_(False)
    return model


ERRORS: list[tuple[Any, dict[str, Any], str]] = [
    # model, arguments, whole message
    (
        lambda: ConvNet().parameters(),
        {"bits": 1},
        "param_groups(model=generator): expected a torch.nn.Module; pass the model itself, ...",
    ),
    (ConvNet, {"bits": 9}, "param_groups(bits=9): Grid.parse(9): expected 1 to 8 bits, or a name such as 'ternary'."),
    (
        ConvNet,
        {"bits": 2.0},
        "param_groups(bits=2.0): Grid.parse(2.0): expected a number of bits (1 to 8) or one of ...",
    ),
    (
        ConvNet,
        {"bits": 1, "rules": {"fc": "tenary"}},
        "param_groups: rule 'fc': Grid.parse('tenary'): expected a number ... did you mean 'ternary'?",
    ),
    (
        ConvNet,
        {"bits": 1, "granularity": "row"},
        "param_groups(granularity='row'): expected 'tensor', 'channel' or a group size >= 1 (consecutive inputs).",
    ),
    (ConvNet, {"bits": 1, "granularity": 0}, "param_groups(granularity=0): expected ..."),
    (ConvNet, {"bits": 1, "granularity": True}, "param_groups(granularity=True): expected ..."),
    (ConvNet, {"bits": 1, "solver": "fast"}, "param_groups(solver='fast'): expected 'exact' or 'alternating'."),
    (
        ConvNet,
        {"bits": 1, "rules": {"fc": {"granularity": -3}}},
        "param_groups: rule 'fc'(granularity=-3): expected ...",
    ),
    (ConvNet, {"bits": 1, "rules": {"fc": {"solver": "x"}}}, "param_groups: rule 'fc'(solver='x'): expected ..."),
    (
        ConvNet,
        {"bits": 1, "rules": ["conv1"]},
        "param_groups(rules=['conv1']): expected a dict, such as {'conv1': None, 'fc*': 4}.",
    ),
    (
        ConvNet,
        {"bits": 1, "rules": {1: None}},
        "param_groups: rule 1: expected a glob for parameter or module names, such as 'conv1' or '*.bias'.",
    ),
    (
        ConvNet,
        {"bits": 1, "rules": {"fc": {"bit": 2}}},
        "param_groups: rule 'fc': unknown key 'bit'; did you mean 'bits'?",
    ),
    (
        ConvNet,
        {"bits": 1, "rules": {"fc": {"zzz": 2}}},
        "param_groups: rule 'fc': unknown key 'zzz'; expected 'bits', 'granularity' or 'solver'.",
    ),
    (
        ConvNet,
        {"bits": 1, "rules": {"fc": {}}},
        "param_groups: rule 'fc': expected some of the keys 'bits', 'granularity', 'solver'; None keeps float.",
    ),
    (
        ConvNet,
        {"bits": 1, "rules": {"fc": {"bits": None, "granularity": "channel"}}},
        "param_groups: rule 'fc': float weights have no granularity or solver; give it bits, or only 'float'.",
    ),
    (
        ConvNet,
        {"bits": None, "rules": {"fc": {"granularity": "channel"}}},
        "param_groups: rule 'fc': float weights have no granularity or solver; give it bits, or only 'float'.",
    ),
    (
        ConvNet,
        {"bits": 1, "rules": {"convv*": None}},
        "param_groups: rule 'convv*' matched no parameter; names start with 'conv1', 'bn1', 'conv2', 'fc'.",
    ),
    (
        ConvNet,
        {"bits": 1, "rules": {"conv1.wieght": None}},
        "param_groups: rule 'conv1.wieght' matched no parameter; did you mean 'conv1.weight'... 'conv2.weight'...",
    ),
    (
        Transformer,
        {"bits": 1, "rules": {"out_proj": None}},
        "param_groups: rule 'out_proj' matched no parameter; did you mean '*.out_proj'?",
    ),
    (
        lambda: nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(14)]),
        {"bits": 1, "rules": {"fc": None}},
        "param_groups: rule 'fc' matched no parameter; names start with '0', '1', ..., '11' and 2 more.",
    ),
    (
        frozen_conv1,
        {"bits": 1, "rules": {"conv1": 4}},
        "param_groups: rule 'conv1' matched only frozen parameters: 'conv1.weight', 'conv1.bias'; "
        "set requires_grad=True on them or drop the rule.",
    ),
    (
        ConvNet,
        {"bits": 1, "rules": {"conv*": 2, "conv1": 4}},
        "param_groups: rule 'conv1' has no effect: 'conv*' before it takes all that it matches; move it up or drop it.",
    ),
    (
        ConvNet,
        {"bits": 1, "rules": {"conv1": 2, "conv2": 3, "fc": None, "conv?": 4}},
        "param_groups: rule 'conv?' has no effect: 'conv1' and 'conv2' before it take all that it matches; "
        "move it up or drop it.",
    ),
    (
        ConvNet,
        {"bits": 1, "rules": {"bn1": 2}},
        "param_groups: rule 'bn1' quantizes nothing, it takes only 'bn1.weight' (normalisation), 'bn1.bias' "
        "(normalisation); spell out the name, as in 'bn1.weight', to quantize such a parameter, or drop the rule.",
    ),
    (
        ConvNet,
        {"bits": 1, "rules": {"*.weight": 2, "fc": 4}},
        "param_groups: rule 'fc' quantizes nothing, it takes only 'fc.bias' (bias); spell out ...",
    ),
    (
        Transformer,
        {"bits": 1, "rules": {"token": {"granularity": "channel"}}},
        "param_groups: rule 'token' quantizes nothing, it takes only 'token.weight' (embedding); give the rule bits "
        "to quantize such a parameter, or drop the rule.",
    ),
    (
        lambda: nn.ModuleDict({"fc": nn.Linear(2, 2), "norms": nn.Sequential(*[nn.LayerNorm(2) for _ in range(5)])}),
        {"bits": 1, "rules": {"norms": 2}},
        "param_groups: rule 'norms' quantizes nothing, ... 'norms.3.bias' (normalisation) and 2 more; ...",
    ),
    (
        ConvNet,
        {"bits": 2, "granularity": 4, "rules": {"fc": {"granularity": 5}}},
        "param_groups: the group size does not divide the inputs per output of 'conv1.weight' (27 by 4), "
        "'fc.weight' (8 by 5); choose another, or put a rule with granularity 'channel' first, such as "
        "rules={'conv1.weight': {'bits': 'ternary', 'granularity': 'channel'}}.",
    ),
    (
        ConvNet,
        {"bits": None, "rules": {"fc.bias": {"bits": 2, "granularity": 4}}},
        "param_groups: the group size does not divide the inputs per output of 'fc.bias' (10 by 4); ...",
    ),
    (
        nn.ReLU,
        {"bits": None},
        "param_groups: the model has no trainable parameters; set requires_grad=True on some.",
    ),
    (
        lambda: nn.Linear(2, 2).requires_grad_(False),
        {"bits": 1},
        "param_groups: the model has no trainable parameters; set requires_grad=True on some.",
    ),
    (
        lambda: nn.LayerNorm(3),
        {"bits": "midrise2"},
        "param_groups(bits='midrise2'): nothing is left to quantize, every parameter stays in float; name what to "
        "quantize in rules, or pass bits=None.",
    ),
    (ConvNet, {"bits": 1, "rules": {"*": "float"}}, "param_groups(bits=1): nothing is left to quantize, ..."),
]


@pytest.mark.parametrize(("build", "arguments", "message"), ERRORS, ids=[str(i) for i in range(len(ERRORS))])
def test_errors_name_the_way_out(build: Any, arguments: dict[str, Any], message: str) -> None:
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    with pytest.raises(ValueError, match=f"^{pattern}$"):
        param_groups(build(), **arguments)


def test_the_remedy_for_group_sizes_works() -> None:
    rules = {"conv1.weight": {"bits": "ternary", "granularity": "channel"}}
    assert schemes(param_groups(ConvNet(), 2, granularity=4, rules=rules))["conv2.weight"] == (
        "ternary",
        4,
        "alternating",
    )


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^param_groups: '0\.weight' has no shape yet; run a batch through"):
        param_groups(nn.Sequential(nn.LazyLinear(3)), 1)


# Layers with the parameters that are quantized by default, and with those that a rule for the module quantizes.
LAYERS: dict[str, tuple[Any, set[str], set[str]]] = {
    "linear": (lambda: nn.Linear(2, 3), {"weight"}, {"weight"}),
    "conv": (lambda: nn.Conv1d(2, 3, 2), {"weight"}, {"weight"}),
    "lstm": (lambda: nn.LSTM(2, 2), {"weight_ih_l0", "weight_hh_l0"}, {"weight_ih_l0", "weight_hh_l0"}),
    "norm": (lambda: nn.BatchNorm1d(2), set(), set()),
    "wide_norm": (lambda: nn.LayerNorm([2, 2]), set(), set()),
    "embedding": (lambda: nn.Embedding(3, 2), set(), {"weight"}),
    "prelu": (lambda: nn.PReLU(2), set(), set()),
    "relu": (nn.ReLU, set(), set()),
}
Tree = st.recursive(
    st.sampled_from(sorted(LAYERS)),
    lambda children: st.dictionaries(st.sampled_from("abc"), children, min_size=1, max_size=3),
    max_leaves=8,
)


def build(tree: Any, prefix: str, default: set[str], by_module: set[str]) -> nn.Module:
    """The module of a tree; adds the full names of what is quantized by default and by a rule for a module."""
    if isinstance(tree, dict):
        return nn.ModuleDict({key: build(child, f"{prefix}{key}.", default, by_module) for key, child in tree.items()})
    layer, own_default, own_by_module = LAYERS[tree]
    default |= {prefix + name for name in own_default}
    by_module |= {prefix + name for name in own_by_module}
    return layer()


@given(st.dictionaries(st.sampled_from("abc"), Tree, min_size=1, max_size=3), st.data())
@settings(max_examples=150)
def test_groups_partition_the_trainable_parameters(tree: Any, data: st.DataObject) -> None:
    """Any tree, any frozen parameters, any rules for modules: the groups are what a plain loop over the names says."""
    default: set[str] = set()
    by_module: set[str] = set()
    # One layer is always there to be quantized, or most trees would only show an error.
    model = build({**tree, "d": "linear"}, "", default, by_module)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "d.weight" or data.draw(st.integers(0, 3)) > 0)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    modules = sorted({name[:i] for name, _ in model.named_parameters() for i, c in enumerate(name) if c == "."})
    values = st.sampled_from([None, 1, 4])
    rules = data.draw(st.dictionaries(st.sampled_from(modules), values, max_size=2)) if modules else {}

    names = {1: "binary", 4: "linear4", None: None}
    expected: dict[str, str | None] = {}
    useless = set(rules)
    for name in trainable:
        rule = next((r for r in rules if name.startswith(r + ".")), None)
        expected[name] = ("ternary" if name in default else None) if rule is None else None
        if rule is not None:
            if rules[rule] is None:
                useless.discard(rule)
            elif name in by_module:
                useless.discard(rule)
                expected[name] = names[rules[rule]]

    if useless or not any(expected.values()):
        with pytest.raises(ValueError, match="param_groups"):
            param_groups(model, 2, rules=rules)
        return
    groups = param_groups(model, 2, rules=rules)
    assert grids(groups) == expected
    listed = [(name, p) for g in groups for name, p in zip(g["param_names"], g["params"], strict=True)]
    assert len(listed) == len(trainable)
    assert all(trainable[name] is p for name, p in listed)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_ties_of_any_pattern_appear_once(owners: list[int]) -> None:
    """Layer i uses weight number owners[i]: every weight is listed once, and every name is accounted for."""
    weights = [nn.Parameter(torch.zeros(2, 2)) for _ in range(4)]
    model = nn.ModuleList()
    for owner in owners:
        layer = nn.Linear(2, 2, bias=False)
        layer.weight = weights[owner]
        model.append(layer)
    (group,) = param_groups(model, 1)
    assert sorted(map(id, group["params"])) == sorted({id(weights[owner]) for owner in owners})
    told: list[str] = []
    for name, note in zip(group["param_names"], group["notes"], strict=True):
        told += [name, *(note.removeprefix("tied with ").split(", ") if note else [])]
    assert sorted(told) == sorted(f"{i}.weight" for i in range(len(owners)))


def test_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    groups = param_groups(transformers.GPT2LMHeadModel(config), 2)
    linear = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert quantized(groups) == {f"transformer.h.{i}.{name}.weight" for i in (0, 1) for name in linear}
    assert notes(groups)["transformer.wte.weight"] == f"{EMBEDDING}; tied with lm_head.weight"
    assert notes(groups)["transformer.wpe.weight"] == EMBEDDING
    assert notes(groups)["transformer.h.1.ln_2.weight"] == "normalisation"
    assert set(notes(groups)) == {name for name, _ in transformers.GPT2LMHeadModel(config).named_parameters()}


def test_vit() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    model = transformers.ViTForImageClassification(config)
    groups = param_groups(model, 2)
    by_kind = {
        name + ".weight" for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }  # what the modules are, not what the parameters are called
    assert len(by_kind) == 8
    assert quantized(groups) == by_kind
    assert notes(groups)["vit.embeddings.cls_token"] == OTHER
    assert notes(groups)["vit.embeddings.position_embeddings"] == OTHER
