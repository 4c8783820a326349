"""What every page is made of: the document with its figures inside, tables, settings, and text that is escaped.

Everything a page needs is inside it, Plotly's JavaScript too, and a content security policy forbids it to load anything
else.
"""

import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from autoprune.errors import RunError
from autoprune.report.style import STYLE

__all__ = [
    "CONFIG",
    "coded",
    "document",
    "duration",
    "escaped",
    "figure_section",
    "html_table",
    "settings_section",
    "write_page",
]

CONFIG = {"displayModeBar": False, "responsive": True}


def document(title: str, sections: Sequence[str], drawn: Mapping[str, go.Figure]) -> str:
    """Return a whole page: sections, which are HTML, and the figures that they have room for."""
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; img-src data: blob:\">\n"
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n"
        "<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script type='application/json' id='figures'>{_script_data(drawn)}</script>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def write_page(target: Path, page: str) -> Path:
    """Write a page whole or not at all, and return its path.

    Raises:
        RunError: It can't be written.
    """
    temporary = target.with_name(f"{target.name}.part")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise RunError(f"'{target}' can't be written ({error.strerror}); make the folder writable") from error
    return target


def figure_section(drawn: Mapping[str, go.Figure], name: str, title: str, caption: str) -> str:
    """Return a section with room for a figure; nothing where that is not drawn."""
    if name not in drawn:
        return ""
    height = int(drawn[name].layout.height)
    return (
        f"<section><h2>{title}</h2><p class='caption'>{escaped(caption)}</p>"
        f"<div class='figure' id='figure-{name}' style='height:{height}px'></div></section>"
    )


def html_table(
    headings: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    *,
    text_columns: Sequence[int] = (0,),
    css: str = "",
) -> str:
    """Return a table of cells that are HTML already; columns hold numbers but for the `text_columns`."""

    def cell(tag: str, index: int, content: str) -> str:
        return f"<{tag}{'' if index in text_columns else ' class=number'}>{content}</{tag}>"

    head = "".join(cell("th", index, content) for index, content in enumerate(headings))
    body = ""
    for css_row, cells in rows:
        row = "".join(cell("td", index, content) for index, content in enumerate(cells))
        body += f"<tr{f' class={css_row}' if css_row else ''}>{row}</tr>"
    return (
        f"<div class='scroll'><table{f' class={css}' if css else ''}><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def settings_section(blocks: Mapping[str, Mapping[str, Any]], caption: str = "") -> str:
    """Return a section that lists settings under headings, below a caption; a heading without any is left out."""
    listed = ""
    for title, values in blocks.items():
        items = [f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in _flat(values)]
        if items:
            listed += f"<div><h3>{escaped(title)}</h3><dl>{''.join(items)}</dl></div>"
    above = f"<p class='caption'>{escaped(caption)}</p>" if caption else ""
    return f"<section><h2>Settings</h2>{above}<div class='settings'>{listed}</div></section>" if listed else ""


def duration(seconds: float) -> str:
    """Return seconds in the unit that suits them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def escaped(text: str) -> str:
    """Return text that HTML shows as it is."""
    return html.escape(text)


def coded(text: str) -> str:
    """Return escaped text with `backticked` parts set as code."""
    parts = escaped(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as dotted names and short texts."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
            yield f"{prefix}{key}", text if len(text) <= 120 else f"{text[:119]}…"


def _script_data(drawn: Mapping[str, go.Figure]) -> str:
    """Return the figures as JSON that can stand inside a script element, whatever strings are in it."""
    text = ",".join(f"{json.dumps(name)}:{figure.to_json()}" for name, figure in drawn.items())
    return f"{{{text}}}".replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


SCRIPT = f"""
const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = Object.entries(figures).map(([name, figure]) =>
  Plotly.newPlot("figure-" + name, figure.data, figure.layout, {json.dumps(CONFIG)}));
Promise.all(plots).then(() => {{ document.body.dataset.drawn = plots.length; }});
"""
