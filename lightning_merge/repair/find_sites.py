"""Find the activations of a module that REPAIR and TACT correct, from one forward pass: there is no list of models.

The rules restate the choice of Sharma, Roy and Dziugaite (TACT, arXiv 2410.12766) for its VGG and ViT, pre-activations
behind their normalisation, the context of attention, the outputs of residual blocks and the embedding, in terms of how
activations flow:

1. The output of a *normalisation*; but not of one that feeds attention, and not of the final one, which only the
   classifier sees (unless it directly follows a layer, such as an embedding that is scaled to length one).
2. The output of a *layer* (linear or convolution) that no normalisation follows; but not of one that feeds attention
   (queries, keys, values), of the classifier, or of one that enters a residual stream, because
3. the output of every *residual block* is corrected: of the innermost part that ends in a sum, both of whose terms
   depend on the part's input, perhaps with an activation or a normalisation behind it.
4. Where a residual stream begins, the *embedding*: the input of the block, if it comes from a layer or a normalisation
   without a non-linearity between. (Where that is just the layer's output, it is named so.)
5. The *context* of attention: the input of the layer behind it. ``nn.MultiheadAttention`` hides it; its output stands
   in.

A site whose channels cannot be told apart from its places is left out. A part that is called several times is one site.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn

from lightning_merge.repair.flow import Call, Flow, Step
from lightning_merge.repair.flow_tracing import axis_of_kind, is_norm, trace
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.sites import Site, split_name

Found = dict[Site, int]
"""Sites, each with the index of the step that makes its activation."""


def find_sites(module: nn.Module, images: Tensor, sites: Sequence[str | Site] | None = None) -> list[Site]:
    """Find the activations of a module that are corrected, in the order in which they are computed.

    Args:
        module: Maps images to logits; its weights do not matter, and it is as before afterwards.
        images: Some images ``(N, …)``, of which two are used.
        sites: Take these instead of what the rules above find: sites, names such as ``blocks.0.mlp.fc1`` and
            ``blocks.0.attn.proj:input``, or patterns of names such as ``blocks.*.mlp.fc1``.

    Raises:
        MergeError: If the module cannot be run, if there is no such part, or if it cannot be told which axis holds
            the channels of one.
    """
    flow = trace(module, images[:2])
    if sites is not None:
        return _named(flow, sites)
    blocks = _blocks(flow)
    chosen: Found = {}
    for step in flow.steps:
        if step.kind == "norm" and _is_norm_site(flow, step):
            _add(chosen, _site_of_norm(flow, step), step)
        elif step.kind == "layer" and step.path is not None:
            if any(behind.kind == "attention" and behind.path is None for behind in _behind(step)):
                _add(chosen, _site(step.path, step.axis, input=True), step)
            if _is_layer_site(flow, step, blocks):
                _add(chosen, _site(step.path, step.axis), step)
        elif step.kind == "attention" and step.path is not None:
            _add(chosen, _site(step.path, step.axis), step)
    for block in blocks:
        _add(chosen, *_end_of(flow, block))
        _add(chosen, *_begin_of(flow, block))
    return sorted(chosen, key=lambda site: (chosen[site], site))


def find_head(module: nn.Module, images: Tensor) -> str:
    """Find the path of the classifier: the linear layer whose output, on images ``(N, …)``, is the module's.

    Raises:
        MergeError: If there is not exactly one.
    """
    flow = trace(module, images[:2])
    parts = dict(flow.module.named_modules())
    linear = [(step, path) for step, path in flow.layers if isinstance(parts[path], nn.Linear)]
    heads = [path for step, path in linear if flow.ends_at(step)]
    if len(set(heads)) != 1:
        raise MergeError(f"The model ends in {len(heads)} linear layers instead of one; name its head.")
    return heads[0]


def _add(chosen: Found, site: Site | None, step: Step | None) -> None:
    if site is not None and step is not None:
        chosen.setdefault(site, step.index)


def _site(path: str, axis: int | None, input: bool = False) -> Site | None:
    return None if axis is None else Site(path, axis, input)


# Normalisations


def _is_norm_site(flow: Flow, norm: Step) -> bool:
    after = norm.after("plain")
    if any(step.kind == "attention" or (step.kind == "layer" and _feeds_attention(step)) for step in after):
        return False
    is_final = flow.ends_at(norm) or all(step.kind == "layer" and flow.ends_at(step) for step in after)
    return not is_final or _follows_layer(norm)


def _feeds_attention(layer: Step) -> bool:
    return any(step.kind == "attention" for step in layer.after("plain", "norm"))


def _follows_layer(norm: Step) -> bool:
    """Tell whether what a normalisation works on is the output of a layer, which nothing else sees."""
    layer = norm.inputs[0].seen_through
    return layer.kind == "layer" and _next(layer) == {norm}


def _next(step: Step) -> set[Step]:
    """Find the steps that work on what a step makes, whatever order or shape it was brought into."""
    return set().union(*(_next(consumer) if consumer.is_view else {consumer} for consumer in step.consumers))


def _site_of_norm(flow: Flow, norm: Step) -> Site | None:
    """Find the site of a normalisation: its output; of one with an activation within (timm's), the input of that."""
    layer = norm.inputs[0].seen_through
    inherited = layer.axis if layer is norm.inputs[0] and layer.kind == "layer" else None
    if norm.path is not None:
        return _site(norm.path, norm.axis or inherited)
    parts = dict(flow.module.named_modules())
    for call in flow.calls:
        around = parts[call.path.rpartition(".")[0]]
        if call.inputs is norm and is_norm(around):
            return _site(call.path, norm.axis or axis_of_kind(around) or inherited, input=True)
    return None


# Layers


def _is_layer_site(flow: Flow, layer: Step, blocks: Sequence[_Block]) -> bool:
    after = layer.after("plain")
    if flow.ends_at(layer) or _feeds_attention(layer) or all(step.kind == "norm" for step in after):
        return False
    return not any(step.kind == "sum" and any(block.call.contains(step) for block in blocks) for step in after)


def _behind(layer: Step) -> list[Step]:
    """Find the steps behind which a layer stands, seen through plain ones."""
    return [step for inputs in layer.inputs for step in inputs.before("plain")]


# Residual blocks


class _Block(NamedTuple):
    """A residual block, with the steps that made its input and its output."""

    call: Call
    inputs: Step
    output: Step


def _blocks(flow: Flow) -> list[_Block]:
    """Find the residual blocks: for every sum that ends a part, the innermost such part."""
    blocks: dict[Step, _Block] = {}
    for call in sorted(flow.calls, key=lambda call: call.last - call.first):
        if not call.path or call.inputs is None or call.output is None or len(call.shape) != len(call.output_shape):
            continue
        for step in call.output.before("plain", "activation", "norm"):
            if step.kind == "sum" and call.contains(step) and all(term.depends_on(call.inputs) for term in step.inputs):
                blocks.setdefault(step, _Block(call, call.inputs, call.output))
    return list(dict.fromkeys(blocks.values()))


def _end_of(flow: Flow, block: _Block) -> tuple[Site | None, Step | None]:
    return _site_of_step(flow, block.output.seen_through) or (
        _site(block.call.path, _axis(block.output) or _axis(block.inputs)),
        block.output,
    )


def _begin_of(flow: Flow, block: _Block) -> tuple[Site | None, Step | None]:
    if not all(step.kind in ("layer", "norm") for step in block.inputs.before("plain")):
        return None, None
    return _site_of_step(flow, block.inputs.seen_through) or (
        _site(block.call.path, _axis(block.inputs), input=True),
        block.inputs,
    )


def _site_of_step(flow: Flow, step: Step) -> tuple[Site | None, Step] | None:
    """Find the site of a layer or normalisation; None for other steps."""
    if step.kind == "norm":
        return _site_of_norm(flow, step), step
    return None if step.path is None else (_site(step.path, step.axis), step)


def _axis(step: Step) -> int | None:
    """Find the axis of a step's channels: its own, or that of a layer or normalisation that works on its output."""
    axes = (step.axis, *(consumer.axis for consumer in step.consumers if consumer.kind in ("layer", "norm")))
    return next((axis for axis in axes if axis is not None), None)


# What a user names


def _named(flow: Flow, sites: Sequence[str | Site]) -> list[Site]:
    paths = [path for path, _ in flow.module.named_modules()]
    problems: list[str] = []
    chosen: dict[Site, None] = {}
    for entry in [sites] if isinstance(sites, (str, Site)) else sites:
        path, is_input = (entry.path, entry.input) if isinstance(entry, Site) else split_name(entry)
        matching = [name for name in paths if fnmatchcase(name, path)] if path not in paths else [path]
        if not matching:
            problems.append(f"sites: the model has no part {path!r}.")
        for name in matching:
            site = entry if isinstance(entry, Site) else _site(name, _axis_at(flow, name, is_input), is_input)
            if site is None:
                problems.append(
                    f"sites: it cannot be told which axis holds the channels of {name!r}; give Site({name!r}, axis=…)."
                )
            else:
                chosen[site] = None
    raise_all(problems if sites else ["sites: give at least one site, or None for those that are found."])
    return list(chosen)


def _axis_at(flow: Flow, path: str, is_input: bool) -> int | None:
    axis = axis_of_kind(dict(flow.module.named_modules())[path])
    for call in flow.calls_of(path) if axis is None else ():
        step, shape = (call.inputs, call.shape) if is_input else (call.output, call.output_shape)
        if step is not None:
            return 1 if len(shape) == 2 else _axis(step)
    return axis
