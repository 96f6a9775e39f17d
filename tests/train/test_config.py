"""Recipes: what they hold, what they refuse, and that the shipped ones state the papers' settings."""

import ast
import inspect
import string
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blaq.optim.groups import param_groups
from blaq.tasks.models import build_model
from blaq.train import config, methods
from blaq.train.config import (
    METHODS,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    RuleConfig,
    TrainConfig,
    load_recipe,
    recipe_paths,
)
from blaq.train.module import build_optimizer

RECIPE = Recipe(
    name="tiny",
    title="Tiny",
    data=DataConfig(source="digits"),
    model=ModelConfig(name="mlp"),
    optim=OptimConfig(),
    train=TrainConfig(epochs=10),
)


# Documentation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [config, methods])
def test_every_field_is_followed_by_a_sentence(module: Any) -> None:
    classes = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)]
    assert classes
    for node in classes:
        for field, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                name = f"{node.name}.{ast.unparse(field.target)}"
                sentence = ast.literal_eval(below.value) if isinstance(below, ast.Expr) else ""
                assert sentence.endswith("."), f"{name} is not followed by a sentence"


@pytest.mark.parametrize("kind", [DataConfig, ModelConfig, RuleConfig, OptimConfig, TrainConfig, Recipe])
def test_settings_are_frozen_and_given_by_name(kind: type) -> None:
    assert "__slots__" in vars(kind)
    assert all(field.kw_only for field in fields(kind))
    with pytest.raises(TypeError, match="positional"):
        kind("x")
    with pytest.raises(FrozenInstanceError):
        RECIPE.train.epochs = 3  # type: ignore[misc]


# Writing and reading -------------------------------------------------------------------------------------------------

_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
_word = st.text(string.ascii_letters, min_size=1, max_size=6)
_positive = st.floats(min_value=5e-324, max_value=1.7e308)
_count = st.integers(1, 10**6)
_seed = st.integers(0, 2**32 - 1)
_bits = st.one_of(st.integers(1, 8), st.sampled_from(["ternary2", "binary", "log4", "midrise3"]))
_granularity = st.one_of(st.sampled_from(["tensor", "channel"]), _count)
_solver = st.sampled_from(["exact", "alternating"])
_rule = st.one_of(
    _bits,
    st.just("float"),
    st.builds(RuleConfig, bits=_bits, granularity=st.none() | _granularity, solver=st.none() | _solver),
)
_toml_values = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), _text, st.datetimes(), st.dates()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=6,
)
_schedule = st.sampled_from(
    [
        {"schedule": "constant"},
        {"schedule": "cosine"},
        {"schedule": "step", "schedule_every": 7, "schedule_factor": 0.1},
        {"schedule": "exponential", "schedule_factor": 0.95},
    ]
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    period = draw(st.integers(1, 50))
    data = DataConfig(
        source=draw(_text),
        train=draw(st.none() | _count),
        validation=draw(st.none() | _count),
        test=draw(st.none() | _count),
        split_seed=draw(_seed),
        batch_size=draw(_count),
        augment=draw(st.booleans()),
        image_size=draw(st.none() | _count),
    )
    optim = OptimConfig(
        method=draw(st.sampled_from(sorted(METHODS))),
        bits=draw(_bits),
        granularity=draw(_granularity),
        solver=draw(_solver),
        rules=draw(st.dictionaries(_text, _rule, max_size=4)),
        lr=draw(_positive),
        betas=draw(st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2)),
        eps=draw(_positive),
        weight_decay=draw(st.floats(0, 1e300)),
        a=draw(st.floats(0, 1)),
        period=period,
        trial_every=draw(_count),
        clip=draw(st.none() | _positive),
        **draw(_schedule),
    )
    return Recipe(
        name=draw(_word),
        title=draw(_text),
        data=data if draw(st.booleans()) else replace(data, augment=False, image_size=None, sequence=draw(_count)),
        model=ModelConfig(
            name=draw(_text),
            loss=draw(st.sampled_from(["squared_hinge", "cross_entropy"])),
            options=draw(st.dictionaries(_text, _toml_values, max_size=3)),
        ),
        optim=optim,
        train=TrainConfig(
            epochs=draw(st.integers(period, 1000)),
            seed=draw(_seed),
            threads=draw(st.none() | st.integers(1, 1024)),
            gradient_clip=draw(st.none() | _positive),
        ),
    )


@given(recipe=recipes())
def test_a_written_recipe_reads_back_equal(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8", newline="")
    back = load_recipe(path)
    assert back == recipe
    assert list(back.optim.rules) == list(recipe.optim.rules)  # the first match wins: their order counts
    assert back.to_toml() == recipe.to_toml()


@pytest.mark.parametrize("rule", [RuleConfig(bits=2), RuleConfig(granularity="channel"), RuleConfig(solver="exact")])
def test_a_rule_may_leave_the_rest_to_the_recipe(rule: RuleConfig, tmp_path: Path) -> None:
    recipe = replace(RECIPE, optim=replace(RECIPE.optim, rules={"fc1": rule}))
    (tmp_path / "run.toml").write_text(recipe.to_toml())
    assert load_recipe(tmp_path / "run.toml").optim.rules == {"fc1": rule}


def test_a_written_recipe_states_every_setting() -> None:
    written = RECIPE.to_toml()
    for section in (RECIPE.data, RECIPE.model, RECIPE.optim, RECIPE.train):
        for field in fields(section):
            assert f"\n{field.name} = " in written


def test_what_toml_cannot_say_is_an_error() -> None:
    for options in ({"a": None}, {"a": [{"b": None}]}):
        with pytest.raises(ValueError, match="None cannot be written as TOML"):
            replace(RECIPE, model=ModelConfig(name="mlp", options=options)).to_toml()


def test_with_returns_a_changed_copy() -> None:
    before = RECIPE.to_toml()
    changed = RECIPE.with_(["train.seed=3", "optim.rules.fc*=float", "model.options.hidden=[8]"])
    assert (changed.train.seed, changed.optim.rules, changed.model.options) == (3, {"fc*": "float"}, {"hidden": [8]})
    assert RECIPE.to_toml() == before
    assert RECIPE.with_([]) == RECIPE


def test_a_recipe_is_named_as_its_file_unless_it_says_otherwise(tmp_path: Path) -> None:
    body = "title = 'T'\n[data]\nsource = 'digits'\n[model]\nname = 'mlp'\n[train]\nepochs = 2\n"
    (tmp_path / "base.toml").write_text("name = 'stated'\n" + body)
    (tmp_path / "leaf.toml").write_text("extends = 'base.toml'\n")
    (tmp_path / "plain.toml").write_text(body)
    assert [load_recipe(tmp_path / f"{name}.toml").name for name in ("base", "leaf", "plain")] == [
        "stated",
        "leaf",
        "plain",
    ]


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """As editors of Windows write it."""
    (tmp_path / "base.toml").write_text(RECIPE.to_toml(), encoding="utf-8-sig")
    (tmp_path / "leaf.toml").write_text("extends = 'base.toml'\n", encoding="utf-8-sig")
    assert load_recipe(tmp_path / "base.toml") == RECIPE
    assert load_recipe(tmp_path / "leaf.toml") == replace(RECIPE, name="leaf")


# Checks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source="], r"DataConfig\(source=''\): expected a name or a path"),
        (["data.train=0"], r"DataConfig\(train=0\): expected at least 1"),
        (["data.validation=-1"], r"DataConfig\(validation=-1\)"),
        (["data.test=0"], r"DataConfig\(test=0\)"),
        (["data.sequence=0"], r"DataConfig\(sequence=0\)"),
        (["data.image_size=0"], r"DataConfig\(image_size=0\)"),
        (["data.split_seed=4294967296"], r"DataConfig\(split_seed=4294967296\)"),
        (["data.batch_size=0"], r"DataConfig\(batch_size=0\)"),
        (
            ["data.augment=true", "data.sequence=9"],
            r"DataConfig\(augment=True\): expected false: sequence=9 reads text",
        ),
        (["data.image_size=8", "data.sequence=9"], r"DataConfig\(image_size=8\): expected none: sequence=9 reads text"),
        (["model.name="], r"ModelConfig\(name=''\)"),
        (["optim.bits=9"], r"OptimConfig\(bits=9\): Grid.parse\(9\): expected 1 to 8 bits"),
        (["optim.bits=terary"], r"OptimConfig\(bits='terary'\): .* did you mean 'ternary'\?"),
        (["optim.granularity=0"], r"OptimConfig\(granularity=0\): expected 'tensor', 'channel', or a group size"),
        (["optim.rules.fc=flaot"], r"OptimConfig\(rules\.fc='flaot'\)"),
        (["optim.rules.fc={bits=0}"], r"RuleConfig\(bits=0\)"),
        (["optim.rules.fc={granularity=-1}"], r"RuleConfig\(granularity=-1\)"),
        (["optim.rules.fc={}"], r"RuleConfig\(\): expected bits, granularity or solver"),
        (["optim.lr=0"], r"OptimConfig\(lr=0\.0\): expected a finite number > 0"),
        (["optim.lr=nan"], r"OptimConfig\(lr=nan\)"),
        (["optim.lr=inf"], r"OptimConfig\(lr=inf\)"),
        (["optim.betas=[0.9, 1]"], r"OptimConfig\(betas=\(0\.9, 1\.0\)\): expected 0 <= beta < 1"),
        (["optim.betas=[nan, 0.9]"], r"OptimConfig\(betas="),
        (["optim.eps=0"], r"OptimConfig\(eps=0\.0\)"),
        (["optim.weight_decay=-1"], r"OptimConfig\(weight_decay=-1\.0\)"),
        (
            ["optim.a=1.3"],
            r"OptimConfig\(a=1\.3\): expected 0 <= a <= 1 \(weight of the gradient at the current point\)\.",
        ),
        (["optim.a=nan"], r"OptimConfig\(a=nan\)"),
        (["optim.period=0"], r"OptimConfig\(period=0\)"),
        (["optim.trial_every=0"], r"OptimConfig\(trial_every=0\)"),
        (["optim.clip=0"], r"OptimConfig\(clip=0\.0\)"),
        (
            ["optim.schedule=step", "optim.schedule_factor=0.1"],
            r"schedule_every=None\): expected at least 1, for .* 'step'",
        ),
        (["optim.schedule=step", "optim.schedule_every=5"], r"schedule_factor=None\): expected 0 < factor < 1, for"),
        (
            ["optim.schedule=exponential"],
            r"schedule_factor=None\): expected 0 < factor < 1, for schedule 'exponential'",
        ),
        (["optim.schedule=exponential", "optim.schedule_factor=1"], r"schedule_factor=1\.0\)"),
        (["optim.schedule_factor=0.1"], r"schedule 'constant' does not read it; set optim\.schedule_factor=none"),
        (
            ["optim.schedule=exponential", "optim.schedule_factor=0.9", "optim.schedule_every=2"],
            r"schedule 'exponential' does not read it; set optim\.schedule_every=none",
        ),
        (["train.epochs=0"], r"TrainConfig\(epochs=0\)"),
        (["train.seed=-1"], r"TrainConfig\(seed=-1\)"),
        (["train.threads=0"], r"TrainConfig\(threads=0\)"),
        (["train.threads=1025"], r"TrainConfig\(threads=1025\): expected 1 to 1024, or none"),
        (["train.gradient_clip=0"], r"TrainConfig\(gradient_clip=0\.0\)"),
        (["name=a/b"], r"Recipe\(name='a/b'\): expected a name that a folder can have"),
        (["name=.."], r"Recipe\(name='\.\.'\)"),
        (["name="], r"Recipe\(name=''\)"),
    ],
)
def test_a_setting_out_of_range_is_an_error(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        RECIPE.with_(overrides)
    assert str(raised.value).startswith("--set ")


def test_a_period_without_a_single_two_stage_epoch_is_an_error() -> None:
    assert RECIPE.with_(["optim.period=10"]).optim.period == 10
    with pytest.raises(ValueError, match=r"Recipe\(optim\.period=11, train\.epochs=10\): expected period <= epochs"):
        RECIPE.with_(["optim.period=11"])
    # The same recipe, shortened, is fine for the methods that have no period.
    paper = RECIPE.with_(["optim.period=5"])
    for method in ("float", "laq", "past"):
        assert paper.with_([f"optim.method={method}", "train.epochs=2"]).train.epochs == 2
    with pytest.raises(ValueError, match=r"set optim\.period=1 for two stages in every epoch"):
        paper.with_(["train.epochs=2"])


# Methods -------------------------------------------------------------------------------------------------------------


def test_the_methods() -> None:
    rows = {name: (method.quantized, method.trial) for name, method in METHODS.items()}
    assert rows == {
        "float": (False, "none"),
        "bwn": (True, "none"),
        "laq": (True, "none"),
        "blaq": (True, "fresh"),
        "past": (True, "past"),
        "delayed": (True, "delayed"),
    }
    assert [name for name, method in METHODS.items() if method.curvature == "unit"] == ["bwn"]
    settings = {field.name for field in fields(OptimConfig)} - {"method"}
    assert all(method.ignores < settings for method in METHODS.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_runs_with_every_method_and_an_override_must_concern_the_one_it_runs_with(name: str) -> None:
    full = RECIPE.with_(["optim.bits=3", "optim.a=0.7", "optim.period=2", "optim.trial_every=3", "optim.clip=1"])
    run = full.with_([f"optim.method={name}"])
    assert replace(run, optim=replace(run.optim, method="blaq")) == full  # every setting is kept
    values = {"granularity": "channel", "solver": "alternating", "rules.fc": "float"}
    for setting in sorted(
        {field.name for field in fields(OptimConfig)} - {"method", "schedule_every", "schedule_factor"}
    ):
        key = "rules.fc" if setting == "rules" else setting
        written = toml_value(getattr(full.optim, setting)) if key not in values else values[key]
        for overrides in ([f"optim.{key}={written}"], [f"optim.{key}={written}", f"optim.method={name}"]):
            base = run if len(overrides) == 1 else full
            if setting in METHODS[name].ignores:
                with pytest.raises(ValueError, match=rf"method '{name}' does not read optim\.{setting}; leave it out"):
                    base.with_(overrides)
            else:
                base.with_(overrides)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_builds_its_optimizer_from_a_recipe_that_states_everything(name: str) -> None:
    settings = [
        "bits=3",
        "a=0.7",
        "period=2",
        "trial_every=3",
        "clip=1",
        "granularity=channel",
        "solver=exact",
        "rules.fc1=4",
    ]
    recipe = RECIPE.with_([f"optim.{setting}" for setting in settings]).with_([f"optim.method={name}"])
    opt = build_optimizer(build_model("mlp", hidden=[8]), recipe.optim)
    expected = 3 if name == "blaq" else 1
    assert [group["trial_every"] for group in opt.param_groups] == [expected] * len(opt.param_groups)
    assert opt.trial == METHODS[name].trial


def test_an_override_must_concern_one_of_the_methods_that_the_recipe_is_read_for() -> None:
    laq = RECIPE.with_(["optim.method=laq"])
    assert laq.with_(["optim.a=0.8"], ["laq", "blaq"]).optim.a == 0.8
    with pytest.raises(
        ValueError, match=r"none of the methods 'float', 'laq' reads optim\.a; leave it out, or add blaq or"
    ):
        RECIPE.with_(["optim.a=0.8"], ["float", "laq"])
    with pytest.raises(ValueError, match=r"method 'laq' does not read optim\.a"):
        RECIPE.with_(["optim.a=0.8"], ["laq"])
    assert RECIPE.with_(["optim.a=0.8"], ["laqq"]).optim.a == 0.8  # what is no method is for others to refuse


def toml_value(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def test_of_every_period_the_last_epoch_has_two_stages() -> None:
    paper = OptimConfig(method="blaq", period=5)
    assert [epoch for epoch in range(20) if paper.trial_in(epoch) == "fresh"] == [4, 9, 14, 19]
    assert {paper.trial_in(epoch) for epoch in range(20)} == {"fresh", "none"}
    assert {OptimConfig(method="blaq").trial_in(epoch) for epoch in range(20)} == {"fresh"}
    for method, trial in (("float", "none"), ("laq", "none"), ("past", "past")):
        assert {OptimConfig(method=method, period=5).trial_in(epoch) for epoch in range(20)} == {trial}  # type: ignore[arg-type]


# Shipped recipes -----------------------------------------------------------------------------------------------------

NAMES = [path.stem for path in recipe_paths()]
FULL = [name for name in NAMES if not name.endswith("-quick")]

# Section 8 of the papers' settings: data, examples (train, validation, test), model, options, batch, epochs, lr, a, m.
PAPERS: dict[str, dict[str, Any]] = {
    "mnist-mlp": {
        "data": ("ylecun/mnist", 50_000, 10_000, 10_000, 100),
        "model": ("mlp", "squared_hinge", {"inputs": 784, "hidden": [2048, 2048, 2048], "classes": 10}),
        "optim": (0.005, 0.6, 5),
        "epochs": 50,
    },
    "mnist-lenet5": {
        "data": ("ylecun/mnist", 50_000, 10_000, 10_000, 128),
        "model": ("lenet5", "squared_hinge", {"input_channels": 1, "image_size": 28, "classes": 10}),
        "optim": (0.005, 0.6, 5),
        "epochs": 20,
    },
    "cifar10-vgg": {
        "data": ("uoft-cs/cifar10", 45_000, 5_000, 10_000, 100),
        "model": ("vgg", "squared_hinge", {"channels": [128, 256, 512], "hidden": 1024, "classes": 10}),
        "optim": (0.02, 0.6, 5),
        "epochs": 100,
    },
    "svhn-vgg": {
        "data": ("ufldl-stanford/svhn", 598_388, 6_000, 26_032, 50),
        "model": ("vgg", "squared_hinge", {"channels": [64, 128, 256], "hidden": 1024, "classes": 10}),
        "optim": (0.001, 0.6, 5),
        "epochs": 50,
    },
    "imagenet-resnet18": {
        "data": ("ILSVRC/imagenet-1k", None, 10_000, None, 256),
        "model": ("resnet18", "squared_hinge", {"classes": 1000}),
        "optim": (2e-4, 0.9, 10),
        "epochs": 175,
    },
    "war-and-peace-lstm": {
        "data": ("war_and_peace", None, None, None, 100),
        "model": ("char_lstm", "cross_entropy", {"hidden": 512, "classes": 87}),
        "optim": (0.002, 0.6, 5),
        "epochs": 200,
    },
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_recipe_is_the_papers_setting(name: str) -> None:
    recipe, paper = load_recipe(name), PAPERS[name]
    data, model, optim = recipe.data, recipe.model, recipe.optim
    assert (data.source, data.train, data.validation, data.test, data.batch_size) == paper["data"]
    assert (model.name, model.loss, model.options) == paper["model"]
    assert (optim.lr, optim.a, optim.period) == paper["optim"]
    assert recipe.train.epochs == paper["epochs"]
    assert (optim.method, optim.bits, optim.granularity, optim.clip) == ("blaq", 1, "tensor", 1.0)
    assert (optim.betas, optim.weight_decay, data.augment) == ((0.9, 0.999), 0.0, False)


def test_the_stated_schedules() -> None:
    imagenet = load_recipe("imagenet-resnet18").optim
    assert (imagenet.schedule, imagenet.schedule_factor) == ("exponential", 0.95)
    lenet = load_recipe("mnist-lenet5").optim
    assert (lenet.schedule, lenet.schedule_every, lenet.schedule_factor) == ("step", 5, 0.1)
    assert load_recipe("war-and-peace-lstm").data.sequence == 100


def test_what_is_shipped() -> None:
    assert set(FULL) == {*PAPERS, "cifar10-lenet5", "cifar10-resnet20", "cifar10-resnet56", "demo"}
    assert set(NAMES) - set(FULL) == {f"{name}-quick" for name in FULL if name != "demo"}
    assert len({load_recipe(name).title for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", [name for name in FULL if name != "demo"])
def test_a_quick_variant_is_the_same_task_made_smaller(name: str) -> None:
    full, quick = load_recipe(name), load_recipe(f"{name}-quick")
    assert (quick.data.source, quick.model.name, quick.model.loss) == (
        full.data.source,
        full.model.name,
        full.model.loss,
    )
    assert (quick.optim.bits, quick.optim.a, quick.optim.rules) == (full.optim.bits, full.optim.a, full.optim.rules)
    examples = (quick.data.train or 0) // (quick.data.sequence or 1)
    assert quick.train.epochs <= 10
    assert 0 < examples <= 10_000


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_builds_its_network_and_quantizes_every_layer(name: str) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = build_model(recipe.model.name, **recipe.model.options)
    optim = recipe.optim
    groups = param_groups(model, optim.bits, optim.granularity, optim.solver, optim.group_rules())
    grids = {name: group["grid"] for group in groups for name in group["param_names"]}
    kept = {"fc.weight"} if recipe.model.name == "char_lstm" else set()  # LAB keeps the LSTM's output layer in float
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert {name for name, grid in grids.items() if grid == "binary"} == matrices - kept
    assert set(grids.values()) == {"binary", None}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_runs_with_every_method(name: str) -> None:
    for method in METHODS:
        assert load_recipe(name, [f"optim.method={method}"]).optim.method == method


def test_recipes_of_the_installed_package_come_before_those_of_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "__file__", str(tmp_path / "src" / "blaq" / "train" / "config.py"))
    assert recipe_paths() == []
    checkout, installed = tmp_path / "recipes", tmp_path / "src" / "blaq" / "recipes"
    for folder in (checkout, installed):
        folder.mkdir(parents=True)
        for name in ("b.toml", "a.toml", "notes.txt"):
            (folder / name).touch()
        assert recipe_paths() == [folder / "a.toml", folder / "b.toml"]


def test_a_recipe_that_nobody_has_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(
        ValueError, match=r"^recipe: 'mnist-lenet' is neither a file nor a shipped recipe; did you mean"
    ):
        load_recipe("mnist-lenet")
