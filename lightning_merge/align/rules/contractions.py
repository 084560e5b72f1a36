"""Operators that sum over products: linear layers, convolutions, matrix products, attention, embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_merge.align.dimensions import Dim, freeze, product
from lightning_merge.align.rules.registry import Call, Dims, Result, Unsupported, broadcast, in_place, places, rule
from lightning_merge.align.unification import factor, unify


@rule("linear")
def linear(call: Call) -> Result:
    """Contract the channels of the input: ``x @ weight.T + bias``."""
    x, weight = call["input"], call["weight"]
    unify(x[-1], weight[-1])
    return broadcast([*x[:-1], *weight[:-1]], call["bias"] or [])


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(call: Call) -> Result:
    """Contract two tensors: ``x @ y`` with any number of leading dimensions, or none."""
    x, y = list(call.arguments.values())[:2]
    return _matmul(x, y)


@rule("addmm", "baddbmm", "addmv")
def addmm(call: Call) -> Result:
    """Contract two tensors and add a third one: ``bias + x @ y``."""
    bias, x, y = list(call.arguments.values())[:3]
    return broadcast(_matmul(x, y), bias)


def _matmul(x: Dims, y: Dims) -> Dims:
    rows, columns = x[-2:-1], y[-1:] if len(y) > 1 else []
    batch = broadcast(x[:-2], y[:-2])
    unify(x[-1], y[-2] if len(y) > 1 else y[-1])
    return [*batch, *rows, *columns]


@rule("einsum")
def einsum(call: Call) -> Result:
    """Unify the dimensions that share a letter."""
    inputs, arrow, output = call["equation"].replace(" ", "").partition("->")
    if not arrow or "." in inputs:
        raise Unsupported
    letters: dict[str, Dim] = {}
    for names, dims in zip(inputs.split(","), call["tensors"], strict=True):
        for letter, dim in zip(names, dims, strict=True):
            first = letters.setdefault(letter, dim)
            if first.size == 1:
                letters[letter] = dim
            elif dim.size != 1:
                unify(first, dim)
    return [letters[letter] for letter in output]


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def convolution(call: Call) -> Result:
    """Contract channels within each of the groups; a kernel's places, and an image's, stay where they are."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    space = len(weight) - 2
    channels, groups = x[-space - 1], call["groups"] or 1
    in_place([*weight[2:], *x[-space:]], "places")
    if call["transposed"] or ("output_padding" in call.arguments and "transposed" not in call.arguments):
        unify(channels, weight[0])
        outer, _ = factor(channels, [groups, channels.size // groups])
        out = product([outer, weight[1]])
    else:
        outer, inner = factor(channels, [groups, channels.size // groups])
        unify(inner, weight[1])
        unify(outer, factor(weight[0], [groups, weight[0].size // groups])[0])
        out = weight[0]
    if bias:
        unify(bias[0], out)
    return [*x[: -space - 1], out, *places(call.sizes[-space:])]


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Result:
    """Contract ``softmax(query @ key.T + mask) @ value``; with ``enable_gqa`` several queries share a key."""
    query, key, value = call["query"], call["key"], call["value"]
    heads = query[:-2]
    if call["enable_gqa"] and query[-3].size != key[-3].size:
        outer, _ = factor(query[-3], [key[-3].size, query[-3].size // key[-3].size])
        broadcast([*query[:-3], outer], key[:-2], value[:-2])
    else:
        heads = broadcast(query[:-2], key[:-2], value[:-2])
    return _attend(heads, query, key, value, call["attn_mask"], call["is_causal"])


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention")
def fused_attention(call: Call) -> Result:
    """Contract the same as :func:`attention`, in a kernel that returns the logarithms of the sums, too."""
    query, key, value = call["query"], call["key"], call["value"]
    heads = broadcast(query[:-2], key[:-2], value[:-2])
    out = _attend(heads, query, key, value, call["attn_mask"] or call["attn_bias"], call["is_causal"])
    return [out, *([*heads, query[-2]] if len(sizes) == 3 else places(sizes) for sizes in call.sizes[1:])]


def _attend(heads: Dims, query: Dims, key: Dims, value: Dims, mask: Sequence[Dim] | None, causal: bool) -> Dims:
    unify(query[-1], key[-1])
    unify(key[-2], value[-2])
    if mask:
        broadcast(mask, [*heads, query[-2], key[-2]])
    if causal:
        in_place([query[-2], key[-2]], "places")
    return [*heads, query[-2], value[-1]]


@rule("embedding")
def embedding(call: Call) -> Result:
    """Look up rows of a table, whose numbers are data."""
    weight, indices = call["weight"], call["indices"]
    freeze(weight[0], "entries of a table")
    return [*indices, *weight[1:]]
