"""Figures inside an HTML page."""

from __future__ import annotations

import hashlib
import io
import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from matplotlib.figure import Figure

from lightning_merge.report.style import INK, house_style

_FAMILY = "'DejaVu Sans', Verdana, sans-serif"


def svg(figure: Figure, title: str = "", prefix: str | None = None) -> str:
    """Write a figure as an ``<svg>`` element that can stand in an HTML page among others.

    It takes the colour of the page's text, is as wide as the page up to its own width, keeps text as text, and has no
    date: the same figure gives the same bytes.

    Args:
        figure: A figure; what is drawn in :data:`lightning_merge.report.style.INK` becomes ``currentColor``.
        title: What it shows, for screen readers.
        prefix: The beginning of the ids in it; by default it is a hash of the element, so that the ids of two figures
            differ unless the figures are the same.

    Returns:
        The element, which is well-formed XML, too.
    """
    out = io.BytesIO()
    with house_style():
        figure.savefig(out, format="svg", dpi=144, transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(out.getvalue())
    _take_out(root, "metadata", "style", "title")
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _own_style(key, value) for key, value in element.attrib.items()}
    _name_ids(root, prefix or f"f{hashlib.sha256(ElementTree.tostring(root)).hexdigest()[:10]}")
    text = "".join(character if character.isprintable() else " " for character in title)
    width = float(root.attrib.pop("width").removesuffix("pt")) * 96 / 72
    del root.attrib["height"], root.attrib["version"]
    look = f"width:100%;max-width:{width:.0f}px;height:auto;stroke-linejoin:round;stroke-linecap:butt"
    root.attrib = {"xmlns": "http://www.w3.org/2000/svg", **root.attrib, "role": "img", "style": look}
    if text:
        root.attrib["aria-label"] = text
        title_element = Element("title")
        title_element.text = text
        root.insert(0, title_element)
    return ElementTree.tostring(root, encoding="unicode")


def _take_out(root: Element, *tags: str) -> None:
    """Remove all elements of these names: metadata, and a style sheet that would hold for the whole page."""
    for parent in list(root.iter()):
        for child in [child for child in parent if _local(child.tag) in tags]:
            parent.remove(child)


def _local(name: str) -> str:
    """Strip the namespace from a name."""
    return name.rpartition("}")[2]


def _own_style(key: str, value: str) -> str:
    if key != "style":
        return value
    return re.sub(r"'DejaVu Sans'[^;]*", _FAMILY, value.replace(INK, "currentColor"))


def _name_ids(root: Element, prefix: str) -> None:
    """Leave only the ids that something refers to, and put the prefix before them."""
    used = {
        name for element in root.iter() for key, value in element.attrib.items() for name in _references(key, value)
    }
    names = {name: f"{prefix}-{i}" for i, name in enumerate(sorted(used))}
    for element in root.iter():
        new_id = names.get(element.attrib.pop("id", ""))
        for key, value in element.attrib.items():
            for name in _references(key, value):
                element.attrib[key] = value.replace(f"#{name}", f"#{names[name]}")
        if new_id:
            element.attrib["id"] = new_id


def _references(key: str, value: str) -> list[str]:
    """Find the ids that an attribute refers to."""
    if key == "href":
        return [value[1:]] if value.startswith("#") else []
    return re.findall(r"url\(#([^)]+)\)", value)
