"""Fold corrections into weights, where that gives exactly the same model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_merge.checkpoints import open_weights
from lightning_merge.repair.corrections import Correction
from lightning_merge.repair.tracing import affine_axis, is_norm
from lightning_merge.sites import Site
from lightning_merge.task_data import plain


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
        """The parameters with a correction in them: ``W ← diag(a)·W, b ← a·b + s``; at an input ``b ← b + W·s``."""
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
    linear layer, if the parameters are used nowhere else and there is a bias to hold the shift. Running statistics
    stay as they are. The output of a residual block cannot be folded: it goes on as the residual stream.

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
    return folded, correction.of(site for site in correction.sites if site not in homes)


def corrected_weights(module: nn.Module, weights: Mapping[str, Tensor], correction: Correction) -> dict[str, Tensor]:
    """The weights of one task: what can be folded is, and the rest are entries ``….correction.scale`` and ``….shift``.

    They load strictly into ``insert(module, rest)``, with the rest that :func:`fold` returns.
    """
    folded, rest = fold(module, weights, correction)
    return folded | rest.state


def _home(site: Site, parts: Mapping[str, nn.Module]) -> Home | None:
    """The parameters that can hold the correction of a site; None if there are none."""
    path, part, is_input = site.path, parts[site.path], site.input
    around = path.rpartition(".")[0]
    if isinstance(part, nn.MultiheadAttention) and not is_input:
        path, part = f"{path}.out_proj", part.out_proj
    elif is_input and is_norm(parts[around]) and next(parts[around].children(), None) is part:
        path, part, is_input = around, parts[around], False  # a normalisation with an activation behind it
    elif is_norm(part) and (is_input or not _ends_affine(part, site.axis)):
        return None
    is_linear = isinstance(part, nn.Linear)
    is_convolution = isinstance(part, nn.modules.conv._ConvNd) and not part.transposed and not is_input
    if getattr(part, "bias", None) is None or not (is_linear or is_convolution or is_norm(part)):
        return None
    return Home(f"{path}.weight".lstrip("."), f"{path}.bias".lstrip("."), is_input)


def _ends_affine(norm: nn.Module, axis: int) -> bool:
    """Whether a normalisation ends in ``weight · x + bias`` along an axis."""
    if type(norm).__module__.startswith("torch.nn."):
        return True
    weight = getattr(norm, "weight", None)
    for dims in (4, 3, 2) if isinstance(weight, Tensor) and weight.dim() == 1 else ():
        shape = [2] * dims
        shape[axis] = len(weight)
        try:
            found = affine_axis(norm, weight.new_zeros(shape))
        except (RuntimeError, ValueError):
            continue  # it takes other shapes
        return found is not None and found % dims == axis % dims
    return False
