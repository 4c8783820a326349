"""The look that all figures share: colours, fonts, axes, and how names and numbers fit. No data of a run is read here.

Colours are four of Okabe and Ito's (2008, "Color Universal Design"), which colour-blind readers tell apart; each mark
has its own shape as well.
"""

import html
import math
from collections.abc import Sequence

import plotly.graph_objects as go

__all__ = [
    "BAND",
    "BLUE",
    "FAINT",
    "GREEN",
    "INK",
    "MONO",
    "MUTED",
    "PURPLE",
    "SERIES",
    "SHADES",
    "VERMILION",
    "label_room",
    "label_rows",
    "number",
    "rows_height",
    "safe",
    "short",
    "style",
]

INK, MUTED, RULE, FAINT = "#1c2733", "#5f6b7a", "#e4e8ed", "#a9c6dd"
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#a8578a"
BAND = "rgba(0, 114, 178, 0.25)"
SERIES = (BLUE, VERMILION, "#c58b00", "#3d9fd3", INK)  # where there are many lines, then again in dashes
SHADES = [(0.0, "#f4f8fb"), (0.1, "#d5e5f1"), (0.3, "#8fbbdb"), (0.6, "#2f7fb8"), (0.85, "#0b4f86"), (1.0, "#062f57")]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"

ROW_HEIGHT = 24  # pixels
LONGEST = 26  # characters of a group's name that fit beside a row


def style(figure: go.Figure, *, height: int, legend: bool, left: int = 64, right: int = 16, top: int = 48) -> None:
    """Give a figure the page's look."""
    figure.update_layout(
        template=None,
        height=height,
        autosize=True,
        margin={"l": left, "r": right, "t": top, "b": 46, "pad": 4},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 12, "color": INK},
        showlegend=legend,
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "font": {"size": 12},
        },
        hoverlabel={"bgcolor": "white", "bordercolor": "#c9d1da", "font": {"family": FONT, "size": 12, "color": INK}},
        bargap=0,
        dragmode=False,
    )
    axis = {"gridcolor": RULE, "zeroline": False, "linecolor": "#c9d1da", "tickfont": {"size": 12, "color": MUTED}}
    title = {"title_font": {"size": 12, "color": MUTED}, "title_standoff": 10}
    figure.update_xaxes(**axis, **title, showline=True, ticks="")
    figure.update_yaxes(**axis, **title, showline=False, ticks="")


def label_rows(figure: go.Figure, names: Sequence[str]) -> None:
    """Label one row a name, the first on top."""
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[safe(short(name, LONGEST)) for name in names],
        tickfont={"size": 12, "color": INK},
        range=[len(names) - 0.4, -0.6],
        showgrid=False,
    )


def rows_height(rows: int) -> int:
    """Return the pixels of a figure with so many labelled rows."""
    return 100 + ROW_HEIGHT * max(rows, 3)


def label_room(names: Sequence[str]) -> int:
    """Return the pixels that the longest label needs."""
    return 24 + 7 * min(LONGEST, max(len(name) for name in names))


def number(value: object) -> float | None:
    """Return a finite number of a file, or None for what is absent or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def short(name: str, longest: int) -> str:
    """Return a name with its middle left out where it is too long; its end tells layers apart."""
    if len(name) <= longest:
        return name
    head = longest // 3
    return f"{name[:head]}…{name[-(longest - head - 1) :]}"


def safe(text: str) -> str:
    """Return text that Plotly, which reads a subset of HTML, shows as it is."""
    return html.escape(text, quote=False)
