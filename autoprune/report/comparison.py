"""The page of a comparison of agents, from `compare.json` alone: words, tables, and the best so far of each agent."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from autoprune.errors import RunError
from autoprune.report.look import GREEN, PURPLE, SERIES, safe, style
from autoprune.report.parts import (
    document,
    duration,
    escaped,
    figure_section,
    html_table,
    settings_section,
    write_page,
)
from autoprune.report.wording import MINUS, measured, percent, quantity, signed

__all__ = ["comparison_figures", "comparison_page", "write_comparison"]

_FIXED = {"uniform": (GREEN, "dash"), "random": (PURPLE, "dot")}  # as in the page of a run
_DASHES = ("solid", "dash", "dashdot", "longdash")


def write_comparison(folder: Path) -> Path:
    """Write `compare.html` into a comparison's folder, from `compare.json`, and return its path.

    Raises:
        RunError: There is no such file, it can't be read, or the page can't be written.
    """
    file = folder / "compare.json"
    try:
        told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"'{folder}' holds no compare.json; is it the --out folder of a finished comparison?") from error
    except (OSError, ValueError) as error:
        raise RunError(f"'{file}' can't be read ({error}); run the comparison again, which renews it") from error
    return write_page(folder / "compare.html", comparison_page(told, folder.resolve().name))


def comparison_page(told: Mapping[str, Any], name: str) -> str:
    """Return the whole page.

    Args:
        told: The contents of `compare.json`.
        name: Of the folder.
    """
    drawn = comparison_figures(told)
    title = str(told["task"].get("name") or name)
    several = "each line is a mean over seeds, with its interval" if told["seeds"] > 1 else "one seed"
    sections = [
        _header(told, title, name),
        _words(told),
        _table(told),
        figure_section(
            drawn,
            "accuracy",
            "Best so far",
            f"Validation accuracy of the best policy that an agent has proposed, against evaluations; {several}. A "
            "name in the legend hides and shows its line. Drag to zoom, double-click to see all.",
        ),
        figure_section(
            drawn,
            "hypervolume",
            "Accuracy and cost together",
            f"Hypervolume that the agent's policies dominate in accuracy and saved MACs, of at most 1; {several}. An "
            "agent that spends the whole budget on every policy can't gain by cheaper ones.",
        ),
        _differences(told, "picked", "Differences of the picks", "In points of picked validation accuracy", signed),
        _differences(told, "hypervolume", "Differences in hypervolume", "In hypervolume", _signed_volume),
        _differences(told, "test", "Differences on the test split", "In points of fine-tuned test accuracy", signed),
        settings_section({"Task": told["task"], "Search": told["search"], "Versions": told["versions"]}),
    ]
    return document(f"{title} · agents compared · autoprune", sections, drawn)


def comparison_figures(told: Mapping[str, Any]) -> dict[str, go.Figure]:
    """Return the best so far of every agent against evaluations: "accuracy", in percent, and "hypervolume"."""
    return {
        "accuracy": _courses(told, "accuracy", 100.0, "best validation accuracy so far", " %"),
        "hypervolume": _courses(told, "hypervolume", 1.0, "hypervolume so far", ""),
    }


def _courses(told: Mapping[str, Any], measure: str, scale: float, title: str, suffix: str) -> go.Figure:
    figure = go.Figure()
    agents = [row["agent"] for row in told["table"]]
    digits = 1 if suffix else 3
    levels: list[float] = []
    for agent, (colour, dash) in zip(agents, _strokes(agents), strict=True):
        course = told["curves"][agent][measure]
        mean = [scale * value for value in course["mean"]]
        numbers = list(range(1, len(mean) + 1))
        shown: dict[str, Any] = {"x": numbers, "mode": "lines", "legendgroup": agent}
        said = [f"{value:.{digits}f}{suffix}" for value in mean]
        levels += mean[len(mean) // 10 :]
        if course["low"][0] is not None:
            low, high = ([scale * value for value in course[bound]] for bound in ("low", "high"))
            edge = {"line": {"width": 0, "shape": "hv"}, "hoverinfo": "skip", "showlegend": False}
            figure.add_trace(go.Scatter(y=high, **shown, **edge))
            figure.add_trace(go.Scatter(y=low, fill="tonexty", fillcolor=_pale(colour), **shown, **edge))
            bounds = zip(said, low, high, strict=True)
            said = [f"{text} ({under:.{digits}f} to {over:.{digits}f})" for text, under, over in bounds]
        figure.add_trace(
            go.Scatter(
                y=mean,
                name=safe(agent),
                line={"color": colour, "width": 2.5, "dash": dash, "shape": "hv"},
                text=said,
                hovertemplate=f"{safe(agent)} after %{{x}}: %{{text}}<extra></extra>",
                **shown,
            )
        )
    style(figure, height=420, legend=True, top=48 + 20 * (len(agents) // 8))
    figure.update_xaxes(title_text="evaluations", rangemode="tozero")
    figure.update_yaxes(title_text=title, ticksuffix=suffix)
    margin = 0.12 * (max(levels) - min(levels)) or 0.01 * scale
    figure.update_yaxes(range=[max(0.0, min(levels) - margin), min(scale, max(levels) + 2 * margin)])
    figure.update_layout(dragmode="zoom", hovermode="closest")
    return figure


def _strokes(agents: Sequence[str]) -> list[tuple[str, str]]:
    """Return a colour and a dash for each agent, none twice."""
    others = [agent for agent in agents if agent not in _FIXED]
    strokes = {
        agent: (SERIES[place % len(SERIES)], _DASHES[place // len(SERIES) % len(_DASHES)])
        for place, agent in enumerate(others)
    }
    return [(_FIXED | strokes)[agent] for agent in agents]


def _pale(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.1)"


# ----------------------------------------------------------------------------------------------------------- sections


def _header(told: Mapping[str, Any], title: str, name: str) -> str:
    lead = told["table"][0]
    picked = told["differences"]["picked"]
    to_random = next((one for one in picked["to_random"] if one["agent"] == lead["agent"]), None) if picked else None
    asked = sum(sum(row["evaluations"]["values"]) for row in told["table"])
    tiles = [
        ("Picks best", escaped(lead["agent"]), _in_brackets(lead["accuracy"])),
        ("Against random", *(("0.0", "random picks best") if to_random is None else _beside(to_random))),
        ("Evaluations each", str(told["evaluations"]), f"{asked} in all, of {told['evaluated']} different policies"),
        ("Seeds", str(told["seeds"]), f"recovery: {escaped(told['fidelity'])}"),
    ]
    shown = "".join(
        f"<div class='tile'><dt>{label}</dt><dd>{value}</dd><dd class='note'>{note}</dd></div>"
        for label, value, note in tiles
    )
    budget = escaped(str(told["search"].get("budget")))
    return (
        f"<header><p class='eyebrow'>autoprune · {escaped(name)}</p><h1>Agents on {escaped(title)}</h1>"
        f"<p class='lead'>{escaped(told['words'][0])} All had {told['evaluations']} evaluations within {budget}.</p>"
        f"<dl class='tiles'>{shown}</dl></header>"
    )


def _beside(difference: Mapping[str, Any]) -> tuple[str, str]:
    verdict = "more than noise" if difference["clear"] else "within the noise"
    if difference["low"] is None:
        return signed(difference["mean"]), "points; one seed, so no interval"
    return signed(
        difference["mean"]
    ), f"points ({signed(difference['low'])} to {signed(difference['high'])}): {verdict}"


def _words(told: Mapping[str, Any]) -> str:
    said = "".join(f"<li>{escaped(word)}</li>" for word in told["words"][1:])
    dense = told["dense"]
    noise = (
        "Noise is that of the agents' seeds: differences are taken in pairs of the same seed, intervals are Student's, "
        "of 95&nbsp;%, each for itself, and a difference is called one if a paired t test says so after Holm's "
        "correction for all that are compared with the same agent. "
        if told["seeds"] > 1
        else ""
    )
    cells = told["shared_by_all"]["sensitivity_cells"]
    before = (
        f"{cells} sensitivity cell{' was' if cells == 1 else 's were'} measured before the searches, once for all "
        f"agents ({escaped(told['shared_by_all']['file'])}), and count as no agent's evaluations."
        if cells
        else "No sensitivity was measured before the searches."
    )
    return (
        f"<section><h2>What can be told</h2><p class='caption'>{noise}All searches share one task and one validation "
        f"split, on which the dense network ({quantity(dense['macs'])} MACs) has "
        f"{measured(dense['accuracy'], dense['accuracy_se'])}; that split's own noise is the same for all, and "
        f"choosing on it flatters every pick. {before}</p><ul class='words'>{said}</ul></section>"
    )


def _table(told: Mapping[str, Any]) -> str:
    picked = told["differences"]["picked"] or {"to_random": []}
    to_random = {one["agent"]: one for one in picked["to_random"]}
    finals = [key for key in ("finetuned", "test") if key in told["table"][0]]
    headings = ["Agent", "Picked, %", "Δ random", "Hypervolume", "Evaluations to 99 %", "Asked for", "Time"]
    headings += [{"finetuned": "Fine-tuned, %", "test": "Test, %"}[key] for key in finals]
    rows = []
    for row in told["table"]:
        difference = to_random.get(row["agent"])
        cells = [
            escaped(row["agent"]),
            _spread(row["accuracy"], _points),
            "" if difference is None else signed(difference["mean"]),
            _spread(row["hypervolume"], lambda value: f"{value:.3f}"),
            _range(row["evaluations_to_99"]),
            f"{row['evaluations']['mean']:.0f}",
            duration(row["seconds"]["mean"]),
            *(_spread(row[key], _points) for key in finals),
        ]
        rows.append(("picked" if row is told["table"][0] else "", cells))
    recipe = told.get("finalized")
    tuned = ""
    if recipe:
        tuned = f" Every pick was then fine-tuned for {escaped(str(recipe['epochs']))} epochs at lr {recipe['lr']:g}"
        dense = recipe.get("dense_test")
        tuned += (
            f", and the test split read once for all of them; the dense network has "
            f"{measured(dense['accuracy'], dense['accuracy_se'])} there."
            if dense
            else "."
        )
    return (
        "<section><h2>Agents</h2><p class='caption'>Means over seeds, with intervals of 95&nbsp;%. Picked: the most "
        "accurate policy within the budget that the agent itself proposed. Evaluations to 99&nbsp;%: until the best "
        "so far had that share of its final accuracy, from the least to the most over seeds. Time: what the agent and "
        f"its evaluations take one after another, though a policy that several ask for is evaluated once.{tuned}</p>"
        f"{html_table(headings, rows)}</section>"
    )


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _in_brackets(interval: Mapping[str, Any]) -> str:
    if interval["low"] is None:
        return percent(interval["mean"])
    return f"{percent(interval['mean'])} ({_points(interval['low'])} to {_points(interval['high'])})"


def _range(several: Mapping[str, Any]) -> str:
    """Return a mean of counts, and how far they go: an interval would be below 0."""
    least, most = min(several["values"]), max(several["values"])
    return f"{several['mean']:.0f}" + (f"<small>{least} to {most}</small>" if len(several["values"]) > 1 else "")


def _spread(interval: Mapping[str, Any], text: Callable[[float], str]) -> str:
    mean = text(interval["mean"])
    if interval["low"] is None:
        return mean
    return f"{mean}<small>{text(interval['low'])} to {text(interval['high'])}</small>"


def _signed_volume(difference: float) -> str:
    text = f"{difference:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", MINUS)


def _differences(told: Mapping[str, Any], key: str, title: str, measure: str, text: Callable[[float], str]) -> str:
    found = told["differences"][key]
    if not found:
        return ""
    shown = [*found["to_random"], *(found["to_best"] if found["best"] != "random" else ())]
    rows = []
    for one in shown:
        known = one["low"] is not None
        rows.append(
            (
                "",
                [
                    escaped(one["agent"]),
                    escaped(one["other"]),
                    text(one["mean"]),
                    f"{text(one['low'])} to {text(one['high'])}" if known else "",
                    f"{one['p']:.3f}" if known else "",
                    f"{one['p_holm']:.3f}" if known else "",
                    ("more than noise" if one["clear"] else "within the noise") if known else "not known",
                ],
            )
        )
    best = f", and against {escaped(found['best'])}, the best here, which is found out by these same numbers"
    headings = ["Agent", "Compared with", "Δ", "95 % interval", "p", "p, Holm", "Verdict"]
    return (
        f"<section><h2>{title}</h2><p class='caption'>{measure}, in pairs by seed; against "
        f"random{best if found['best'] != 'random' else ''}.</p>"
        f"{html_table(headings, rows, text_columns=(0, 1, 6))}</section>"
    )
