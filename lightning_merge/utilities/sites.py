"""Sites: activations of a module that are watched or changed while it runs, the output or the input of a part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_merge.utilities.errors import raise_all
from lightning_merge.utilities.modules import unfused_attention

Act = Callable[["Site", Tensor], Tensor | None]
"""Called with a site and its activation; a tensor that it returns takes the activation's place."""


@dataclass(frozen=True, order=True)
class Site:
    """The output of a part of a module, or its input.

    Args:
        path: The part, as ``named_modules`` calls it, such as ``blocks.0.mlp.fc1``.
        axis: Which dimension of the activation holds the channels; the first one holds the samples.
        input: Whether it is the part's (first) input and not its output.
    """

    path: str
    axis: int = 1
    input: bool = False

    @property
    def name(self) -> str:
        """The site in one word: ``blocks.0.attn.proj:input``, ``blocks.0.mlp.fc1``."""
        return f"{self.path}:input" if self.input else self.path

    def channels_last(self, activation: Tensor) -> Tensor:
        """Reshape an activation to ``(N, channels)``, all samples and places one below the other."""
        return activation.movedim(self.axis, -1).flatten(0, -2)

    def along(self, values: Tensor, activation: Tensor) -> Tensor:
        """Reshape one value for each channel ``(channels,)`` to be broadcast to an activation."""
        shape = [1] * activation.dim()
        shape[self.axis] = -1
        return values.reshape(shape)


def split_name(name: str) -> tuple[str, bool]:
    """Split the name of a site into its path and whether it is an input."""
    return name.removesuffix(":input"), name.endswith(":input")


@contextmanager
def at_sites(module: nn.Module, sites: Iterable[Site], act: Act) -> Iterator[None]:
    """Call ``act`` with every site's activation whenever the module runs, in the order in which they are computed.

    What ``act`` is given may be changed in place by the module afterwards (an in-place ReLU): copy what is kept.

    Args:
        module: The module that will be run; it is as before afterwards.
        sites: Which activations.
        act: What is done with them.

    Raises:
        MergeError: If the module has no such part.
    """
    sites = list(sites)
    parts = dict(module.named_modules())
    raise_all([f"The module has no part {site.path!r} to watch." for site in sites if site.path not in parts])

    def before(site: Site) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not args:
                return None
            changed = act(site, args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)

        return hook

    def after(site: Site) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            several = isinstance(output, (tuple, list))
            changed = act(site, output[0] if several else output)
            return None if changed is None else (type(output)((changed, *output[1:])) if several else changed)

        return hook

    handles = [
        parts[site.path].register_forward_pre_hook(before(site), with_kwargs=True)
        if site.input
        else parts[site.path].register_forward_hook(after(site))
        for site in sites
    ]
    try:
        with unfused_attention():
            yield
    finally:
        for handle in handles:
            handle.remove()
