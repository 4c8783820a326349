"""The HTML page of a run: its words and tables, and writing it. The figures come from `figures.py`.

All text that comes from a run is escaped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io

from autoprune.report.data import Run, read_run
from autoprune.report.figures import figures
from autoprune.report.parts import (
    CONFIG,
    coded,
    document,
    duration,
    escaped,
    figure_section,
    html_table,
    settings_section,
    write_page,
)
from autoprune.report.wording import (
    bytes_text,
    findings,
    headline,
    measured,
    percent,
    precision,
    promoted,
    quantity,
    share,
    signed,
    spared,
    tau,
)

__all__ = ["figure_files", "page", "write_report"]

ABSENT = {
    "ledger.jsonl": "No candidate has been evaluated yet.",
    "sensitivity.json": "The groups have not been analysed; `autoprune sensitivity` does that.",
    "front.json": "The search has not written its front; what is drawn here is the front of the ledger so far.",
    "result.json": "The search has not finished, so no candidate is picked; start it again to go on.",
    "final.json": "The picked candidate has not been fine-tuned fully; `autoprune finalize` does that.",
}

KNOWN = {
    "predicted": "Predicted from moments, nothing evaluated",
    "sensitivity": "Drops of single groups, added up",
    "recalibrated": "Recalibrated",
    "reconstructed": "Reconstructed",
}

LOWEST = "The lowest marks may lie below the axis: drag to zoom, double-click to see all."


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder, from the files that lie there, and return its path.

    Raises:
        RunError: The folder is not a run, one of its files can't be read, or the page can't be written.
    """
    return write_page(run / "report.html", page(read_run(run)))


def figure_files(run: Path, folder: Path) -> list[Path]:
    """Write each figure of a run as an HTML file, with one plotly.min.js beside them all, and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures(read_run(run)).items():
        path = folder / f"{name}.html"
        path.write_text(plotly.io.to_html(figure, config=CONFIG, include_plotlyjs="directory"), encoding="utf-8")
        paths.append(path)
    library = folder / "plotly.min.js"
    library.write_text(plotly.offline.get_plotlyjs(), encoding="utf-8")
    return [*paths, library]


def page(run: Run) -> str:
    """Return the whole page."""
    drawn = figures(run)
    sections = [
        _header(run),
        _result(run),
        _front(run, drawn),
        _policy(run, drawn),
        _progress(run, drawn),
        _fidelity(run),
        _sensitivity(run, drawn),
        _groups(run),
        _locked(run),
        _failures(run),
        settings_section(
            {key.capitalize(): run.config.get(key) or {} for key in ("task", "search", "versions")}, precision(run)
        ),
    ]
    return document(f"{_title(run)} · autoprune", sections, drawn)


# ----------------------------------------------------------------------------------------------------------- sections


def _header(run: Run) -> str:
    tiles = ""
    if run.picked:
        picked, dense = run.picked, run.dense
        change = signed(picked["accuracy"] - dense["accuracy"])
        tiles = "".join(
            f"<div class='tile'><dt>{label}</dt><dd>{value}</dd><dd class='note'>{note}</dd></div>"
            for label, value, note in (
                ("Accuracy", percent(picked["accuracy"]), f"{change} points, dense {percent(dense['accuracy'])}"),
                *(
                    (label, text(picked[key]), f"{share(picked[key], dense[key])} of {text(dense[key])}")
                    for label, key, text in (
                        ("MACs", "macs", quantity),
                        ("Parameters", "params", quantity),
                        ("Weights on disk", "bytes", bytes_text),
                    )
                ),
            )
        )
        tiles = f"<dl class='tiles'>{tiles}</dl>"
    return (
        f"<header><p class='eyebrow'>autoprune · {escaped(run.name)}</p><h1>{escaped(_title(run))}</h1>"
        f"<p class='lead'>{escaped(headline(run))}</p>{tiles}</header>"
    )


def _result(run: Run) -> str:
    notes = "".join(f"<li>{coded(ABSENT[name])}</li>" for name in run.missing)
    notes = f"<ul class='absent'>{notes}</ul>" if notes else ""
    if not run.result or not run.picked:
        return f"<section><h2>State of the run</h2>{notes}</section>" if notes else ""
    result, dense, picked = run.result, run.dense, run.picked
    rows = [_compared(run, "Dense", dense), _compared(run, "Picked", picked, css="picked")]
    if result.get("uniform"):
        rows.append(_compared(run, "Uniform at the same cost", result["uniform"]))
    random = result.get("random") or {}
    if random.get("best"):
        label = "Random, one policy" if random["size"] == 1 else f"Random, best of {random['size']}"
        rows.append(_compared(run, label, random["best"]))
    table = html_table(
        ["", "Accuracy", "Δ points", "MACs", "of dense", "Parameters", "of dense", "Size", "Recovery"],
        rows,
        text_columns=(0, 8),
    )
    found = "".join(f"<div><dt>{escaped(title)}</dt><dd>{coded(text)}</dd></div>" for title, text in findings(run))
    searched = result.get("dense_as_searched")
    other = f" In float32; figures and sensitivity are in {escaped(searched['precision'])}." if searched else ""
    effort = f"{result['evaluations']} evaluations"
    if result.get("seconds"):
        effort += f", {duration(result['seconds'])}"
    return (
        f"<section><h2>Dense against picked</h2><p class='caption'>Picked: {escaped(picked['rule'])}, by "
        f"{escaped(result['agent'])} in {escaped(effort)}. Accuracy is that of the validation set, ± one standard "
        "error; the error of a difference takes both as independent, which on the same images overstates it."
        f"{other}</p>{table}{_final_table(run)}<dl class='findings'>{found}</dl>{notes}</section>"
    )


def _compared(run: Run, label: str, item: Mapping[str, Any], css: str = "") -> tuple[str, list[str]]:
    """Return one line of the comparison; the dense network has no id and is not compared with itself."""
    dense = run.dense
    line = run.line(item["id"]) if "id" in item else item
    return css, [
        escaped(label),
        measured(item["accuracy"], item.get("accuracy_se")),
        signed(item["accuracy"] - dense["accuracy"]) if "id" in item else "",
        quantity(item["macs"]),
        share(item["macs"], dense["macs"]),
        quantity(item["params"]),
        share(item["params"], dense["params"]),
        bytes_text(line["bytes"]) if line else "",
        escaped(item["fidelity"]) if "id" in item else "",
    ]


def _final_table(run: Run) -> str:
    if not run.final:
        return ""
    rows = [
        ("", [label, measured(run.final[key]["accuracy"], run.final[key]["accuracy_se"])])
        for label, key in (
            ("Picked, validation set", "val"),
            ("Picked, test set", "test"),
            ("Dense, test set", "dense_test"),
        )
        if run.final.get(key)
    ]
    epochs = escaped(str(run.final["epochs"]))
    return html_table([f"After full fine-tuning ({epochs} epochs)", "Accuracy"], rows, css="narrow")


def _front(run: Run, drawn: Mapping[str, go.Figure]) -> str:
    size = len(run.finalists or run.rows)
    volume = f" Hypervolume of the front: {run.front['hypervolume']:.3f} of at most 1." if run.front else ""
    return figure_section(
        drawn,
        "front",
        "The front",
        f"Up and to the left is better. Each mark is one of {size} measured candidates{_left_behind(run)}; the line "
        "joins those that no other beats in accuracy and MACs (marks on the front beside the line owe their place to "
        "fewer parameters). "
        f"Point at a mark to read its policy: the share of each group that is removed. {LOWEST}{volume}",
    )


def _left_behind(run: Run) -> str:
    """Return what became of candidates that are not in the figure of the front."""
    if not run.finalists or run.result is None:
        return ""
    rungs = run.result["rungs"]
    steps = " and ".join(f"{rung['candidates']} for {rung['steps']}" for rung in rungs[1:])
    return f", the best of {rungs[0]['candidates']}: {steps} gradient steps"


def _policy(run: Run, drawn: Mapping[str, go.Figure]) -> str:
    text = "The share of each group that the picked candidate removes, in the order of execution, and the widths."
    if run.picked and run.widths(run.picked):
        widths = run.widths(run.picked)
        most, least = max(widths, key=lambda width: width.sparsity), min(widths, key=lambda width: width.sparsity)
        text += (
            f" Most goes from {most.group} ({percent(most.sparsity, 0)}), least from {least.group} "
            f"({percent(least.sparsity, 0)})."
        )
        if run.result and run.result.get("uniform"):
            text += " The green stroke is uniform pruning at the same cost."
    return figure_section(drawn, "policy", "What is removed where", text)


def _progress(run: Run, drawn: Mapping[str, go.Figure]) -> str:
    return figure_section(
        drawn,
        "progress",
        "Progress of the search",
        "The best candidate so far against the number of candidates. A line that still improves at the end asks for a "
        "longer search; one that stays worse than the dashed line has found nothing better than uniform pruning. "
        f"{LOWEST}",
    )


def _fidelity(run: Run) -> str:
    result = run.result or {}
    found = result.get("fidelity") or []
    learnt = result.get("promoted")
    if not found and not learnt:
        return ""
    rows = []
    for one in found:
        known, last = _stage(one["known"], one.get("steps")), _stage(one["last"], one.get("last_steps"))
        seconds = [_seconds(one.get(key)) for key in ("seconds", "last_seconds")]
        taus = [tau(one["all"]), tau(one["better"])]
        rows.append(("", [known, seconds[0], last, seconds[1], str(one["candidates"]), *taus]))
    headings = ["Known", "Time each", "Compared with", "Time each", "Candidates", "All", "Better half"]
    table = html_table(headings, rows, text_columns=(0, 2)) if rows else ""
    said = f"<p class='caption'>{escaped(promoted(learnt))}</p>" if learnt else ""
    return (
        "<section><h2>How well cheap knowledge ranks</h2><p class='caption'>Kendall's tau between what is known early "
        "of a candidate and its accuracy at a later rung, over the candidates that reached it, and over the better "
        "half of them: 1 is the same order, 0 is none. In brackets, bootstrap intervals of 95&nbsp;%. Time each: "
        "what a candidate took from the dense network to there, median, where it is known.</p>"
        f"{said}{table}</section>"
    )


def _stage(name: str, steps: int | None) -> str:
    """Return where something is known of a candidate, in words."""
    return escaped(f"Fine-tuned, {steps} steps" if name == "short" and steps else KNOWN.get(name, name))


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s" if value < 10 else duration(value)


def _sensitivity(run: Run, drawn: Mapping[str, go.Figure]) -> str:
    if "curves" not in drawn:
        return ""
    at_half = [(cell, group) for group in run.groups if (cell := _cell_near(group, 0.5))]
    ranked = sorted(at_half, key=lambda pair: pair[0]["accuracy"])
    recovered = run.search.get("recover", "recovered")
    text = f"Each group pruned alone, all others dense; {recovered}, not fine-tuned. "
    if len(ranked) > 1:
        (low, first), (high, last) = ranked[0], ranked[-1]
        dense = run.dense_as_searched["accuracy"]
        text += (
            f"Near half removed, {first['name']} loses most ({signed(low['accuracy'] - dense)} points) and "
            f"{last['name']} least ({signed(high['accuracy'] - dense)}). "
        )
    text += spared(run.groups)
    curves = figure_section(
        drawn,
        "curves",
        "Sensitivity of each group",
        text
        + "Across: elements removed; all panels share their axes. The switch shows the loss (log scale) beside what "
        "one pass of first-order Taylor predicts; and what the moments of the layers' inputs predict without an "
        "evaluation: the share of the network's output that is lost after the best compensation (log scale).",
    )
    heat = figure_section(
        drawn,
        "heatmap",
        "Sensitivity at a glance",
        "Points of accuracy lost, darker is worse. A dark cell far left marks a group to leave alone; a row that stays "
        "light can give up much.",
    )
    return curves + heat


def _groups(run: Run) -> str:
    if not run.groups:
        return ""
    widths = {width.group: width for width in run.widths(run.picked)} if run.picked else {}
    dense = run.dense_as_searched["accuracy"]
    rows = []
    for group in run.groups:
        cell = _cell_near(group, 0.5)
        coupled = [layer for layer in group["layers"] if layer != group["name"]]
        also = f"<small>with {escaped(', '.join(coupled))}</small>" if coupled else ""
        rows.append(
            (
                "",
                [
                    f"{escaped(group['name'])}{also}",
                    escaped(group["kind"]),
                    escaped(str(group["size"])),
                    percent(group["macs_share"]),
                    f"{signed(cell['accuracy'] - dense)} at {percent(cell['sparsity'], 0)}" if cell else "",
                    _largest_harmless(group, dense),
                    widths[group["name"]].text if group["name"] in widths else "",
                ],
            )
        )
    headings = ["Group", "Kind", "Size", "MACs share", "Δ points", "Within 1 point", "Picked width"]
    return (
        "<section><h2>Groups</h2><p class='caption'>Layers that can only be pruned together are one group. MACs share: "
        "what the layers that write or read the group cost (shares overlap, so they do not add up to 100&nbsp;%). "
        "Within 1 point: the largest measured sparsity of the group alone that loses no more than that.</p>"
        f"{html_table(headings, rows, text_columns=(0, 1))}</section>"
    )


def _locked(run: Run) -> str:
    if not run.locked:
        return ""
    rows = [
        ("", [escaped(g["name"]), escaped(g["kind"]), escaped(str(g["size"])), escaped(g["reason"])])
        for g in run.locked
    ]
    table = html_table(["Elements", "Kind", "Size", "Reason"], rows, text_columns=(0, 1, 3))
    return (
        "<section><h2>What can't be pruned</h2><p class='caption'>Not measured and not ranked: these are not robust, "
        f"they are out of reach.</p>{table}</section>"
    )


def _failures(run: Run) -> str:
    if not run.failures:
        return ""
    rows = [("", [str(line["number"]), escaped(line["id"]), escaped(str(line["failure"]))]) for line in run.failures]
    return (
        "<section><h2>Failed candidates</h2><p class='caption'>Recorded and left out of every figure.</p>"
        f"{html_table(['Number', 'Candidate', 'Reason'], rows, text_columns=(0, 1, 2))}</section>"
    )


# -------------------------------------------------------------------------------------------------------------- parts


def _title(run: Run) -> str:
    task: Mapping[str, Any] = run.config.get("task") or {}
    return str(task.get("name") or run.name)


def _cell_near(group: Mapping[str, Any], sparsity: float) -> Mapping[str, Any] | None:
    cells: Sequence[Mapping[str, Any]] = group["cells"]
    return min(cells, key=lambda cell: abs(cell["sparsity"] - sparsity), default=None)


def _largest_harmless(group: Mapping[str, Any], dense: float) -> str:
    """Return the sparsity up to which every measured one loses at most a point."""
    largest = 0.0
    for cell in group["cells"]:
        if dense - cell["accuracy"] > 0.01 + 1e-9:
            break
        largest = cell["sparsity"]
    return percent(largest, 0) if group["cells"] else ""
