"""One HTML page that needs nothing but itself: pieces that return HTML from plain values, everything escaped."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

from lut_ds.analysis.figures import DARK, DPI, LIGHT, Draw, png

_NARROW, _WIDE, _WIDEST = 576, 640, 1200  # pixels of the page


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


def part(heading: str, body: str) -> str:
    """A headed part of a section; `body` is HTML."""
    return f"<h3>{escape(heading)}</h3>{body}"


def note(said: str) -> str:
    """A remark apart from the text: what is missing and why."""
    return f'<p class="note">{escape(said)}</p>'


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
    light, dark = (png(draw, theme) for theme in (LIGHT, DARK))
    return stored_picture(light, dark, alt, caption, narrow)


def stored_picture(light: bytes, dark: bytes | None, alt: str, caption: str, narrow: bool = False) -> str:
    """PNGs of the same size, for light screens and for dark ones (None: the same), inside the page; never enlarged."""
    width = int.from_bytes(light[16:20], "big") * 96 // DPI
    width = min(width, _NARROW) if narrow else width
    wide = (
        ' class="wide"' if width > _WIDE else ""
    )  # on a phone these are scrolled, not shrunk until nothing can be read
    for_dark = "" if dark is None else f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
    return (
        f'<figure><div class="scroll"><picture>{for_dark}'
        f'<img{wide} src="{_data_uri(light)}" alt="{escape(alt)}" style="max-width: min(100%, {width}px)">'
        f"</picture></div><figcaption>{escape(caption)}</figcaption></figure>"
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


def columns(names: Sequence[str], rows: Mapping[str, Sequence[object]], mark: bool = False) -> str:
    """A table with a column for each of `names`; with `mark`, rows whose values differ stand out."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *names))
    lines = []
    for name, values in rows.items():
        shown = [str(value) for value in values]
        differs = ' class="differs"' if mark and len(set(shown)) > 1 else ""
        cells = "".join(f'<td class="value">{escape(value)}</td>' for value in shown)
        lines.append(f'<tr{differs}><th scope="row">{escape(name)}</th>{cells}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def log(rows: Sequence[tuple[str, str, str]]) -> str:
    """What happened when: time, kind and text of each event."""
    lines = (
        f'<tr><th scope="row">{escape(when)}</th><td>{escape(kind)}</td><td class="code">{escape(said)}</td></tr>'
        for when, kind, said in rows
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
        f"</header><nav>{links}</nav>{lead}{body}<footer>{escape(footer)}</footer></main></body></html>\n"
    )


def _data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()
