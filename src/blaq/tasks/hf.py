"""Networks of the transformers library, built from a config alone: no weights and nothing else is downloaded."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blaq.tasks.hints import did_you_mean

__all__ = ["TASKS", "hf_network"]

TASKS = ("image-classification", "text-classification", "text-generation")
"""What an "hf:" network can be built for; the logits are (N, classes), (N, classes) and (N, T, classes)."""


def hf_network(source: str, /, *, task: str | None = None, classes: int | None = None, **options: Any) -> nn.Module:
    """Build a randomly initialised transformers network that returns its logits alone.

    The module is transformers' own, with its parameter names and its `save_pretrained`; a forward hook takes the logits
    out of the output object.

    Args:
        source: a model type ("resnet", "vit", "gpt2", "bert"), or a folder (a name with a "/") with a config.json;
            weights in the folder are not read.
        task: one of `TASKS`. None: what the folder's config was saved for; else image-classification if the model type
            has it, text-generation for decoders (gpt2, llama), text-classification for encoders (bert, distilbert).
        classes: number of labels; for text-generation the size of the vocabulary. None keeps the config's.
        options: fields of the config, such as num_hidden_layers=2.

    Raises:
        ImportError: transformers is not installed.
        ValueError: unknown model type, task or option, a value the config refuses, or a folder without a config.json.
    """
    owner = f"build_model(name='hf:{source}')"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{owner}: needs transformers; pip install 'blaq[hf]'.") from error

    model_type, saved = _read_config(owner, Path(source)) if "/" in source else (source, {})
    if model_type not in transformers.CONFIG_MAPPING:
        hint = did_you_mean(model_type, transformers.CONFIG_MAPPING)
        raise ValueError(f"{owner}: expected a key of transformers.CONFIG_MAPPING or a ./folder{hint or '.'}")
    _check_options(owner, transformers.AutoConfig.for_model(model_type), options)
    task = _choose_task(owner, transformers.CONFIG_MAPPING[model_type], task, saved.get("architectures"))
    if classes is not None:
        options = _sized(owner, task, classes, options)
    builders: dict[str, Any] = {
        "image-classification": transformers.AutoModelForImageClassification,
        "text-classification": transformers.AutoModelForSequenceClassification,
        "text-generation": transformers.AutoModelForCausalLM,
    }
    try:
        config = transformers.AutoConfig.for_model(model_type, **(saved | options))
        if task == "text-generation" and "use_cache" not in options:
            config.use_cache = False  # keys and values of earlier calls are of no use in training
        network: nn.Module = builders[task].from_config(
            config, dtype=torch.get_default_dtype(), trust_remote_code=False
        )
    except MemoryError:
        raise
    except Exception as error:  # every model type raises its own kinds at values that it cannot use
        raise ValueError(
            f"{owner}: transformers refuses the config ({type(error).__name__}: {error}); change model.options, or the "
            "folder's config.json."
        ) from error
    network.register_forward_hook(_logits_only)
    return network


def _logits_only(network: nn.Module, inputs: object, output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


def _read_config(owner: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Model type and fields of the config.json in a folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{owner}: expected a folder with a config.json; nothing is downloaded from the hub, "
            f"write it first with AutoConfig.from_pretrained(...).save_pretrained(folder)."
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # no JSON, or not even text
        raise ValueError(f"{owner}: {str(path)!r} is not the JSON of a config ({error}).") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{owner}: {str(path)!r} is not the JSON of a config: expected an object.")
    return saved.pop("model_type", ""), saved


def _check_options(owner: str, default: Any, options: dict[str, Any]) -> None:
    """A transformers config keeps unknown arguments as attributes without a word, so misspelt ones are caught here."""
    fields = {*default.to_dict(), *default.attribute_map, "num_labels"} - {"model_type", "transformers_version"}
    known = sorted(field for field in fields if not field.startswith("_"))
    for key, value in options.items():
        if key not in known:
            listed = ", ".join(["task", "classes", *known])
            hint = did_you_mean(key, known) or "."
            raise ValueError(f"{owner}: unknown option {key}={value!r}; expected one of {listed}{hint}")


def _choose_task(owner: str, config_class: type, task: str | None, architectures: list[str] | None) -> str:
    import transformers

    heads: dict[str, Any] = {
        "image-classification": transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        "text-generation": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        "text-classification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }
    supported = [name for name, mapping in heads.items() if config_class in mapping]
    if task is not None and task not in supported:
        raise ValueError(f"{owner}: task={task!r}: expected one of {', '.join(supported) or 'none (no such head)'}.")
    if task is not None:
        return task
    for name in supported:
        if architectures and heads[name][config_class].__name__ in architectures:
            return name
    # A model with a masked-language head reads in both directions: an encoder, which cannot predict the next token.
    if config_class in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        supported = [name for name in supported if name != "text-generation"]
    if not supported:
        raise ValueError(f"{owner}: expected a model type with a head for one of {', '.join(TASKS)}.")
    return supported[0]


def _sized(owner: str, task: str, classes: int, options: dict[str, Any]) -> dict[str, Any]:
    """Options with the number of classes under the config's own name for it."""
    field = "vocab_size" if task == "text-generation" else "num_labels"
    if field in options:
        raise ValueError(f"{owner}: classes={classes} and {field}={options[field]} mean the same; give one of them.")
    if task == "text-generation":  # the special tokens of the original vocabulary do not exist in another one
        options = {"bos_token_id": None, "eos_token_id": None} | options
    return options | {field: classes}
