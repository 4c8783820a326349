"""Figures of the sensitivity analysis: a small panel of curves for each group, and the heat map."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from autoprune.report.data import Run
from autoprune.report.look import (
    BAND,
    BLUE,
    INK,
    PURPLE,
    SHADES,
    VERMILION,
    label_room,
    label_rows,
    number,
    rows_height,
    safe,
    short,
    style,
)
from autoprune.report.wording import percent, signed

__all__ = ["curves_figure", "heatmap_figure"]

PANELS = 4  # side by side
PANEL_HEIGHT = 150  # pixels


def curves_figure(run: Run) -> go.Figure:
    """Return one small panel a group: against sparsity the accuracy, or by a switch one of two other views.

    The loss with its Taylor prediction; and what the moments of the layers' inputs predict, where that is known.
    """
    groups = [group for group in run.groups if group["cells"]]
    columns = min(PANELS, len(groups))
    rows = math.ceil(len(groups) / columns)
    height = 62 + 32 + rows * PANEL_HEIGHT
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes="all",
        shared_yaxes="all",
        subplot_titles=[safe(short(group["name"], 30)) for group in groups],
        horizontal_spacing=0.025,
        vertical_spacing=42 / (rows * PANEL_HEIGHT) if rows > 1 else 0.0,
    )
    dense = run.dense_as_searched
    picked = {width.group: width.sparsity for width in run.widths(run.picked)} if run.picked else {}
    looks = {"Accuracy": _accuracy_axis(groups, dense), "Loss and Taylor": _loss_axis(groups, dense)}
    if any(group.get("predicted") for group in groups):
        looks["Predicted"] = _predicted_axis(groups)
    views: list[str] = []  # of each trace
    for index, group in enumerate(groups):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        at, first = picked.get(group["name"]), index == 0
        panels = {
            "Accuracy": _panel(group, "accuracy", dense, 100.0, at, first=first),
            "Loss and Taylor": _panel(group, "loss", dense, 1.0, at, first=first),
            "Predicted": _predicted(group, at, first=first),
        }
        for view, traces in panels.items():
            for trace in traces:
                figure.add_trace(trace.update(visible=view == "Accuracy"), **place)
            views += [view] * len(traces)
    style(figure, height=height, legend=True, top=62)
    figure.update_layout(
        margin_b=32, legend_yref="paper", legend_yanchor="bottom", legend_y=1 + 28 / (rows * PANEL_HEIGHT)
    )
    figure.update_annotations(font={"size": 12, "color": INK}, yshift=2)
    figure.update_xaxes(range=[-0.04, 1], tickvals=[0.25, 0.5, 0.75], ticktext=["25", "50", "75 %"], type="linear")
    _label_outer_axes(figure, rows, columns, len(groups))
    figure.update_yaxes(**looks["Accuracy"])
    axes = ["yaxis" if index == 0 else f"yaxis{index + 1}" for index in range(len(groups))]  # Plotly drops empty panels
    buttons = [
        {
            "label": label,
            "method": "update",
            "args": [
                {"visible": [view == label for view in views]},
                {f"{axis}.{key}": value for axis in axes for key, value in look.items()},
            ],
        }
        for label, look in looks.items()
    ]
    figure.update_layout(
        updatemenus=[
            {
                "type": "buttons",
                "direction": "right",
                "buttons": buttons,
                "x": 1,
                "xanchor": "right",
                "y": 1,
                "yanchor": "bottom",
                "pad": {"b": 26},
                "bgcolor": "white",
                "bordercolor": "#c9d1da",
                "font": {"size": 12, "color": INK},
                "showactive": True,
            }
        ]
    )
    return figure


def _panel(
    group: Mapping[str, Any],
    quantity_name: str,
    dense: Mapping[str, Any],
    scale: float,
    at: float | None,
    *,
    first: bool,
) -> list[go.Scatter]:
    """Return the traces of one group's panel: error band, curve, Taylor, the picked sparsity."""
    start = {"sparsity": 0.0, "removed": 0, "drop_se": 0.0, **{key: dense.get(key) for key in ("accuracy", "loss")}}
    start |= {
        "accuracy_se": dense.get("accuracy_se"),
        "loss_se": dense.get("loss_se"),
        "taylor_loss": dense.get("loss"),
    }
    cells = [cell for cell in [start, *group["cells"]] if number(cell.get(quantity_name)) is not None]
    x = [cell["sparsity"] for cell in cells]
    y = [scale * cell[quantity_name] for cell in cells]
    error = [scale * (number(cell.get(f"{quantity_name}_se")) or 0.0) for cell in cells]
    upper = [value + spread for value, spread in zip(y, error, strict=True)]
    lower = [max(value - spread, 1e-6) for value, spread in zip(y, error, strict=True)]
    suffix = " %" if quantity_name == "accuracy" else ""
    digits = ".1f" if quantity_name == "accuracy" else ".3f"
    text = [
        f"<b>{safe(group['name'])}</b><br>{percent(cell['sparsity'])} removed ({cell['removed']} of {group['size']})"
        f"<br>{quantity_name} {value:{digits}} ± {spread:{digits}}{suffix}"
        for cell, value, spread in zip(cells, y, error, strict=True)
    ]
    traces = [
        go.Scatter(
            x=x + x[::-1],
            y=upper + lower[::-1],
            fill="toself",
            fillcolor=BAND,
            mode="lines",  # a few points would be marked, each in a colour of its own
            line={"width": 0},
            hoverinfo="skip",
            name="± 1 standard error",
            legendgroup="band",
            showlegend=first,
        ),
        go.Scatter(
            x=x,
            y=y,
            mode="lines+markers",
            line={"color": BLUE, "width": 2},
            marker={"size": 4},
            text=text,
            hovertemplate="%{text}<extra></extra>",
            name=f"measured {quantity_name}",
            legendgroup="measured",
            showlegend=first,
        ),
    ]
    taylor = [(cell["sparsity"], cell["taylor_loss"]) for cell in cells if number(cell.get("taylor_loss")) is not None]
    if quantity_name == "loss" and len(taylor) > 1:
        traces.append(
            go.Scatter(
                x=[sparsity for sparsity, _ in taylor],
                y=[value for _, value in taylor],
                mode="lines",
                line={"color": PURPLE, "width": 1.8, "dash": "dot"},
                hovertemplate="Taylor predicts %{y:.3f}<extra></extra>",
                name="predicted by Taylor",
                legendgroup="taylor",
                showlegend=first,
            )
        )
    return [*traces, *_mark(x, y, at, first=first)]


def _predicted(group: Mapping[str, Any], at: float | None, *, first: bool) -> list[go.Scatter]:
    """Return the traces of what moments predict for one group."""
    points = [point for point in group.get("predicted") or [] if point[1] > 0]  # the axis is logarithmic
    x, y = [removed / group["size"] for removed, _ in points], [100 * loss for _, loss in points]
    if not points:
        return []
    curve = go.Scatter(
        x=x,
        y=y,
        mode="lines",
        line={"color": PURPLE, "width": 2},
        hovertemplate=f"<b>{safe(group['name'])}</b><br>%{{x:.0%}} removed<br>%{{y:.2g}} % of the network's output lost"
        "<extra></extra>",
        name="predicted from moments",
        legendgroup="moments",
        showlegend=first,
    )
    return [curve, *_mark(x, y, at, first=first)]


def _mark(x: Sequence[float], y: Sequence[float], at: float | None, *, first: bool) -> list[go.Scatter]:
    """Return the mark of the picked sparsity on a curve."""
    if at is None or not x:
        return []
    mark = go.Scatter(
        x=[at],
        y=[_interpolated(x, y, at)],
        mode="markers",
        marker={"color": "white", "size": 9, "line": {"color": VERMILION, "width": 2.5}},
        hovertemplate=f"picked: {percent(at)} removed<extra></extra>",
        name="sparsity of the picked candidate",
        legendgroup="picked",
        showlegend=first,
    )
    return [mark]


def _accuracy_axis(groups: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]) -> dict[str, Any]:
    lowest = min(cell["accuracy"] for group in groups for cell in group["cells"])
    margin = 0.06 * max(dense["accuracy"] - lowest, 0.01)
    limits = [100 * (lowest - margin), 100 * (dense["accuracy"] + margin)]
    return {"type": "linear", "ticksuffix": " %", "tickmode": "auto", "nticks": 5, "range": limits}


def _loss_axis(groups: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Return a logarithmic axis: the loss grows by orders of magnitude. Plotly wants its range in powers of ten."""
    losses = [dense["loss"], *(cell.get(key) for g in groups for cell in g["cells"] for key in ("loss", "taylor_loss"))]
    powers = [math.log10(value) for loss in losses if (value := number(loss)) is not None and value > 0]
    low, high = min(powers, default=0.0) - 0.06, max(powers, default=1.0) + 0.06
    steps = (1,) if high - low > 3 else (1, 3) if high - low > 1.5 else (1, 2, 5)
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high)) for step in steps]
    return {"type": "log", "ticksuffix": "", "tickmode": "array", "tickvals": ticks, "range": [low, high]}


def _predicted_axis(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a logarithmic axis in percent; errors of several readers add up, to more than the output has."""
    losses = [100 * loss for group in groups for _, loss in group.get("predicted") or [] if loss > 0]
    low, high = math.log10(max(0.01, min(losses, default=0.1))), math.log10(max(losses, default=100.0)) + 0.06
    ticks = [10.0**power for power in range(math.floor(low), math.ceil(high) + 1)]
    return {"type": "log", "ticksuffix": " %", "tickmode": "array", "tickvals": ticks, "range": [low, high]}


def _label_outer_axes(figure: go.Figure, rows: int, columns: int, panels: int) -> None:
    """Show tick labels on the left edge and under the lowest panel of each column, also where the last row is short."""
    for index in range(panels):
        row, column = index // columns + 1, index % columns + 1
        lowest = index + columns >= panels
        figure.update_xaxes(showticklabels=lowest, row=row, col=column)
        figure.update_yaxes(showticklabels=column == 1, row=row, col=column)


def heatmap_figure(run: Run) -> go.Figure:
    """Return the loss of accuracy in points, a row a group, a cell a measured sparsity."""
    groups = [group for group in run.groups if group["cells"]]
    dense = run.dense_as_searched["accuracy"]
    worst = max(dense - cell["accuracy"] for group in groups for cell in group["cells"])
    figure = go.Figure()
    for row, group in enumerate(groups):
        drops = [dense - cell["accuracy"] for cell in group["cells"]]
        figure.add_trace(
            go.Heatmap(
                x=_edges([100 * cell["sparsity"] for cell in group["cells"]]),
                y=[row - 0.5, row + 0.5],
                z=[[max(0.0, 100 * drop) for drop in drops]],
                coloraxis="coloraxis",
                xgap=1.5,
                ygap=1.5,
                text=[[_cell_text(drop) for drop in drops]],
                texttemplate="%{text}" if len(drops) <= 12 else "",
                textfont={"size": 11},
                customdata=[
                    [
                        f"<b>{safe(group['name'])}</b><br>{percent(cell['sparsity'])} removed "
                        f"({cell['removed']} of {group['size']})<br>{signed(-drop)} ± {100 * _se(cell):.1f} points"
                        for cell, drop in zip(group["cells"], drops, strict=True)
                    ]
                ],
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
    names = [group["name"] for group in groups]
    height = rows_height(len(names))
    style(figure, height=height, legend=False, left=label_room(names), right=96, top=12)
    label_rows(figure, names)
    figure.update_xaxes(title_text="elements removed", range=[0, 100], ticksuffix=" %", dtick=10, showgrid=False)
    figure.update_layout(
        coloraxis={
            "colorscale": SHADES,
            "cmin": 0,
            "cmax": max(100 * worst, 1.0),
            "colorbar": {
                "title": {"text": "points lost", "font": {"size": 12}},
                "thickness": 12,
                "lenmode": "pixels",
                "len": min(260, height - 70),
                "y": 1,
                "yanchor": "top",
                "outlinewidth": 0,
            },
        }
    )
    return figure


def _cell_text(drop: float) -> str:
    lost = 100 * drop
    return f"{lost:.0f}" if lost >= 10 else f"{max(lost, 0.0):.1f}"


def _edges(centres: Sequence[float]) -> list[float]:
    """Return the borders of cells around measured sparsities in percent: half-way to each neighbour."""
    if len(centres) == 1:
        return [max(0.0, centres[0] - 5), min(100.0, centres[0] + 5)]
    inner = [(left + right) / 2 for left, right in itertools.pairwise(centres)]
    first, last = 2 * centres[0] - inner[0], 2 * centres[-1] - inner[-1]
    return [max(0.0, first), *inner, min(100.0, last)]


def _interpolated(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """Return the value of a polyline at one place, level beyond its ends."""
    for (left, low), (right, high) in zip(zip(x, y, strict=True), zip(x[1:], y[1:], strict=True), strict=False):
        if left <= at <= right and right > left:
            return low + (high - low) * (at - left) / (right - left)
    return y[0] if at < x[0] else y[-1]


def _se(cell: Mapping[str, Any]) -> float:
    return number(cell.get("drop_se")) or number(cell.get("accuracy_se")) or 0.0
