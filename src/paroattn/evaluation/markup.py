"""HTML without holes: elements as functions that escape whatever is not markup already."""

import string
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from .video import replacing

VOID = ("img", "input")


class Markup(str):
    """Text that is HTML already; everything else is escaped."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element; an attribute that is None or False is left out, True stands alone, and class_ means class."""
    opening = name
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            opening += f" {key}" if value is True else f' {key}="{escape(str(value))}"'
    return Markup(f"<{opening}>" if name in VOID else f"<{opening}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Markup:
    """All of them, one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else escape(str(child)) for child in children))


def section(title: str, lead: str, *children: Any) -> Markup:
    """A section under a heading, with a sentence on what it shows."""
    heading = tag("div", tag("h2", title), tag("p", lead, class_="lead") if lead else "")
    return tag("section", heading, *children)


def table(head: Sequence[str], rows: Iterable[Iterable[Any]], *, caption: str, class_: str | None = None) -> Markup:
    """A table in its own scrolling box.

    The first cell of a row is its heading, cells may be <td> already, and a column headed " so" is text, to the left.
    """
    columns = [tag("th", name.strip(), scope="col", class_="text" if name.startswith(" ") else None) for name in head]
    lines = [tag("tr", tag("th", first, scope="row"), *map(_cell, rest)) for first, *rest in rows]
    parts = (tag("caption", caption), tag("thead", tag("tr", *columns)), tag("tbody", *lines))
    return tag(
        "div", tag("table", *parts, class_=class_), class_="scroll", tabindex=0, role="region", aria_label=caption
    )


def terms(pairs: Mapping[str, Any], **attributes: Any) -> Markup:
    """A list of names and values."""
    groups = [tag("div", tag("dt", name, " "), tag("dd", value)) for name, value in pairs.items()]
    return tag("dl", *groups, **attributes)


def details(title: str, *children: Any) -> Markup:
    """What opens on a click."""
    return tag("details", tag("summary", title), *children)


def write_page(path: Path, title: str, parts: Iterable[Markup]) -> Path:
    """Put the parts of a page into the template and write it, all of it or nothing."""
    template = string.Template((files("paroattn.evaluation") / "page.html").read_text(encoding="utf-8"))
    page = template.substitute(title=escape(title), body="\n".join(part for part in parts if part))
    with replacing(path) as target:
        target.write_text(page, encoding="utf-8")
    return path


def _cell(value: Any) -> Markup:
    return value if isinstance(value, Markup) and value.startswith("<td") else tag("td", value)
