"""Trace the flow of activations through a module, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_merge.repair.flow import Call, Flow, Kind, Step
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.modules import device_of, evaluating, plain, unfused_attention

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_ACTIVATIONS = [
    "hardswish",
    "leaky_relu",
    "glu",
    "_prelu_kernel",
    "prelu",
    "rrelu_with_noise",
    "log_sigmoid_forward",
    "mish",
]  # which not every version of PyTorch tags as operators on each value alone
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution", "mv", "addmv", "dot")
_RESHAPES = ("view", "_unsafe_view", "reshape", "alias", "detach", "clone", "_to_copy")
_VIEWS = (*_RESHAPES, "permute", "transpose", "t")


def trace(module: nn.Module, images: Tensor) -> Flow:
    """Run a module once in evaluation mode and record its steps.

    Args:
        module: Maps images to logits; it is as before afterwards.
        images: ``(N, …)``; two are enough.

    Raises:
        MergeError: If it cannot be run on the images.
    """
    module = plain(module)
    dtype = next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), images.dtype)
    images = images.to(device_of(module), dtype if images.is_floating_point() else images.dtype)
    recorder = _Recorder(module)
    try:
        with unfused_attention(), evaluating(module), torch.no_grad(), recorder:
            recorder.run(images)
        recorder.remove_hooks()
        recorder.find_axes()
    except Exception as error:  # whatever the module raises
        raise MergeError(f"The model cannot be run on images {tuple(images.shape)}: {error}") from error
    finally:
        recorder.remove_hooks()
    return recorder.flow


def is_norm(part: nn.Module) -> bool:
    """Tell whether a part is a normalisation: one of PyTorch's kinds, or of a kind called so, without layers within."""
    named = any("norm" in kind.__name__.lower() for kind in type(part).__mro__)
    return named and not any(isinstance(inner, _LAYERS) for inner in part.modules())


def affine_axis(part: nn.Module, x: Tensor) -> int | None:
    """Find the axis of the channels of a normalisation that ends in ``weight · x + bias``; None if it does not.

    It is run on x ``(N, …)`` with weight 0 and bias −1, −2, …: what comes out varies along the channels alone.
    """
    weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or bias.dim() != 1:
        return None
    ramp = -torch.arange(1, len(bias) + 1).to(bias)
    with evaluating(part), torch.no_grad():
        output = torch.func.functional_call(part, {"weight": torch.zeros_like(weight), "bias": ramp}, (x,))
    for axis in (1, -1) if isinstance(output, Tensor) and output.dim() > 1 else ():
        last = output.movedim(axis, -1)
        if last.shape[-1] == len(ramp) and torch.equal(last, ramp.expand_as(last)):
            return axis if axis != output.dim() - 1 else -1
    return None


class _Recorder(TorchDispatchMode):
    """A recorder of every operator and every call of a part. It keeps all tensors, so that none takes another's id."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.flow = Flow(module)
        self._makers: dict[int, Step] = {}
        self._alive: list[Tensor] = []
        self._open: list[Call] = []
        self._seen: dict[Step, Tensor] = {}  # what layers and normalisations were called with
        self._atomic: str | None = None
        self._hooks = [hook for path, part in module.named_modules() for hook in self._watch(path, part)]

    def run(self, images: Tensor) -> None:
        """Run the module on images ``(N, …)``."""
        self._made([images], self._add("input", ()))
        outputs = list(_tensors(self.flow.module(images)))
        self.flow.outputs = [maker for output in outputs if (maker := self._makers.get(id(output))) is not None]

    def remove_hooks(self) -> None:
        """Remove all hooks from the module."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, path: str, part: nn.Module) -> list[Any]:
        kind = _kind_of_part(part)

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._atomic is not None:
                return
            first = next(_tensors((args, kwargs)), None)
            shape = () if first is None else tuple(first.shape)
            self._open.append(Call(path, len(self.flow.steps), self._makers.get(id(first)), shape))
            if kind is not None:
                self._atomic = path

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._atomic not in (None, path):
                return
            outputs = list(_tensors(output))
            if kind is not None and self._atomic == path:
                self._atomic = None
                if any(id(t) in self._makers for t in _tensors((args, kwargs))):  # not one that works on constants
                    step = self._add(kind, (args, kwargs), path)
                    self._made(outputs, step)
                    self._seen[step] = next(_tensors((args, kwargs)))
            call = self._open.pop()
            call.last = len(self.flow.steps)
            if outputs:
                call.output, call.output_shape = self._makers.get(id(outputs[0])), tuple(outputs[0].shape)
            self.flow.calls.append(call)

        return [
            part.register_forward_pre_hook(enter, with_kwargs=True),
            part.register_forward_hook(leave, with_kwargs=True),
        ]

    def find_axes(self) -> None:
        """Find the axes of the channels, of layers, normalisations, and what leaves the channels in their place."""
        parts = dict(self.flow.module.named_modules())
        for step in self.flow.steps:
            if step in self._seen:
                part = parts[step.path]
                step.axis = axis_of_kind(part)
                if step.axis is None:
                    step.axis = affine_axis(part, self._seen[step])
            elif step.axis is None:
                step.axis = _kept_axis(step)

    def _add(self, kind: Kind, inputs: Any, path: str | None = None, name: str = "") -> Step:
        makers = dict.fromkeys(maker for t in _tensors(inputs) if (maker := self._makers.get(id(t))) is not None)
        step = Step(len(self.flow.steps), kind, tuple(makers), path, name in _VIEWS, name in _RESHAPES)
        step.ancestors = 1 << step.index
        for maker in makers:
            maker.consumers.append(step)
            step.ancestors |= maker.ancestors
        self.flow.steps.append(step)
        return step

    def _made(self, outputs: list[Tensor], step: Step) -> None:
        self._alive += outputs
        step.shape = tuple(outputs[0].shape) if outputs else ()
        self._makers |= {id(output): step for output in outputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and record it, if it works on activations and outside of the parts that are one step."""
        output = func(*args, **(kwargs or {}))
        if self._atomic is None:
            operands = sum(id(t) in self._makers for t in _tensors((args, kwargs)))
            if operands:
                step = self._add(_kind_of(func, operands), (args, kwargs), name=_name(func))
                step.axis = 1 if step.kind == "norm" and ("batch" in _name(func) or "group" in _name(func)) else None
                self._made(list(_tensors(output)), step)
        return output


def _kept_axis(step: Step) -> int | None:
    """Find the axis of the channels behind an operator on each value alone, or a view that keeps the last dimension."""
    before = {input.axis for input in step.inputs if input.axis is not None and len(input.shape) == len(step.shape)}
    if step.kind in ("sum", "activation"):
        return before.pop() if len(before) == 1 else None
    if step.is_reshape and step.inputs[0].axis == -1 and step.inputs[0].shape[-1:] == step.shape[-1:]:
        return -1
    return None


def _kind_of_part(part: nn.Module) -> Kind | None:
    """Classify a part that is one step; None for others."""
    if isinstance(part, _LAYERS):
        return "layer"
    if isinstance(part, nn.MultiheadAttention):
        return "attention"
    return "norm" if is_norm(part) and next(part.children(), None) is None else None


def axis_of_kind(part: nn.Module) -> int | None:
    """Find the axis of the channels of a part's output, where its kind determines it."""
    if isinstance(part, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.modules.conv._ConvNd):
        return 1
    return -1 if isinstance(part, nn.Linear | nn.MultiheadAttention) else None


def _kind_of(func: Any, operands: int) -> Kind:
    """Classify an operator that works on so many activations."""
    name = _name(func)
    if "norm" in name and "vector_norm" not in name:
        return "norm"
    if "softmax" in name or "scaled_dot_product" in name:
        return "attention"
    if name in _PRODUCTS:
        return "attention" if operands > 1 else "layer"
    if name in _ACTIVATIONS:
        return "activation"
    if torch.Tag.pointwise not in func.tags or name in ("_to_copy", "clone", "neg", "copy"):
        return "plain"
    if name in ("add", "sub", "rsub"):
        return "sum" if operands > 1 else "plain"
    return "plain" if name in ("mul", "div") and operands == 1 else "activation"


def _name(func: Any) -> str:
    return func.overloadpacket.__name__.removesuffix("_")


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and mappings."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (tuple, list)):
        for item in content:
            yield from _tensors(item)
    elif hasattr(content, "values") and hasattr(content, "keys"):
        yield from _tensors(list(content.values()))
