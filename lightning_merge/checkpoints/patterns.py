"""Regular expressions that a file brings along, matched within a limit of time and memory."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from typing import Any

import regex

from lightning_merge.utilities.errors import MergeError

_SECONDS = 2.0  # of the processor, for all patterns of a mapping and all names together
_SIZE = 50_000  # the most characters of a pattern, each counted as often as counted repetitions may repeat it


class Patterns:
    """Values by regular expressions of modules' names.

    Args:
        values: The value of every pattern.
        where: What to call the mapping in messages: ``the rank_pattern of the adapter photo``.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self._compiled: dict[str, Any] = {}
        self._left = _SECONDS

    def find(self, module: str, default: Any) -> Any:
        """Look up a module's value by the first pattern that matches the end of its name, as peft does.

        Raises:
            MergeError: If a pattern is no regular expression, or takes too long.
        """
        begin = time.thread_time()
        for pattern, value in self.values.items():
            compiled = self._compile(pattern)
            left = self._left - (time.thread_time() - begin)
            try:
                found = compiled.match(module, timeout=max(left, 1e-6))
            except TimeoutError as error:
                raise MergeError(
                    f"{pattern[:200]!r} in {self.where} takes too long to match (all names together, more than "
                    f"{_SECONDS:g} seconds); write the names out, or without nested repetitions."
                ) from error
            if found:
                default = value
                break
        self._left -= time.thread_time() - begin
        return default

    def _compile(self, pattern: str) -> Any:
        if pattern not in self._compiled:
            counts = [int(count) for count in re.findall(r"\d{1,9}(?=\})", pattern)]
            if len(pattern) * math.prod(max(count, 1) for count in counts) > _SIZE:
                raise MergeError(
                    f"{pattern[:200]!r} in {self.where} is too large: {len(pattern)} characters"
                    f"{f' with counted repetitions ({counts[:5]})' * bool(counts)}; write the names out."
                )
            whole = rf"(.*\.)?({pattern})$"
            try:
                re.compile(whole)  # peft's own dialect, which has neither recursion nor possessive sets
                self._compiled[pattern] = regex.compile(whole)
            except (re.error, regex.error, RecursionError, OverflowError) as error:
                raise MergeError(
                    f"{pattern[:200]!r} in {self.where} is no regular expression ({str(error)[:200]}); write a "
                    "module's name, or one."
                ) from error
        return self._compiled[pattern]
