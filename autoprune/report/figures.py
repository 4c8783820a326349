"""Figures of the search: the front, the picked policy, the progress; and `figures`, which returns all of a run's."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from autoprune.pareto import front
from autoprune.report.data import Row, Run
from autoprune.report.look import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    MONO,
    MUTED,
    PURPLE,
    VERMILION,
    label_room,
    label_rows,
    rows_height,
    safe,
    short,
    style,
)
from autoprune.report.progress import progress
from autoprune.report.sensitivity import curves_figure, heatmap_figure
from autoprune.report.wording import percent, quantity, share

__all__ = ["figures", "front_figure", "policy_figure", "progress_figure"]


def figures(run: Run) -> dict[str, go.Figure]:
    """Return the figures that a run has the data for: front, policy, progress, curves, heatmap."""
    drawn: dict[str, go.Figure] = {}
    if run.rows:
        drawn["front"] = front_figure(dataclasses.replace(run, rows=run.finalists) if run.finalists else run)
    if run.picked and run.widths(run.picked):
        drawn["policy"] = policy_figure(run, run.picked)
    if run.arm("search"):
        drawn["progress"] = progress_figure(run)
    if any(group["cells"] for group in run.groups):
        drawn["curves"] = curves_figure(run)
        drawn["heatmap"] = heatmap_figure(run)
    return drawn


def front_figure(run: Run) -> go.Figure:
    """Return accuracy against MACs: every candidate, the front, and the marked ones."""
    unit, suffix = _unit(max(row.macs for row in run.rows))
    members = front(run.rows)
    lines = front(run.rows, {"accuracy": "max", "macs": "min"})
    dense_macs = run.dense.get("macs")

    def marks(rows: Sequence[Row], name: str, **marker: Any) -> go.Scatter:
        return go.Scatter(
            x=[row.macs / unit for row in rows],
            y=[100 * row.accuracy for row in rows],
            mode="markers",
            name=name,
            text=[_candidate_hover(row, name, dense_macs) for row in rows],
            hovertemplate="%{text}<extra></extra>",
            marker=marker,
        )

    figure = go.Figure()
    shown = {row.id for row in members}
    figure.add_trace(
        marks(
            [row for row in run.arm("search") if row.id not in shown],
            "candidate",
            color=FAINT,
            size=8,
            line={"color": "white", "width": 1},
        )
    )
    figure.add_trace(
        go.Scatter(
            x=[row.macs / unit for row in lines],
            y=[100 * row.accuracy for row in lines],
            mode="lines",
            line={"color": BLUE, "width": 2, "shape": "hv"},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    figure.add_trace(marks(members, "front", color=BLUE, size=9, line={"color": "white", "width": 1}))
    figure.add_trace(
        marks(
            run.arm("random"), "random", color="white", size=9, symbol="triangle-up", line={"color": PURPLE, "width": 2}
        )
    )
    figure.add_trace(
        marks(
            run.arm("uniform"), "uniform", color="white", size=10, symbol="diamond", line={"color": GREEN, "width": 2.5}
        )
    )
    if run.picked:
        picked = [row for row in run.rows if row.id == run.picked["id"]][:1]
        figure.add_trace(
            marks(
                picked, "picked", color="rgba(0,0,0,0)", size=15, symbol="circle", line={"color": VERMILION, "width": 3}
            )
        )
    dense = run.dense_as_searched
    if {"accuracy", "macs"} <= dense.keys():
        figure.add_trace(
            go.Scatter(
                x=[dense["macs"] / unit],
                y=[100 * dense["accuracy"]],
                mode="markers",
                name="dense",
                text=[f"<b>dense</b><br>{percent(dense['accuracy'])} · {quantity(dense['macs'])} MACs"],
                hovertemplate="%{text}<extra></extra>",
                marker={"color": INK, "size": 12, "symbol": "star"},
            )
        )
    title = f"MACs per input{f', in 10{suffix}' if suffix else ''}"
    top = max([row.accuracy for row in run.rows] + [dense.get("accuracy", 0.0)])
    style(figure, height=480, legend=True)
    costs = [row.macs / unit for row in run.rows] + ([dense_macs / unit] if dense_macs else [])
    margin = 0.04 * (max(costs) - min(costs) or max(costs))
    figure.update_xaxes(title_text=title, range=[min(costs) - margin, max(costs) + margin])
    figure.update_yaxes(
        title_text="validation accuracy", ticksuffix=" %", range=_focus([r.accuracy for r in run.rows], top)
    )
    figure.update_layout(
        dragmode="zoom", hovermode="closest", hoverlabel={"font": {"family": MONO, "size": 11}, "align": "left"}
    )
    return figure


def _candidate_hover(row: Row, kind: str, dense_macs: float | None) -> str:
    saved = f" ({share(row.macs, dense_macs)})" if dense_macs else ""
    head = f"<b>{kind}</b> {safe(row.id)} · {safe(row.fidelity)}<br>"
    head += f"{100 * row.accuracy:.1f} ± {100 * row.accuracy_se:.1f} % · {quantity(row.macs)} MACs{saved} · "
    return head + f"{quantity(row.params)} parameters<br><br>{_policy_lines(row.policy)}"


def _policy_lines(policy: Mapping[str, float]) -> str:
    """Return sparsities in as many columns as keep a hover box on the screen."""
    entries = [(short(group, 20), percent(sparsity, 0)) for group, sparsity in policy.items()]
    columns = math.ceil(len(entries) / 16)
    width = max((len(name) for name, _ in entries), default=0)
    cells = [safe(name) + "&nbsp;" * (width - len(name) + 6 - len(value)) + value for name, value in entries]
    rows = math.ceil(len(cells) / max(columns, 1))
    return "<br>".join("&nbsp;&nbsp;&nbsp;".join(cells[row::rows]) for row in range(rows))


def _focus(accuracies: Sequence[float], top: float) -> list[float]:
    """Return an axis range in percent that leaves out the lowest tenth of the values, which flatten the rest."""
    ordered = sorted(accuracies)
    low = ordered[len(ordered) // 10]
    margin = max(top - low, 0.01) * 0.08
    return [max(0.0, 100 * (low - margin)), min(101.0, 100 * (top + margin))]


def policy_figure(run: Run, picked: Mapping[str, Any]) -> go.Figure:
    """Return the sparsity of every group of the picked candidate, with uniform's beside it."""
    widths = run.widths(picked)
    rows = list(range(len(widths)))
    figure = go.Figure(
        go.Bar(
            x=[100 * width.sparsity for width in widths],
            y=rows,
            orientation="h",
            name="picked",
            marker={"color": VERMILION, "opacity": 0.88, "line": {"width": 0}},
            text=[f"<b>{safe(width.group)}</b><br>{percent(width.sparsity)} removed, {width.text}" for width in widths],
            textposition="none",
            hovertemplate="%{text}<extra></extra>",
            width=0.54,
        )
    )
    uniform = run.line(run.result["uniform"]["id"]) if run.result and run.result.get("uniform") else None
    if uniform:
        figure.add_trace(
            go.Scatter(
                x=[100 * width.sparsity for width in run.widths(uniform)],
                y=rows,
                mode="markers",
                name="uniform at the same cost",
                text=[
                    f"<b>{safe(w.group)}</b><br>uniform: {percent(w.sparsity)}, {w.text}" for w in run.widths(uniform)
                ],
                hovertemplate="%{text}<extra></extra>",
                marker={"symbol": "line-ns", "size": 14, "line": {"color": GREEN, "width": 2.5}},
            )
        )
    beside = {"x": 1, "xref": "paper", "xanchor": "left", "xshift": 10, "showarrow": False, "font": {"size": 12}}
    for row, width in zip(rows, widths, strict=True):
        figure.add_annotation(y=row, text=width.text, **beside)
    figure.add_annotation(y=1, yref="paper", yanchor="bottom", text="before → after", **beside)
    figure.update_annotations(patch={"font": {"color": MUTED}}, selector={"text": "before → after"})
    style(figure, height=rows_height(len(rows)), legend=True, left=label_room([w.group for w in widths]), right=104)
    label_rows(figure, [width.group for width in widths])
    figure.update_xaxes(title_text="elements removed", range=[0, 100], ticksuffix=" %", dtick=20)
    return figure


def progress_figure(run: Run) -> go.Figure:
    """Return the best so far against the number of candidates, with the control arms as levels."""
    course = progress(run)
    suffix = "" if course.title.startswith("hypervolume") else " %"
    numbers = list(range(1, len(course.best) + 1))
    figure = go.Figure()
    if any(value is not None for value in course.own):
        figure.add_trace(
            go.Scatter(
                x=numbers,
                y=course.own,
                mode="markers",
                name="candidate",
                marker={"color": FAINT, "size": 7, "line": {"color": "white", "width": 1}},
                hovertemplate=f"candidate %{{x}}: %{{y:.1f}}{suffix}<extra></extra>",
            )
        )
    digits = ".1f" if suffix else ".3f"
    figure.add_trace(
        go.Scatter(
            x=numbers,
            y=course.best,
            mode="lines",
            name="best so far",
            line={"color": BLUE, "width": 2.5, "shape": "hv"},
            hovertemplate=f"best of %{{x}}: %{{y:{digits}}}{suffix}<extra></extra>",
        )
    )
    draws = len(run.arm("random"))
    controls = (
        (course.uniform, "uniform", GREEN, "dash"),
        (course.random, "random" if draws == 1 else f"best of {draws} random", PURPLE, "dot"),
    )
    for level, name, colour, dash in controls:
        if level is not None:
            figure.add_trace(
                go.Scatter(
                    x=[1, max(numbers)],
                    y=[level, level],
                    mode="lines",
                    name=name,
                    line={"color": colour, "width": 2, "dash": dash},
                    hovertemplate=f"{name}: %{{y:{digits}}}{suffix}<extra></extra>",
                )
            )
    style(figure, height=380, legend=True)
    figure.update_xaxes(title_text="candidates evaluated", rangemode="tozero")
    figure.update_yaxes(title_text=course.title, ticksuffix=suffix)
    figure.update_layout(dragmode="zoom")
    if suffix and course.rising:
        known = [value / 100 for value in (*course.own, course.uniform, course.random) if value is not None]
        figure.update_yaxes(range=_focus(known, max(known)))
    return figure


def _unit(largest: float) -> tuple[float, str]:
    """Return what to divide counts by for an axis, and its power of ten as superscript."""
    for unit, power in ((1e9, "⁹"), (1e6, "⁶"), (1e3, "³")):
        if largest >= unit:
            return unit, power
    return 1.0, ""
