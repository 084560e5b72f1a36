"""Tensors that mean something only together: normalised weights, quantized codes, factors, parametrizations.

A weight under ``torch.nn.utils.weight_norm`` (or ``parametrizations.weight_norm``) is stored as a magnitude g and a
direction v, ``w = g v / ‖v‖``. Many pairs stand for one weight, so that w is what is merged: it takes the place of v,
and the magnitude of what is merged takes that of g. What cannot be joined is found here by name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from lightning_merge.checkpoints.views import View
from lightning_merge.checkpoints.weights import Weights
from lightning_merge.utilities.tensors import wide

_CODES = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}
_CODES |= {getattr(torch, name) for name in ("float8_e4m3fnuz", "float8_e5m2fnuz", "uint16") if hasattr(torch, name)}
_CODE_NAMES = {"qweight", "qzeros", "W_q", "weight_packed", "codes"}
"""How quantized codes are called, of GPTQ and AWQ, HQQ, compressed-tensors, AQLM."""
_SCALE = re.compile(r"(\w*_)?(scales?(_inv)?|scb|absmax|q?zeros?|zero_point|quant_map|codebooks?)", re.IGNORECASE)
"""How what goes with them is called."""
_NO_CODES = re.compile(r"mask|bias|index|indices|ids|position")
"""How masks and indices are called, which are integers, too, and may have a scale beside them."""
_FACTOR = re.compile(r"(?:^|[._])(?:lora_|hada_w|lokr_w)", re.IGNORECASE)
_PARAMETRIZED = re.compile(r"(.*?)\.?parametrizations\.([^.]+)\.original\d*")


def find_magnitudes(model: Weights) -> dict[str, str]:
    """Find the magnitudes of normalised weights and their directions, ``{g: v}``."""
    found = {}
    for name in model:
        last = name.rpartition(".")[2]
        if last == "original0" and "parametrizations." in name:
            direction = name[:-1] + "1"
        elif last.endswith("_g") and "weight" in last:
            direction = name[:-1] + "v"
        else:
            continue
        if direction in model and _is_magnitude(model.meta[name], model.meta[direction]):
            found[name] = direction
    return found


def _is_magnitude(g: Tensor, v: Tensor) -> bool:
    """Tell whether one tensor has the shape of norms of another ``(…)``: of the whole, or along all axes but one."""
    if not (g.is_floating_point() and v.is_floating_point()):
        return False
    kept = [m for m, n in zip(g.shape, v.shape, strict=False) if m == n > 1]
    shapes = g.dim() == v.dim() and all(m in (1, n) for m, n in zip(g.shape, v.shape, strict=True))
    return g.dim() == 0 or (shapes and len(kept) <= 1)


def take_apart(weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Take a weight ``(…)`` apart into magnitude and direction, whose product it is again.

    Args:
        weight: The weight.
        g: Has the shape and dtype of the magnitude.

    Returns:
        The magnitude, in the shape of ``g``, and the direction ``(…)``: the weight itself, but for ones where it is
        zero, as zero has no direction.
    """
    norms = _norms(wide(weight), g)
    return norms.to(g.dtype), torch.where(norms == 0, torch.ones_like(weight), weight)


def _norms(v: Tensor, g: Tensor) -> Tensor:
    axes = [i for i, n in enumerate(g.shape) if n == 1] if g.dim() else list(range(v.dim()))
    return torch.linalg.vector_norm(v, dim=axes, keepdim=True).reshape(g.shape) if axes else v.abs()


class Joined(View):
    """A model whose normalised weights stand in the place of their directions.

    Args:
        original: The model.
        magnitudes: ``{g: v}``.
        precise: Whether they are at least float32.
    """

    def __init__(self, original: Weights, magnitudes: Mapping[str, str], precise: bool = True) -> None:
        super().__init__(original, {name: (original, name) for name in original}, original.tied)
        self._directions = set(magnitudes.values())
        for g, v in magnitudes.items():
            reader, meta = partial(self._weight, g, v, precise), self.meta[v]
            names = [name for name in original if original.tied.get(name, name) == v]
            self._readers = {**self._readers, **dict.fromkeys(names, reader)}
            self.meta = {**self.meta, **dict.fromkeys(names, wide(meta) if precise else meta)}

    def _weight(self, g: str, v: str, precise: bool) -> Tensor:
        magnitude, direction = self.original[g], self.original[v]
        v_wide = direction.double()
        weight = magnitude.double() / _norms(v_wide, magnitude) * v_wide
        return weight.to(wide(direction).dtype if precise else direction.dtype)

    def delta(self, name: str, base: Tensor) -> Tensor | None:
        """Ask the model for its difference to a base's ``(…)``; None of a direction, in whose place the weight is."""
        return None if self.tied.get(name, name) in self._directions else super().delta(name, base)

    def factors(self, name: str, base: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """Ask it for the factors of that difference; None of a direction."""
        return None if self.tied.get(name, name) in self._directions else super().factors(name, base)


def join(
    base: Weights, experts: Mapping[str, Weights], magnitudes: Mapping[str, str]
) -> tuple[Weights, dict[str, Weights]]:
    """View the base and the experts with their normalised weights in the place of their directions, if there are any.

    The base keeps its precision; the experts' weights are at least float32.
    """
    if not magnitudes:
        return base, dict(experts)
    return Joined(base, magnitudes, precise=False), {name: Joined(e, magnitudes) for name, e in experts.items()}


def find_inseparable(model: Weights, what: str, left_out: Callable[[str], bool]) -> list[str]:
    """List what a model holds that means something only together and cannot be joined, a sentence for each kind.

    Args:
        model: The model.
        what: What to call it: ``The base``.
        left_out: Tells which parameters are not merged.
    """
    kept = [name for name in model if not left_out(name)]
    joined = {name for pair in find_magnitudes(model).items() for name in pair}
    problems = []
    if factors := [name for name in kept if _FACTOR.search(name)]:
        problems.append(
            f"{what} holds the factors of adapters {_shown(factors)}, of which only the products mean something; call "
            "merge_and_unload() of the peft model before its state dict is saved, or give the folder of the adapter "
            "(peft's save_pretrained) as an expert over the original base."
        )
    if codes := [*_quantized(model, kept)]:
        code, scale = codes[0]
        dtype = str(model.meta[code].dtype).removeprefix("torch.")
        problems.append(
            f"{what} holds quantized weights {_shown([code for code, _ in codes])}: {dtype} codes that mean something "
            f"only with {scale!r}; give the model in floating point that it was quantized from."
        )
    calls = {call: name for name in kept if name not in joined and (call := _undoing(name, model))}
    if calls:
        call, name = next(iter(calls.items()))
        problems.append(
            f"{what} holds {name!r}, which is no weight, but what a weight is computed from when the model runs "
            f"({len(calls)} such weights); in every model call {call} of the module, and the like of the others, and "
            "save its state_dict() again."
        )
    return problems


def _shown(names: list[str]) -> str:
    return f"({names[0]!r}{f' and {len(names) - 1} more' if names[1:] else ''})"


def _quantized(model: Weights, names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield every tensor of quantized codes and the name of what goes with it."""
    codes = [name for name in names if model.meta[name].dtype in _CODES and model.meta[name].numel() > 1]
    if not codes:
        return
    siblings = defaultdict(list)
    for name in model:
        module, _, last = name.rpartition(".")
        siblings[module].append(last)
    for name in codes:
        module, dot, last = name.rpartition(".")
        stem = last.removesuffix("_blocks")
        own = [f"{name}.{part}" for part in siblings.get(name, ())]
        near = [
            f"{module}{dot}{other}"
            for other in siblings[module]
            if other != last and (_SCALE.fullmatch(other) or _SCALE.fullmatch(other.removeprefix(f"{stem}_")))
        ]
        if own or last in _CODE_NAMES or (near and not _NO_CODES.search(last)):
            yield name, (own or near or ["their scales"])[0]


def _undoing(name: str, model: Weights) -> str:
    """Write the call that turns what a weight is computed from into a weight; empty for any other tensor."""
    if ".original" in name and (match := _PARAMETRIZED.fullmatch(name)):
        return f"torch.nn.utils.parametrize.remove_parametrizations({match[1] or 'model'}, {match[2]!r})"
    if not name.endswith("_orig"):
        return ""
    stem = name.removesuffix("_orig")
    module, _, weight = stem.rpartition(".")
    if f"{stem}_mask" in model:
        return f"torch.nn.utils.prune.remove({module or 'model'}, {weight!r})"
    if f"{stem}_u" in model:
        return f"torch.nn.utils.remove_spectral_norm({module or 'model'}, {weight!r})"
    return ""
