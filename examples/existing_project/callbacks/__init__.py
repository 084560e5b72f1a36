"""The project's own callbacks, in a package that has the name of many."""

from callbacks.count_samples import CountSamples

__all__ = ["CountSamples"]
