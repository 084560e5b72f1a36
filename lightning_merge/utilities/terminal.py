"""What is shown to people: names from files, which may hold anything, without what a terminal would obey or hide."""

from __future__ import annotations


def visible(text: str, keep: str = "") -> str:
    r"""Escape every character that is not shown as itself, as Python's ``repr`` does: ``\x1b``, ``\n``, ``\u202e``.

    Names of parameters, experts, files and classes come from whoever wrote a file. Escape sequences would move the
    cursor or set a title, newlines would begin sentences of their own, and what turns the direction of writing or has
    no width would make one name look like another.

    Args:
        text: A name, or a sentence that holds names.
        keep: Characters that stay: a newline where the text is made of lines whose names have been escaped.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else character.encode("unicode_escape").decode()
        for character in text
    )
