"""Fold corrections into weights, where that gives exactly the same model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_merge.checkpoints import open_weights
from lightning_merge.repair.corrections import Correction, state_of
from lightning_merge.repair.flow_tracing import affine_axis, axis_of_kind, is_norm
from lightning_merge.utilities.modules import plain
from lightning_merge.utilities.sites import Site


@dataclass(frozen=True)
class Home:
    """The parameters that can hold the correction of a site.

    Args:
        weight: Its name.
        bias: Its name.
        is_input: Whether the site is the input of the (linear) layer and not the output.
    """

    weight: str
    bias: str
    is_input: bool = False

    @property
    def names(self) -> set[str]:
        """Both names."""
        return {self.weight, self.bias}

    def fold(self, weights: Mapping[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """Fold a scale a and a shift s, ``(channels,)`` each, into the parameters.

        That is ``W ← diag(a)·W, b ← a·b + s``; at an input ``W ← W·diag(a), b ← b + W·s``.
        """
        weight = weights[self.weight].double()
        scale, shift = scale.to(weight), shift.to(weight)
        along = scale if self.is_input else scale.view(-1, *[1] * (weight.dim() - 1))
        bias = weights[self.bias].double()
        bias = bias + weight @ shift if self.is_input else bias * scale + shift
        return {self.weight: (weight * along).to(weights[self.weight]), self.bias: bias.to(weights[self.bias])}


def fold(
    module: nn.Module, weights: Mapping[str, Tensor], correction: Correction
) -> tuple[dict[str, Tensor], Correction]:
    """Fold a correction into weights where that is exact.

    That is behind a linear layer or a convolution, behind a normalisation with weight and bias, and at the input of a
    linear layer, along the axis of its channels, if there is a bias to hold the shift and no other part has the
    parameters (that the module's own code uses them outside of the part cannot be seen). A layer with a ``forward`` of
    its own (weight standardisation) may not be linear in its weight and is left alone. Running statistics stay as they
    are. The output of a residual block cannot be folded: it goes on as the residual stream.

    Args:
        module: Says which part each parameter belongs to; it is not changed.
        weights: The weights of the model; not changed.
        correction: The correction.

    Returns:
        New weights, and the correction of the sites that could not be folded. Which these are depends on the module
        and the sites alone, so that it is the same for all tasks.
    """
    folded = dict(weights)
    module = plain(module)
    tied = open_weights(module.state_dict(), "the module").tied
    usable = weights.keys() - {*tied, *tied.values()}
    parts = dict(module.named_modules(remove_duplicate=False))
    homes = {site: home for site in correction.sites if (home := _home(site, parts)) and home.names <= usable}
    for site, home in homes.items():
        folded |= home.fold(folded, correction.scale[site], correction.shift[site])
    return folded, correction.only(site for site in correction.sites if site not in homes)


def corrected_weights(module: nn.Module, weights: Mapping[str, Tensor], correction: Correction) -> dict[str, Tensor]:
    """Fold what can be folded into the weights of one task; the rest are entries ``….correction.scale``, ``….shift``.

    They load strictly into ``insert(module, rest)``, with the rest that :func:`fold` returns.
    """
    folded, remaining = fold(module, weights, correction)
    return folded | state_of(module, remaining)


def _home(site: Site, parts: Mapping[str, nn.Module]) -> Home | None:
    """Find the parameters that can hold the correction of a site; None if there are none."""
    path, part, is_input = site.path, parts[site.path], site.input
    around = path.rpartition(".")[0]
    if isinstance(part, nn.MultiheadAttention) and not is_input:
        path, part = f"{path}.out_proj", part.out_proj
    elif is_input and is_norm(parts[around]) and next(parts[around].children(), None) is part:
        path, part, is_input = around, parts[around], False  # a normalisation with an activation behind it
    elif is_norm(part) and (is_input or not _ends_affine(part, site.axis)):
        return None
    if is_norm(part):
        weight = getattr(part, "weight", None)
        holds = isinstance(weight, Tensor) and weight.dim() == 1
    else:
        is_plain = _is_linear_in_weight(part) and site.axis == axis_of_kind(part)
        holds = is_plain and (not is_input or isinstance(part, nn.Linear))
    if not holds or getattr(part, "bias", None) is None:
        return None
    return Home(f"{path}.weight".lstrip("."), f"{path}.bias".lstrip("."), is_input)


def _is_linear_in_weight(part: nn.Module) -> bool:
    """Tell whether a part is a linear layer or a convolution that computes what PyTorch's own does."""
    if not isinstance(part, (nn.Linear, nn.modules.conv._ConvNd)) or getattr(part, "transposed", False):
        return False
    kind = next(kind for kind in type(part).__mro__ if kind.__module__.startswith("torch.nn.modules"))
    return "forward" not in vars(part) and all(
        getattr(type(part), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward")
    )


def _ends_affine(norm: nn.Module, axis: int) -> bool:
    """Tell whether a normalisation ends in ``weight · x + bias`` along an axis, however many dimensions there are."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    for dims in (5, 4, 3, 2):
        shape = [2] * dims
        shape[axis] = len(weight)
        try:
            channel_axis = affine_axis(norm, weight.new_zeros(shape))
        except (RuntimeError, ValueError):
            continue  # it takes other shapes
        return channel_axis == axis
    return False
