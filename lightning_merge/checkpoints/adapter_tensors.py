"""The tensors of a LoRA adapter, sorted by the modules of the base that they change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from lightning_merge.checkpoints.adapter_config import CONFIG, WITH_PEFT, AdapterConfig
from lightning_merge.checkpoints.model_config import ModelConfig, is_called_conv1d
from lightning_merge.checkpoints.weights import Weights
from lightning_merge.utilities.errors import raise_all

_PREFIX = "base_model.model."
_PARTS = {
    "A": re.compile(r"(.+)\.lora_(?:embedding_)?A(?:\.default)?(?:\.weight)?"),
    "B": re.compile(r"(.+)\.lora_(?:embedding_)?B(?:\.default)?(?:\.weight)?"),
    "bias": re.compile(r"(.+)\.lora_B(?:\.default)?\.bias"),
    "magnitude": re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?"),
    "tokens": re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?"),
}
_EMBEDDING = re.compile("emb|wte|shared|head|decoder|proj_out|^output$")
"""How embeddings and the heads that are tied to them are called."""
_UNTIE = (
    "untie the base first: load it with transformers' from_pretrained(…, tie_word_embeddings=False), call "
    "model.get_output_embeddings().weight.data.copy_(model.get_input_embeddings().weight), save it with "
    "save_pretrained, and give that folder as the base"
)


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter, sorted.

    Args:
        name: What to call the adapter in messages.
        config: Its configuration.
        stored: Its tensors.
        origin: The base.
        prefix: What the base's names have in front of the adapter's.
        modules: ``{module: {part: key}}`` under the base's names; the parts are the factors ``A`` and ``B``, the
            ``bias`` that goes with them, the ``magnitude`` of a DoRA, and the ``tokens`` (rows) of an embedding.
        replaced: ``{parameter: key}`` of what was trained as a whole.
    """

    name: str
    config: AdapterConfig
    stored: Weights
    origin: Weights
    prefix: str
    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)

    def own_name(self, module: str) -> str:
        """Return the name that a module has for the adapter."""
        return module.removeprefix(self.prefix)

    def shape(self, module: str, part: str) -> torch.Size:
        """Return the shape of a part that is there."""
        return self.stored.meta[self.modules[module][part]].shape

    def is_embedding(self, module: str) -> bool:
        """Tell whether a module was adapted as an embedding, whose weight is the transpose of the product."""
        return "lora_embedding_" in self.modules[module].get("A", "")


def sort_tensors(
    name: str, config: AdapterConfig, stored: Weights, origin: Weights, prefix: str, model: ModelConfig
) -> AdapterTensors:
    """Sort the tensors of an adapter by what they change, and check that the base has all of it.

    Args:
        name: What to call the adapter in messages.
        config: Its configuration.
        stored: Its tensors.
        origin: The base.
        prefix: What the base's names have in front of the adapter's.
        model: What the base's configuration says.

    Raises:
        MergeError: If not all of them are those of a LoRA, or if they are those of another base.
    """
    adapter = AdapterTensors(name, config, stored, origin, prefix)
    problems = []
    for key in stored:
        stem = key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        matches = ((part, pattern.fullmatch(stem)) for part, pattern in _PARTS.items())
        part, match = next(((part, match) for part, match in matches if match), ("", None))
        if match:
            adapter.modules.setdefault(prefix + match[1], {})[part] = key
        elif "lora_" in stem or ".token_adapter." in stem:
            problems.append(f"The adapter {name} holds {key!r}, which a LoRA that is known here does not have.")
        else:
            adapter.replaced[prefix + stem] = key
    raise_all([*problems, *_incomplete(adapter)])
    raise_all([*_tied(adapter, model), *_absent(adapter, model)])
    return adapter


def _incomplete(adapter: AdapterTensors) -> Iterator[str]:
    """Yield a sentence for each module of which the adapter holds too little or too much."""
    for module, parts in adapter.modules.items():
        what = f"The adapter {adapter.name} holds of {module + '.weight'!r}"
        factors = parts.keys() - {"tokens"}
        if "tokens" in parts and factors:
            yield f"{what} both factors and single rows; {WITH_PEFT}."
        elif factors and not {"A", "B"} <= factors:
            yield f"{what} only one of the two factors."
        elif factors and adapter.config.use_dora and "magnitude" not in parts:
            yield f"{what} no magnitudes, which a DoRA has; save the adapter again."
        elif "magnitude" in parts and not adapter.config.use_dora:
            yield f"{what} magnitudes ({parts['magnitude']!r}), which only a DoRA has (use_dora: true)."


def _tied(adapter: AdapterTensors, model: ModelConfig) -> Iterator[str]:
    """Yield a sentence for each changed embedding that the base's configuration ties to another one.

    Rows that were trained by themselves are those of both for peft, too.
    """
    if not model.ties:
        return
    rows = {
        module: adapter.shape(module, "A")[-1] if adapter.is_embedding(module) else adapter.shape(module, "B")[0]
        for module, parts in adapter.modules.items()
        if "A" in parts
    }
    rows |= {
        parameter.removesuffix(".weight"): adapter.stored.meta[key].shape[0]
        for parameter, key in adapter.replaced.items()
        if adapter.stored.meta[key].dim() == 2
    }
    for module, count in rows.items():
        if count in model.vocabularies and _EMBEDDING.search(module.rpartition(".")[2]):
            yield (
                f"The adapter {adapter.name} changes {module + '.weight'!r}, which the config.json of the base "
                f"{adapter.origin.name} ties to the other embedding (tie_word_embeddings), and peft changes one of "
                f"them alone in some cases and both in others; {_UNTIE}."
            )


def _absent(adapter: AdapterTensors, model: ModelConfig) -> Iterator[str]:
    """Yield a sentence for each parameter that the adapter changes and the base lacks."""
    origin = adapter.origin
    for module in adapter.modules:
        if f"{module}.in_proj_weight" in origin and f"{module}.weight" not in origin:
            yield (
                f"The adapter {adapter.name} adapts {module!r}, a MultiheadAttention, of which peft adds the change "
                f"of out_proj more than once; {WITH_PEFT}."
            )
    biases = [f"{module}.bias" for module, parts in adapter.modules.items() if "bias" in parts]
    weights = [f"{module}.weight" for module in adapter.modules if f"{module}.in_proj_weight" not in origin]
    for parameter in (*weights, *biases, *adapter.replaced):
        if parameter not in origin:
            yield (
                f"The adapter {adapter.name} adapts {parameter!r}, which the base {origin.name} lacks; give the base "
                "that it was trained on, or open it by lightning_merge.checkpoints.open_adapter with what stands "
                f"before the names there as its `prefix` (they look like {next(iter(origin))!r})."
            )


def find_transposed(adapter: AdapterTensors, model: ModelConfig) -> dict[str, bool]:
    """Find out of which adapted modules the weight is the transpose of the product: ``Conv1D``, embeddings.

    Shapes tell, except those of square matrices; peft itself looks at the layers' types, and its ``fan_in_fan_out`` is
    that of the last one.

    Raises:
        MergeError: If nothing tells.
    """
    found: dict[str, bool | None] = {}
    seen: dict[bool, set[bool]] = {True: set(), False: set()}  # by whether layers are called as those of GPT-2
    doubtful = []
    for module, parts in adapter.modules.items():
        if "A" not in parts:
            continue
        shape, product = adapter.origin.meta[f"{module}.weight"].shape, product_shape(adapter, module)
        if adapter.is_embedding(module) or len(product) != 2:
            found[module] = adapter.is_embedding(module)
        elif shape == product == product[::-1]:
            doubtful.append(module)
        else:
            found[module] = shape == product[::-1]
            seen[is_called_conv1d(module)].add(shape == product[::-1])
    for module in doubtful:
        told = model.is_conv1d(module)
        found[module] = _by_others(adapter.config, module, seen) if told is None else told
    raise_all(
        [
            f"{module + '.weight'!r} is square, and nothing tells whether it is stored as (out, in) or, as a Conv1D of "
            f"GPT-2 is, as (in, out): the adapter {adapter.name} has both, or says fan_in_fan_out of others; give the "
            f"base as the folder with its config.json, or {WITH_PEFT}."
            for module in doubtful
            if found[module] is None
        ]
    )
    return {module: bool(transposed) for module, transposed in found.items()}


def _by_others(config: AdapterConfig, module: str, seen: Mapping[bool, set[bool]]) -> bool | None:
    """Infer whether a square weight is transposed from layers that are called alike; None if that would be a guess."""
    alike = seen[is_called_conv1d(module)]
    if not is_called_conv1d(module):
        return None if config.fan_in_fan_out or True in alike else False
    if not alike:
        return True if config.fan_in_fan_out else None
    return True in alike if len(alike) == 1 else None


def product_shape(adapter: AdapterTensors, module: str) -> torch.Size:
    """Return the shape ``(out, in, …)`` of the product of a module's factors."""
    A, B = adapter.shape(module, "A"), adapter.shape(module, "B")
    return torch.Size([*B[:1], *A[1:]])


def find_misfits(adapter: AdapterTensors, transposed: Mapping[str, bool]) -> Iterator[str]:
    """Yield a sentence for each tensor of an adapter whose shape is not that of what it changes.

    Args:
        adapter: The adapter.
        transposed: Whether the weight of a module is the transpose of the product.
    """
    origin, name = adapter.origin, adapter.name
    for module, parts in adapter.modules.items():
        parameter = f"{module}.weight"
        shape = origin.meta[parameter].shape
        if "tokens" in parts:
            yield from _token_misfits(adapter, module)
            continue
        A, B, rank = (
            adapter.shape(module, "A"),
            adapter.shape(module, "B"),
            adapter.config.rank(adapter.own_name(module)),
        )
        product = product_shape(adapter, module)
        what = f"The adapter {name} has factors {tuple(A)} and {tuple(B)} of {parameter!r},"
        groups = A[1] // shape[1] if len(A) == len(shape) > 2 and shape[1] else 1
        if groups > 1 and A[0] == rank == B[1] * groups:
            yield (
                f"{what} a convolution in {groups} groups; no weights of it give the same model, and peft merges none "
                "either; leave this expert out."
            )
        elif A[:1] != B[1:2] or A[:1] != (rank,):
            yield f"{what} which is not the rank {rank} that its {CONFIG} says."
        elif (product[::-1] if transposed[module] else product) != shape:
            yield f"{what} which does not fit the base's {tuple(shape)}; give the base that it was trained on."
        elif any(adapter.shape(module, part).numel() != product[0] for part in ("bias", "magnitude") if part in parts):
            yield f"The adapter {name} has a bias or magnitudes that do not fit the outputs of {parameter!r}."
    for parameter, key in adapter.replaced.items():
        if adapter.stored.meta[key].shape != origin.meta[parameter].shape:
            yield (
                f"{parameter!r} has shape {tuple(adapter.stored.meta[key].shape)} in the adapter {name} and "
                f"{tuple(origin.meta[parameter].shape)} in the base; give the base that it was trained on."
            )


def _token_misfits(adapter: AdapterTensors, module: str) -> Iterator[str]:
    """Yield a sentence if the rows that were trained by themselves are not those that the configuration says."""
    shape, found = adapter.origin.meta[f"{module}.weight"].shape, adapter.shape(module, "tokens")
    tokens = adapter.config.tokens(adapter.own_name(module))
    if len(set(tokens)) != len(tokens) or found != (len(tokens), *shape[1:]) or max(tokens, default=0) >= shape[0]:
        yield (
            f"The adapter {adapter.name} has rows {tuple(found)} of {module + '.weight'!r} {tuple(shape)}, which are "
            f"not the {len(tokens)} that trainable_token_indices of its {CONFIG} says; give the folder that peft wrote."
        )
