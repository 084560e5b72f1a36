"""The content of a page, before it is HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_merge.utilities.grid import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure and what it shows.

    Args:
        figure: Drawn by :mod:`lightning_merge.report.plots`.
        title: A name in a few words.
        caption: What can be seen in it, in sentences; a screen reader reads this in its place.
    """

    figure: Figure
    title: str
    caption: str = ""


@dataclass(frozen=True)
class Listing:
    """A text as a program reads it: YAML, a command.

    Args:
        text: The text.
        title: A name in a few words.
        folded: Whether it is hidden until a reader opens it.
    """

    text: str
    title: str
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: The heading, which stands in the table of contents, too.
        parts: The parts in their order; a string is a paragraph.
    """

    title: str
    parts: Sequence[str | Grid | Picture | Listing]


@dataclass(frozen=True)
class Page:
    """A report.

    Args:
        title: The heading.
        summary: The answers, in sentences, before anything else.
        sections: The parts.
        warnings: What a reader must know before believing it, in sentences.
        facts: Short pairs that stand below the heading: the date, the version, the number of experts.
    """

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]
    warnings: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)

    @property
    def figures(self) -> dict[str, Figure]:
        """The figures by their titles."""
        parts = [part for section in self.sections for part in section.parts]
        return {part.title: part.figure for part in parts if isinstance(part, Picture)}


def again(configuration: str) -> list[Section]:
    """Build the section with the YAML that makes the results again; none if it is not known."""
    listing = Listing(configuration, "The YAML that makes it again", folded=True)
    return [Section("Configuration", [listing])] if configuration else []
