"""What the ``config.json`` beside a model of Hugging Face says of its layers, where its tensors do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_merge.checkpoints.weights import Weights
from lightning_merge.utilities.schemas import load_json

_CONFIG = "config.json"
_SIZE = 1 << 20  # no such file has more bytes
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_encoder", "clvp_decoder"}
_LINEAR_MODELS = {"gpt_bigcode", "starcoder2"}  # which call linear layers as those of GPT-2 are called
_CONV1D_LAYERS = {"c_attn", "q_attn", "c_proj", "c_fc"}
_HEADS = ("LM", "ForConditionalGeneration", "DoubleHeadsModel")
"""What the class of a model with a language model's head has in its name."""


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a model of Hugging Face, as far as it is needed here; of any other model it says nothing.

    Args:
        types: The types of the model and of its parts (``gpt2``).
        ties: Whether the input embedding is the output head, too.
        vocabularies: The numbers of rows of the embeddings.
    """

    types: frozenset[str] = frozenset()
    ties: bool = False
    vocabularies: frozenset[int] = frozenset()

    def is_conv1d(self, module: str) -> bool | None:
        """Tell whether a layer is a ``Conv1D``, whose weight is ``(in, out)``; None if the model's type does not."""
        if self.types & _CONV1D_MODELS:
            return is_called_conv1d(module)
        return False if self.types & _LINEAR_MODELS else None


def is_called_conv1d(module: str) -> bool:
    """Tell whether a layer has a name that those of GPT-2, which are ``Conv1D``, have."""
    return module.rpartition(".")[2] in _CONV1D_LAYERS


def read_model_config(model: Weights) -> ModelConfig:
    """Read the configuration beside a model's file; an empty one if there is none, or none of Hugging Face."""
    file = None if model.path is None else model.path.parent / _CONFIG
    try:
        content = load_json(file.read_bytes()) if file is not None and file.stat().st_size <= _SIZE else None
    except (OSError, ValueError):
        return ModelConfig()
    parts = list(_parts(content))
    return ModelConfig(
        frozenset(part["model_type"] for part in parts if isinstance(part.get("model_type"), str)),
        bool(parts) and _ties(parts),
        frozenset(part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)),
    )


def _parts(content: Any) -> Iterator[dict[str, Any]]:
    """Walk through a configuration and those of its parts (``text_config``, ``decoder``), outermost first."""
    if isinstance(content, dict):
        yield content
        for part in content.values():
            if isinstance(part, dict) and "model_type" in part:
                yield from _parts(part)


def _ties(parts: list[dict[str, Any]]) -> bool:
    """Tell whether embedding and head are one; what a configuration leaves out is true, the default of transformers."""
    stated = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    classes = parts[0].get("architectures") or []
    has_head = any(word in str(name) for name in classes for word in _HEADS) if isinstance(classes, list) else False
    return bool(stated[0] if stated else True) and (has_head or (not classes and bool(stated)))
