"""Numbers and findings in words, as plain text: formats with units, and the verdicts, honest about noise."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoprune.report.data import Run

__all__ = [
    *("bytes_text", "findings", "headline", "measured", "percent", "points", "precision", "promoted", "quantity"),
    *("share", "signed", "spared", "tau"),
]

SPACE = "\u202f"  # narrow, and not broken over lines: 41.0 M
MINUS = "\u2212"
CLEAR = 2.0  # standard errors from which a difference is called more than noise


def percent(fraction: float, digits: int = 1) -> str:
    """Return 0.917 as "91.7 %"."""
    return f"{_minus(f'{100 * fraction:.{digits}f}')}{SPACE}%"


def measured(fraction: float, standard_error: float | None) -> str:
    """Return an accuracy with its standard error: "91.7 ± 0.4 %"."""
    if standard_error is None:
        return percent(fraction)
    return f"{100 * fraction:.1f}{SPACE}±{SPACE}{100 * standard_error:.1f}{SPACE}%"


def signed(difference: float) -> str:
    """Return a difference of two fractions in points, with its sign: 0.004 as "+0.4"."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else _minus(text)


def points(difference: float) -> str:
    """Return the size of a difference of two fractions: "0.6 points"."""
    text = f"{abs(100 * difference):.1f}"
    return f"{text} point" if text == "1.0" else f"{text} points"


def quantity(count: float) -> str:
    """Return a count with three significant digits: "41.0 M", "269 k", "730"."""
    return _scaled(count, ("", "k", "M", "G", "T")).strip()


def bytes_text(count: float) -> str:
    """Return a size in decimal units: "1.08 MB"."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def share(cost: float, dense: float | None) -> str:
    """Return a cost as a percentage of the dense cost, or nothing where that is not known."""
    return percent(cost / dense) if dense else ""


def headline(run: Run) -> str:
    """Return the result in one sentence."""
    picked, dense = run.picked, run.dense
    if run.result is None:
        return "The search has not finished, so nothing has been picked yet; this page shows what there is so far."
    if picked is None:
        return "The search has finished, but no candidate qualified, so nothing was picked."
    return (
        f"{percent(picked['accuracy'])} validation accuracy with {share(picked['macs'], dense['macs'])} of the MACs "
        f"and {share(picked['params'], dense['params'])} of the parameters; the dense network has "
        f"{percent(dense['accuracy'])}."
    )


def findings(run: Run) -> list[tuple[str, str]]:
    """Return what can and can't be concluded: pairs of a title and one or two sentences."""
    if run.result is None or run.picked is None:
        return []
    result, picked = run.result, run.picked
    found = [("Against uniform", _against_uniform(picked, result.get("uniform")))]
    found.append(("Against random", _against_random(picked, result.get("random"))))
    if result.get("predicted"):
        found.append(("Together and one by one", _prediction(picked, result["predicted"])))
    if result.get("latency"):
        found.append(("Time", _time(result["latency"])))
    line = run.line(picked["id"]) or {}
    if line.get("nonzero_params", line.get("params")) != line.get("params"):
        found.append(("Zeros in place", _zeros(line)))
    found.append(("Not seen by the search", _unseen(run)))
    if result.get("stopped"):
        found.append(("Stopped early", f"The search ended before its last candidate: {result['stopped']}."))
    if run.failures:
        count = len(run.failures)
        found.append(("Failed", f"{count} of {len(run.ledger)} candidates failed; the reasons are listed below."))
    return found


def tau(values: Sequence[float | None]) -> str:
    """Return Kendall's tau with its interval: "0.69 (0.57 to 0.80)"; nothing where it is not defined."""
    value, low, high = values
    if value is None:
        return ""
    return f"{value:.2f}" + ("" if low is None or high is None else f" ({low:.2f} to {high:.2f})")


def promoted(found: Mapping[str, Any]) -> str:
    """Return what share of the candidates was fine-tuned after the search, and what that rests on."""
    return (
        f"How many were fine-tuned was learnt from {found['candidates']} of them, tried from the best to the worst: "
        f"Kendall's tau is {tau(found['all'])} over all, and {tau([found['better'][0], None, None])} in the better "
        f"half. Relied on is {found['relied_on']:.2f}, the lower of the interval's bound and the better half's, so "
        f"that {percent(found['share'], 0)} of all went on: in {percent(found['holds'], 0)} of draws from a joint "
        "normal distribution with that tau the best of all is among them."
    )


def spared(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return what multiply-adds the cells of a sensitivity analysis took, or nothing where that is not known."""
    known = [cell["executed"] for group in groups for cell in group["cells"] if cell.get("executed") is not None]
    if not known:
        return ""
    text = f"{len(known)} cells took {percent(sum(known) / len(known), 0)} of the multiply-adds of as many whole passes"
    return f"{text}, passes for what was kept included. " if sum(known) < len(known) else f"{text}. "


def precision(run: Run) -> str:
    """Return in which precision candidates were measured, and why; nothing where that is not known."""
    if run.precision is None or "says" not in run.precision:
        return ""
    text, tried = f"Candidates were {run.precision['says']}", run.precision["trials"]
    if run.search.get("precision") == "auto" and not tried:
        return f"{text}: the network is too small, or samples are too few, for another to be worth trying."
    return f"{text}, {'the fastest that agrees with float32' if tried else 'as asked for'}."


def _time(latency: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the two networks took for one sample, and whether that is a difference."""
    dense, picked = latency["dense"], latency["picked"]
    times = " against ".join(f"{one['median_ms']:.3g} ms (spread {one['spread_ms']:.2g})" for one in (picked, dense))
    noise = (dense["spread_ms"] + picked["spread_ms"]) / 2
    if abs(dense["median_ms"] - picked["median_ms"]) <= noise:
        verdict = "no faster and no slower than the dense network, within the spread"
    else:
        verdict = f"{dense['median_ms'] / picked['median_ms']:.2f} times as fast as the dense network"
    return (
        f"One sample takes {times}: {verdict}. Median of {picked['repeats']} measured in turn on {picked['device']}, "
        f"{picked['threads']} thread{'s' if picked['threads'] > 1 else ''}."
    )


def _zeros(line: Mapping[str, Any]) -> str:
    """Return what masks did, which no clock sees."""
    return (
        f"{percent(1 - line['nonzero_params'] / line['params'])} of the parameters that are left are zero, and take "
        f"part in {percent(1 - line['nonzero_macs'] / line['macs'])} of the MACs. That is theoretical: no speed-up in "
        "dense execution."
    )


def _against_uniform(picked: Mapping[str, Any], uniform: Mapping[str, Any] | None) -> str:
    if uniform is None:
        return "Uniform pruning at the same cost was not measured, so nothing shows that searching was worth it."
    if uniform["id"] == picked["id"]:
        return "The search found nothing better: the picked candidate is the uniform one."
    cost = f"uniform pruning at the same cost ({quantity(uniform['macs'])} MACs)"
    return _comparison(picked, uniform, cost)


def _against_random(picked: Mapping[str, Any], random: Mapping[str, Any] | None) -> str:
    if not random or not random["size"] or random["best"] is None:
        return "There was no random control, so luck is not ruled out."
    best, size = random["best"], random["size"]
    if best["id"] == picked["id"]:
        return f"The search found nothing better: the picked candidate is one of the {size} random ones."
    text = _comparison(picked, best, "a single random policy" if size == 1 else f"the best of {size} random policies")
    return f"{text} The control is small: the search had more tries."


def _comparison(picked: Mapping[str, Any], other: Mapping[str, Any], name: str) -> str:
    """Return the difference of two accuracies against its standard error, and what follows."""
    if picked["fidelity"] != other["fidelity"]:
        return (
            f"Not comparable with {name}: the picked candidate was measured after '{picked['fidelity']}' recovery, "
            f"the other after '{other['fidelity']}'."
        )
    difference = picked["accuracy"] - other["accuracy"]
    error = math.hypot(picked["accuracy_se"], other["accuracy_se"])
    if abs(difference) < 5e-4:
        return f"As accurate as {name}: no advantage is shown."
    lead = f"{points(difference)} {'above' if difference > 0 else 'below'} {name}"
    if error == 0.0:
        return f"{lead}; how much of that is noise is not known."
    ratio = abs(difference) / error
    if ratio < CLEAR:
        return f"{lead}, {ratio:.1f} standard errors of the difference: within the noise of this validation set."
    return f"{lead}, {ratio:.1f} standard errors of the difference: more than noise explains."


def _prediction(picked: Mapping[str, Any], predicted: Mapping[str, Any]) -> str:
    expected, gap = predicted["accuracy"], predicted["gap"]
    joint = expected + gap
    if abs(gap) < 5e-4:
        verdict = "the losses simply add up"
    elif gap < 0:
        verdict = f"pruning the groups together costs {points(gap)} more than the curves suggest"
    else:
        verdict = f"pruning the groups together costs {points(gap)} less than the curves suggest"
    text = (
        f"The one-group curves predict {percent(expected)} for this policy, measured together it has {percent(joint)}"
    )
    if picked["fidelity"] in ("short", "full"):
        text += " before fine-tuning"
        verdict += f"; recovery ({picked['fidelity']}) then brings it to {percent(picked['accuracy'])}"
    return f"{text}: {verdict}."


def _unseen(run: Run) -> str:
    if run.final and "test" not in run.final:
        val = measured(run.final["val"]["accuracy"], run.final["val"]["accuracy_se"])
        return (
            f"After full fine-tuning ({run.final['epochs']} epochs) the validation set, which the picked candidate was "
            f"chosen on, gives {val}; no test set has been read."
        )
    if run.final:
        final = run.final
        text = (
            f"After full fine-tuning ({final['epochs']} epochs) the test set, read once, gives "
            f"{measured(final['test']['accuracy'], final['test']['accuracy_se'])}"
        )
        dense = final.get("dense_test")
        return (
            f"{text}; the dense network has {measured(dense['accuracy'], dense['accuracy_se'])}."
            if dense
            else f"{text}."
        )
    return (
        f"The picked candidate was chosen among {len(run.rows)} on these very validation images, which flatters it a "
        "little; the test set, which would not, has not been read yet."
    )


def _scaled(count: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(count) >= 999.5 and power < len(units) - 1:
        count, power = count / 1000.0, power + 1
    digits = 0 if power == 0 else max(0, 2 - int(math.log10(abs(count))))
    return f"{_minus(f'{count:.{digits}f}')}{SPACE}{units[power]}"


def _minus(text: str) -> str:
    return text.replace("-", MINUS)
