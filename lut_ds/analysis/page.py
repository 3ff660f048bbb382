"""One HTML page that needs nothing but itself: pieces that return HTML from plain values, everything escaped."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

from lut_ds.analysis.figures import DARK, LIGHT, Draw, png


@dataclass(frozen=True)
class Section:
    """A headed part of the page; `body` is HTML made by the functions of this module."""

    heading: str
    body: str

    @property
    def anchor(self) -> str:
        """Its id on the page."""
        return "".join(c if c.isalnum() else "-" for c in self.heading.lower())


@dataclass(frozen=True)
class Tile:
    """A number worth seeing first. `tone` is `first`, `second` or nothing."""

    value: str
    unit: str
    label: str
    note: str = ""
    tone: str = ""


def text(*paragraphs: str) -> str:
    """Paragraphs."""
    return "".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)


def tiles(items: Sequence[Tile]) -> str:
    """Numbers side by side."""
    cells = (
        f'<div class="tile {escape(t.tone)}"><b>{escape(t.value)}<small>{escape(t.unit)}</small></b>'
        f"<span>{escape(t.label)}</span><em>{escape(t.note)}</em></div>"
        for t in items
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def picture(draw: Draw, alt: str, caption: str, narrow: bool = False) -> str:
    """A picture inside the page, drawn once for light screens and once for dark ones."""
    light, dark = (_data_uri(png(draw, theme)) for theme in (LIGHT, DARK))
    return (
        f"<figure{' class=narrow' if narrow else ''}><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}"><img src="{light}" alt="{escape(alt)}">'
        f"</picture><figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table whose first column names the row and whose others are numbers."""
    top = "".join(f'<th scope="col"{" class=number" if i else ""}>{escape(name)}</th>' for i, name in enumerate(head))
    lines = (
        "<tr>"
        + f'<th scope="row">{escape(row[0])}</th>'
        + "".join(f'<td class="number">{escape(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    title = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return (
        f'{title}<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def facts(values: Mapping[str, object]) -> str:
    """A table of names and values."""
    lines = (
        f'<tr><th scope="row">{escape(name)}</th><td class="code">{escape(str(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<div class="scroll"><table><tbody>{"".join(lines)}</tbody></table></div>'


def folded(title: str, body: str) -> str:
    """Something to open on a click."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def page(eyebrow: str, title: str, standfirst: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """The whole page.

    Args:
        eyebrow, title, standfirst, footer: plain text.
        lead: HTML under the standfirst.
        sections: in order; a line of links leads to them.
    """
    css = resources.files("lut_ds").joinpath("analysis/report.css").read_text()
    links = "".join(f'<a href="#{s.anchor}">{escape(s.heading)}</a>' for s in sections)
    body = "".join(f'<section id="{s.anchor}"><h2>{escape(s.heading)}</h2>{s.body}</section>' for s in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css}</style></head>\n<body><main><header>"
        f'<p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(title)}</h1><p class="standfirst">{escape(standfirst)}</p>'
        f"<nav>{links}</nav></header>{lead}{body}<footer>{escape(footer)}</footer></main></body></html>\n"
    )


def _data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()
