"""Operators that treat all channels alike: elementwise functions, normalisation, reductions, pooling."""

from __future__ import annotations

from lightning_merge.align.dimensions import Dim, fixed, free, freeze
from lightning_merge.align.rules.registry import Call, Result, broadcast, in_place, places, rule, tensors
from lightning_merge.align.unification import factor


@rule("copy", "fill", "hardswish", "masked_fill", "rsub", "softplus", "square", "where")
def elementwise(call: Call) -> Result:
    """Broadcast the operands; this is also the rule of every operator with the tag ``pointwise``."""
    return broadcast(*tensors(call.arguments))


@rule(
    *("alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "lift_fresh_copy", "to", "type_as"),
    *("_to_copy", "softmax", "_softmax", "log_softmax", "_log_softmax"),
)
def unchanged(call: Call) -> Result:
    """Keep the entries in their places, or functions of them that treat all alike."""
    return call.first


@rule("prelu")
def prelu(call: Call) -> Result:
    """Multiply by a slope for each channel, or one for all."""
    x, slopes = call.first, call["weight"]
    broadcast(x[1:2], slopes)
    return x


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Result:
    """Normalise over the last dimensions."""
    x = call["input"]
    normalized = x[-len(call["normalized_shape"]) :]
    for dims in (call["weight"], call["bias"]):
        broadcast(dims or [], normalized)
    statistics = [*x[: -len(normalized)], *(Dim(1) for _ in normalized)]
    return x if isinstance(call.sizes[0], int) else [x, *(statistics for _ in call.sizes[1:])]


@rule("group_norm", "native_group_norm")
def group_norm(call: Call) -> Result:
    """Normalise each group of channels."""
    x, groups = call.first, call["num_groups"] or call["group"]
    factor(x[1], [groups, x[1].size // groups])
    for dims in (call["weight"], call["bias"]):
        broadcast(dims or [], x[1:2])
    several = not isinstance(call.sizes[0], int)
    return [x, *(fixed(sizes, "statistics of groups") for sizes in call.sizes[1:])] if several else x


@rule(
    *("batch_norm", "instance_norm", "_batch_norm_impl_index", "cudnn_batch_norm", "native_batch_norm"),
    *("_native_batch_norm_legit_no_training", "_native_batch_norm_legit"),
)
def batch_norm(call: Call) -> Result:
    """Normalise each channel."""
    x = call["input"]
    for name in ("weight", "bias", "running_mean", "running_var"):
        broadcast(call[name] or [], x[1:2])
    several = not isinstance(call.sizes[0], int)
    return [x, *(fixed(sizes, "statistics of batches") for sizes in call.sizes[1:])] if several else x


@rule(
    *("mean", "sum", "prod", "amax", "amin", "var", "std", "logsumexp", "norm", "linalg_vector_norm", "any", "all"),
    *("max", "min"),
)
def reduction(call: Call) -> Result:
    """Reduce over dimensions, in any order of their entries."""
    x = call.first
    reduced = call.axes("dim", len(x))
    kept = len(call.sizes) == len(x)
    return [Dim(1) if axis in reduced else dim for axis, dim in enumerate(x) if kept or axis not in reduced]


@rule("var_mean", "std_mean", "aminmax")
def reductions(call: Call) -> Result:
    """Reduce in two ways at once."""
    return [reduction(Call(call.arguments, sizes, call.separate)) for sizes in call.sizes]


@rule("max.dim", "min.dim")
def extremum(call: Call) -> Result:
    """Reduce to an extremum and its place, a number that a permutation would change."""
    in_place([call.first[axis] for axis in call.axes("dim", len(call.first))], "numbered")
    return reductions(call)


@rule("argmax", "argmin")
def argmax(call: Call) -> Result:
    """Reduce to the place of an extremum alone."""
    in_place([call.first[axis] for axis in call.axes("dim", len(call.first))], "numbered")
    return reduction(call)


@rule("cumsum", "cumprod", "flip", "roll")
def ordered(call: Call) -> Result:
    """Fix dimensions along which the order matters; they keep their sizes."""
    x = call.first
    in_place([x[axis] for axis in call.axes("dims" if "dims" in call.arguments else "dim", len(x))], "places")
    return x


@rule("tril", "triu")
def triangle(call: Call) -> Result:
    """Fix the last two dimensions, along which the order matters."""
    in_place(call.first[-2:], "places")
    return call.first


@rule("glu")
def glu(call: Call) -> Result:
    """Gate one half of the channels by the other half."""
    x, (axis,) = call.first, call.axes("dim", len(call.first))
    halves, channels = factor(x[axis], [2, x[axis].size // 2])
    freeze(halves, "a stack")
    return [*x[:axis], channels, *x[axis + 1 :]]


@rule(
    *(f"{kind}pool{n}d" for kind in ("max_", "avg_", "adaptive_avg_", "_adaptive_avg_", "lp_") for n in (1, 2, 3)),
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d", "bicubic2d", "linear1d")),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_trilinear3d", "_upsample_nearest_exact2d"),
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
)
def resample(call: Call) -> Result:
    """Pool or interpolate places, each channel for itself."""
    x, kept = call.first, [axis for axis, size in enumerate(call.sizes) if axis < 2]
    kept = kept if len(call.sizes) > 2 else kept[:1]
    in_place(x[len(kept) :], "places")
    return [*x[: len(kept)], *places(call.sizes[len(kept) :])]


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool1d", "adaptive_max_pool2d")
def pool_with_indices(call: Call) -> Result:
    """Pool places, and return those of the maxima, too."""
    return [resample(Call(call.arguments, sizes, call.separate)) for sizes in call.sizes]


@rule(
    *("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"),
    *("zeros_like", "ones_like", "full_like", "empty_like"),
)
def uniform(call: Call) -> Result:
    """Fill a tensor with one number, the same in any order."""
    return free(call.sizes)
