"""The report: a plausible run folder made by formulas, its page as text, and the page drawn in a real browser."""

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest

from autoprune.errors import RunError
from autoprune.evaluation.precision import Choice, Precision, Trial
from autoprune.pareto import front
from autoprune.report import figure_files, write_report
from autoprune.report.data import read_run
from autoprune.report.figures import figures
from autoprune.report.page import ABSENT
from autoprune.report.progress import Progress, progress
from autoprune.report.wording import bytes_text, findings, measured, percent, quantity, share, signed

PLAIN, ROUNDED = Precision("float32", True), Precision("bfloat16", True)
FIGURES = ("front", "policy", "progress", "curves", "heatmap")


def noise(*key: int) -> float:
    """A repeatable number in [-1, 1)."""
    return 2 * math.modf(abs(math.sin(1 + sum(97.13 * (i + 1) * k for i, k in enumerate(key)))) * 43758.5453)[0] - 1


def group_names(stages: int, blocks: int) -> list[str]:
    names = ["conv1"]
    for stage in range(1, stages + 1):
        for block in range(blocks):
            names.append(f"layer{stage}.{block}.conv1")
            if stage > 1 and block == 0:
                names.append(f"layer{stage}.{block}.conv2")
    return names


class Demo:
    """A made-up network whose accuracy falls smoothly with what is removed, and everything a search writes about it."""

    accuracy, macs, params, se = 0.923, 41_000_000, 270_000, 0.0038

    def __init__(self, stages: int = 3, blocks: int = 3, candidates: int = 40, hostile: str = "") -> None:
        self.title = hostile or "resnet20 on cifar10"
        self.names = [hostile + group for group in group_names(stages, blocks)]
        self.sizes = {group: 16 * 2 ** (3 * index // len(self.names)) for index, group in enumerate(self.names)}
        self.weights = {group: 0.03 + 0.28 * abs(noise(index)) ** 2 for index, group in enumerate(self.names)}
        self.candidates = candidates

    def drop(self, group: str, sparsity: float) -> float:
        return self.weights[group] * (math.exp(2.6 * sparsity) - 1) / 6

    def sensitivity(self) -> dict:
        groups = []
        for index, group in enumerate(self.names):
            cells = []
            for step in range(1, 10):
                removed = min(round(step / 10 * self.sizes[group]), self.sizes[group] - 1)
                sparsity = removed / self.sizes[group]
                lost = self.drop(group, sparsity) * (1 + 0.08 * noise(index, step)) + 0.002 * noise(index, step, 5)
                cells.append(
                    {
                        "sparsity": sparsity,
                        "removed": removed,
                        "accuracy": self.accuracy - lost,
                        "accuracy_se": self.se * (1 + lost),
                        "loss": 0.26 + 4 * lost + 3 * lost**2,
                        "loss_se": 0.01 + 0.06 * lost,
                        "drop_se": 0.4 * self.se,
                        "taylor_loss": 0.26 + 2.5 * self.weights[group] * sparsity,
                        "executed": 1 - 0.5 * index / len(self.names),
                    }
                )
            groups.append(
                {
                    "name": group,
                    "kind": "channels",
                    "size": self.sizes[group],
                    "layers": [group, group.replace("conv", "downsample")] if index % 4 == 0 else [group],
                    "prunable": True,
                    "reason": None,
                    "macs_share": 1.4 / len(self.names),
                    "cells": cells,
                }
            )
        locked = {"size": 10, "kind": "channels", "prunable": False, "macs_share": 0.0, "cells": []}
        reason = "its elements are the network's output"
        groups.append({"name": "linear", "layers": ["linear"], "reason": reason, **locked})
        return {
            "format": 1,
            "digest": {"network": "a", "weights": "b", "data": "c"},
            "settings": {"criterion": "l1", "calibration_images": 2000, "seed": 0},
            "dense": {"accuracy": self.accuracy, "accuracy_se": self.se, "loss": 0.26, "loss_se": 0.01},
            "groups": groups,
        }

    def line(self, number: int, arm: str, sparsities: list[float]) -> dict:
        removed = {
            group: min(round(sparsity * self.sizes[group]), self.sizes[group] - 1)
            for group, sparsity in zip(self.names, sparsities, strict=True)
        }
        policy = {group: count / self.sizes[group] for group, count in removed.items()}
        mean = sum(policy.values()) / len(policy)
        lost = 0.9 * sum(self.drop(group, sparsity) for group, sparsity in policy.items())
        measurements = []
        for fidelity, factor in (("recalibrated", 0.5), ("short", 0.12)):
            accuracy = max(0.1, self.accuracy - factor * lost + 0.003 * noise(number, len(fidelity)))
            measurements.append(
                {
                    "fidelity": fidelity,
                    "accuracy": accuracy,
                    "accuracy_se": self.se,
                    "loss": 0.3 + lost,
                    "loss_se": 0.01,
                }
            )
        return {
            "number": number,
            "id": f"{number:012x}",
            "arm": arm,
            "agent": "tpe",
            "policy": policy,
            "removed": removed,
            "macs": round(self.macs * (1 - mean) ** 1.7),
            "params": round(self.params * (1 - mean) ** 1.6 * (1 + 0.1 * noise(number, 9))),
            "bytes": round(4.1 * self.params * (1 - mean) ** 1.6),
            "measurements": measurements,
            "seconds": 4.1,
            "failure": None,
        }

    def ledger(self) -> list[dict]:
        mean = 0.34
        lines = [self.line(0, "uniform", [mean] * len(self.names))]
        spread = range(len(self.names))
        lines += [self.line(n, "random", [0.36 + 0.34 * noise(n, i) for i in spread]) for n in range(1, 7)]
        for number in range(7, 7 + self.candidates):
            learnt = min(1.0, (number - 7) / self.candidates) * 1.2
            sparsities = [
                mean + 0.25 * noise(number, 3) + learnt * 1.6 * (0.12 - self.weights[group]) + 0.2 * noise(number, i, 1)
                for i, group in enumerate(self.names)
            ]
            lines.append(self.line(number, "search", [min(max(s, 0.0), 0.9) for s in sparsities]))
        lines[10] |= {"measurements": [], "failure": "loss is not finite (nan) after 50 steps"}
        return lines

    def write(self, folder: Path, **search: object) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.ledger()
        measured = [line | line["measurements"][-1] for line in lines if line["measurements"]]
        of_search = [line for line in measured if line["arm"] == "search" and line["macs"] <= 0.5 * self.macs]
        picked = max(of_search, key=lambda line: line["accuracy"])
        random = max((line for line in measured if line["arm"] == "random"), key=lambda line: line["accuracy"])
        dense = {"macs": self.macs, "params": self.params, "bytes": 1_083_000, "accuracy": self.accuracy, "loss": 0.26}
        kept = ("id", "policy", "removed", "accuracy", "accuracy_se", "macs", "params", "bytes", "fidelity")
        recalibrated = picked["measurements"][0]["accuracy"]
        self.files = {
            "config.json": {
                "format": 1,
                "task": {
                    "name": self.title,
                    "model": {"name": "resnet20", "num_classes": 10},
                    "train": 45000,
                    "val": 5000,
                    "metric": "autoprune.task.top1",
                },
                "search": {
                    "agent": "tpe",
                    "space": "group",
                    "budget": "macs<=50%",
                    "max_drop": None,
                    "candidates": self.candidates,
                    "control": 6,
                    "seed": 3,
                    "criterion": "l1",
                    "finetune_steps": 50,
                }
                | search,
                "versions": {"autoprune": "0.1.0", "torch": "2.15.0", "plotly": "7.1.0"},
            },
            "sensitivity.json": self.sensitivity(),
            "front.json": {
                "objectives": ["accuracy", "macs", "params"],
                "reference": {"accuracy": 0.0, "macs": self.macs, "params": self.params},
                "hypervolume": 0.41,
                "points": [{key: picked[key] for key in kept if key != "removed"} | {"arm": "search"}],
            },
            "result.json": {
                "agent": "tpe",
                "evaluations": len(lines),
                "candidates": self.candidates,
                "seconds": 274.0,
                "stopped": None,
                "dense": dense | {"accuracy_se": self.se},
                "budget": "macs<=50%",
                "max_drop": None,
                "picked": {key: picked[key] for key in kept} | {"rule": "most accurate within macs<=50%"},
                "uniform": {key: measured[0][key] for key in kept if key not in ("policy", "removed", "bytes")},
                "random": {"size": 6, "best": {key: random[key] for key in kept}},
                "predicted": {"accuracy": recalibrated + 0.021, "gap": -0.021},
                "fidelity": [
                    {"known": "predicted", "steps": 0, "seconds": None, "last": "reconstructed", "last_steps": 0}
                    | {"last_seconds": 1.184, "candidates": 30}
                    | {"all": [0.512, 0.31, 0.68], "better": [None, None, None]},
                    {"known": "short", "steps": 50, "seconds": 15.31, "last": "short", "last_steps": 200}
                    | {"last_seconds": 244.8, "candidates": 9}
                    | {"all": [0.7, 0.6, 0.8], "better": [0.3, None, None]},
                    {"known": "<b>", "last": "short", "candidates": 30}
                    | {"all": [0.7, 0.6, 0.8], "better": [0.3, None, None]},
                ],
                "promoted": {"known": "recalibrated", "steps": 0, "last": "short", "last_steps": 50, "candidates": 12}
                | {"all": [0.69, 0.351, 0.92], "better": [0.33, 0.1, 0.6], "relied_on": 0.33}
                | {"share": 0.5, "holds": 0.888},
            },
            "final.json": {
                "epochs": 10,
                "val": {"accuracy": 0.921, "accuracy_se": 0.0038},
                "test": {"accuracy": 0.9148, "accuracy_se": 0.0028},
                "dense_test": {"accuracy": 0.9226, "accuracy_se": 0.0027},
            },
        }
        for name, content in self.files.items():
            (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return folder


class Outline(HTMLParser):
    """Counts a page's elements, collects its visible text, and notes every address it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(text)
        self.text = re.sub(r"[ \n]+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.inside = tag
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.words.append(data)


def outline(run: Path) -> Outline:
    return Outline(write_report(run).read_text(encoding="utf-8"))


def changed(run: Path, name: str, **values: object) -> Path:
    content = json.loads((run / name).read_text(encoding="utf-8"))
    (run / name).write_text(json.dumps(content | values), encoding="utf-8")
    return run


@pytest.fixture
def demo() -> Demo:
    return Demo(blocks=1, candidates=12)


@pytest.fixture
def run(demo: Demo, tmp_path: Path) -> Path:
    return demo.write(tmp_path / "run")


class TestContents:
    def test_headline_numbers(self, demo, run):
        page = outline(run)
        picked = demo.files["result.json"]["picked"]
        for number in (
            "resnet20 on cifar10",
            measured(picked["accuracy"], picked["accuracy_se"]),
            measured(0.923, 0.0038),
            signed(picked["accuracy"] - 0.923),
            quantity(picked["macs"]),
            share(picked["macs"], 41_000_000),
            bytes_text(demo.ledger()[0]["bytes"]),
            "41.0\u202fM",
            "270\u202fk",
            "1.08\u202fMB",
            "Random, best of 6",
            "most accurate within macs<=50%",
            "91.5\u202f±\u202f0.3\u202f%",
        ):
            assert number in page.text

    def test_every_group_is_in_the_table_with_its_coupled_layers_and_width(self, demo, run):
        page = outline(run)
        removed = demo.files["result.json"]["picked"]["removed"]
        for group in demo.names:
            assert group in page.text
            assert f"{demo.sizes[group]} → {demo.sizes[group] - removed[group]}" in page.text
        assert "with downsample1" in page.text

    def test_it_says_which_numbers_are_in_which_precision(self, run):
        assert "In float32" not in outline(run).text
        before = read_run(run)
        changed(run, "result.json", dense_as_searched={"precision": "bfloat16", "accuracy": 0.925})
        assert "overstates it. In float32; figures and sensitivity are in bfloat16." in outline(run).text
        found = read_run(run)
        assert found.dense == before.dense == before.dense_as_searched
        star = next(trace for trace in figures(found)["front"].data if trace.name == "dense")
        assert star.y == pytest.approx((92.5,))

    def test_how_well_cheap_knowledge_ranks(self, run):
        text = outline(run).text
        assert "Predicted from moments, nothing evaluated Reconstructed 1.18 s 30 0.51 (0.31 to 0.68)" in text
        assert "Fine-tuned, 50 steps 15 s Fine-tuned, 200 steps 4 min 9 0.70 (0.60 to 0.80) 0.30" in text
        assert "<b> short 30 0.70 (0.60 to 0.80) 0.30" in text

    def test_what_share_was_promoted_and_why(self, run):
        text = outline(run).text
        assert "learnt from 12 of them, tried from the best to the worst: Kendall's tau is 0.69 (0.35 to 0.92)" in text
        assert "0.33 in the better half. Relied on is 0.33" in text
        assert "so that 50\u202f% of all went on: in 89\u202f% of draws" in text
        changed(run, "result.json", fidelity=[])
        assert "so that 50\u202f% of all went on" in outline(run).text

    def test_what_the_cells_took(self, demo, run):
        groups = len(demo.names)
        share = percent(sum(1 - 0.5 * index / groups for index in range(groups)) / groups, 0)
        said = f"cells took {share} of the multiply-adds of as many whole passes, passes for what was kept included"
        assert f"{9 * groups} {said}" in outline(run).text
        report = json.loads((run / "sensitivity.json").read_text())
        for group in report["groups"]:
            for cell in group["cells"]:
                cell["executed"] = 1.0 if group["name"] == "conv1" else None
        changed(run, "sensitivity.json", groups=report["groups"])
        assert "9 cells took 100\u202f% of the multiply-adds of as many whole passes." in outline(run).text

    @pytest.mark.parametrize(
        ("wanted", "choice", "said"),
        [
            ("float32", Choice(PLAIN, PLAIN), "measured in float32 channels-last, as asked for."),
            (
                "auto",
                Choice(PLAIN, PLAIN),
                "measured in float32 channels-last: the network is too small, or samples are",
            ),
            (
                "auto",
                Choice(ROUNDED, PLAIN, (Trial(PLAIN, 0.5, 0.0, 1.5), Trial(ROUNDED, 0.25, 0.002))),
                "measured in bfloat16 channels-last, trained in float32 channels-last (a thousand samples: float32 "
                "channels-last 0.50 s, training 1.50 s; bfloat16 channels-last 0.25 s, 0.2% differ), the fastest that "
                "agrees with float32.",
            ),
        ],
    )
    def test_in_which_precision_candidates_were_measured_and_why(self, demo, tmp_path, wanted, choice, said):
        run = demo.write(tmp_path / "run", precision=wanted)
        assert "Candidates were" not in outline(run).text
        (run / "precision.json").write_text(json.dumps(choice.to_dict()))
        assert f"Settings Candidates were {said}" in outline(run).text

    def test_finalists_are_the_candidates_of_the_front_and_it_says_of_how_many(self, demo, run):
        lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
        tuned = [line for line in lines if line["measurements"]][:5]
        late = {**tuned[0], "id": "feedfeedfeed", "number": 40, "arm": "uniform"}  # measured on the last rung alone
        (run / "finalists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [late, *tuned]))
        rungs = [{"steps": 0, "candidates": len(lines)}, {"steps": 50, "candidates": 6}]
        changed(run, "result.json", rungs=rungs, uniform={**demo.files["result.json"]["uniform"], "id": late["id"]})
        text = outline(run).text
        assert f"Each mark is one of 6 measured candidates, the best of {len(lines)}: 6 for 50 gradient steps" in text
        found = read_run(run)
        assert [row.id for row in found.finalists] == [line["id"] for line in [*tuned, late]]
        assert len(found.rows) == len([line for line in lines if line["measurements"] and not line["failure"]])
        assert found.line("feedfeedfeed") == late

    def test_lines_of_the_ledger_may_come_in_any_order(self, run):
        lines = (run / "ledger.jsonl").read_text().splitlines()
        before = read_run(run).rows
        (run / "ledger.jsonl").write_text("\n".join(reversed(lines)) + "\n")
        assert read_run(run).rows == before

    def test_of_a_few_candidates_nothing_is_said_about_ranks(self, run):
        changed(run, "result.json", fidelity=[], promoted=None)
        assert "How well cheap knowledge ranks" not in outline(run).text

    def test_what_cant_be_pruned_has_its_reason_and_no_rank(self, run):
        page = outline(run)
        assert "linear channels 10 its elements are the network's output" in page.text
        drawn = figures(read_run(run))
        ranked = [*drawn["heatmap"].layout.yaxis.ticktext, *(note.text for note in drawn["curves"].layout.annotations)]
        assert "conv1" in ranked
        assert "linear" not in ranked

    def test_failures_are_listed_and_not_drawn(self, demo, run):
        page = outline(run)
        assert "loss is not finite (nan) after 50 steps" in page.text
        assert f"1 of {len(demo.ledger())} candidates failed" in page.text
        failed = f"{10:012x}"
        hovers = [text for trace in figures(read_run(run))["front"].data for text in trace.text or ()]
        assert len(hovers) >= len(demo.ledger()) - 1
        assert not any(failed in text for text in hovers)

    def test_settings_are_shown(self, run):
        assert "finetune_steps 50" in outline(run).text
        assert "torch 2.15.0" in outline(run).text

    def test_it_can_be_written_again(self, run):
        first = write_report(run).read_bytes()
        assert write_report(run) == run / "report.html"
        assert (run / "report.html").read_bytes() == first
        assert not list(run.glob("*.part"))

    def test_single_figures(self, run, tmp_path):
        paths = figure_files(run, tmp_path / "figures")
        assert [path.name for path in paths] == [*(f"{name}.html" for name in FIGURES), "plotly.min.js"]
        assert all("newPlot" in path.read_text(encoding="utf-8") for path in paths)
        addresses = [address for path in paths[:-1] for address in Outline(path.read_text()).addresses]
        assert set(addresses) == {"plotly.min.js"}  # beside them, so that they work offline


class TestVerdict:
    """The sentences follow from the numbers of the result, noise included."""

    picked: ClassVar = {"id": "a", "accuracy": 0.90, "accuracy_se": 0.003, "macs": 20e6, "fidelity": "short"}

    def against_uniform(self, run: Path, **uniform: object) -> str:
        result = json.loads((run / "result.json").read_text())
        other = result["picked"] | self.picked | {"id": "b", "accuracy_se": 0.004} | uniform
        changed(run, "result.json", picked=result["picked"] | self.picked, uniform=other)
        return dict(findings(read_run(run)))["Against uniform"]

    def test_clearly_better(self, run):
        text = self.against_uniform(run, accuracy=0.88)
        assert "2.0 points above uniform" in text
        assert "4.0 standard errors of the difference: more than noise explains" in text

    def test_within_the_noise(self, run):
        text = self.against_uniform(run, accuracy=0.893)
        assert "0.7 points above" in text
        assert "1.4 standard errors of the difference: within the noise" in text

    def test_worse(self, run):
        text = self.against_uniform(run, accuracy=0.95)
        assert "5.0 points below uniform" in text
        assert "more than noise" in text

    def test_equal_missing_or_not_comparable(self, run):
        assert "no advantage is shown" in self.against_uniform(run, accuracy=0.90)
        assert "the picked candidate is the uniform one" in self.against_uniform(run, id="a")
        assert "Not comparable" in self.against_uniform(run, fidelity="recalibrated")
        changed(run, "result.json", uniform=None)
        assert "not measured" in dict(findings(read_run(run)))["Against uniform"]

    def test_no_random_control(self, run):
        changed(run, "result.json", random={"size": 0, "best": None})
        assert "luck is not ruled out" in dict(findings(read_run(run)))["Against random"]

    def test_the_gap_between_curves_and_joint_measurement(self, run):
        result = json.loads((run / "result.json").read_text())
        picked = result["picked"] | {"accuracy": 0.90}
        changed(run, "result.json", picked=picked, predicted={"accuracy": 0.88, "gap": -0.02})
        text = dict(findings(read_run(run)))["Together and one by one"]
        assert "predict 88.0\u202f% for this policy, measured together it has 86.0\u202f% before fine-tuning" in text
        assert "costs 2.0 points more than the curves suggest" in text
        assert "brings it to 90.0\u202f%" in text

    def test_without_fine_tuning_nothing_is_said_of_recovery(self, run):
        result = json.loads((run / "result.json").read_text())
        picked = result["picked"] | {"accuracy": 0.861, "fidelity": "reconstructed"}  # rounded otherwise than jointly
        changed(run, "result.json", picked=picked, predicted={"accuracy": 0.88, "gap": -0.02})
        text = dict(findings(read_run(run)))["Together and one by one"]
        assert text.endswith(
            "it has 86.0\u202f%: pruning the groups together costs 2.0 points more than the curves suggest."
        )

    def test_without_the_test_set_the_choice_is_called_flattering(self, run):
        (run / "final.json").unlink()
        assert "which flatters it" in dict(findings(read_run(run)))["Not seen by the search"]

    def test_fine_tuned_without_a_test_set_says_so(self, demo, run):
        final = demo.files["final.json"]
        (run / "final.json").write_text(json.dumps({"epochs": 10, "val": final["val"]}))
        text = outline(run).text
        assert "chosen on, gives 92.1\u202f±\u202f0.4\u202f%; no test set has been read" in text
        assert "Dense, test set" not in text

    def test_an_early_stop_is_said(self, run):
        changed(run, "result.json", stopped="time limit")
        assert "time limit" in dict(findings(read_run(run)))["Stopped early"]


class TestNumbers:
    @pytest.mark.parametrize(
        ("made", "expected"),
        [
            (percent(0.917), "91.7 %"),
            (percent(0.5, 0), "50 %"),
            (measured(0.917, 0.004), "91.7 ± 0.4 %"),
            (signed(-0.006), "\u22120.6"),
            (signed(0.012), "+1.2"),
            (signed(-0.0001), "0.0"),
            (quantity(41_000_000), "41.0 M"),
            (quantity(269_722), "270 k"),
            (quantity(4_089_284_608), "4.09 G"),
            (quantity(999_600), "1.00 M"),
            (quantity(730), "730"),
            (bytes_text(1_083_000), "1.08 MB"),
            (bytes_text(512), "512 B"),
        ],
    )
    def test_formats(self, made, expected):
        assert made.replace("\u202f", " ") == expected


class TestProgress:
    """Three candidates of the search and two controls, by hand."""

    @pytest.fixture
    def search(self, run):
        def line(number: int, arm: str, accuracy: float, macs: int) -> dict:
            last = {"fidelity": "short", "accuracy": accuracy, "accuracy_se": 0.0, "loss": 1.0, "loss_se": 0.0}
            cost = {"macs": macs, "params": 0, "bytes": 0}
            head = {"number": number, "id": str(number), "arm": arm, "agent": "tpe", "policy": {}, "removed": {}}
            return head | cost | {"measurements": [last], "seconds": 1.0, "failure": None}

        rows = [("uniform", 0.8, 30), ("random", 0.7, 60), ("random", 0.75, 50)]
        rows += [("search", 0.6, 20), ("search", 0.9, 60), ("search", 0.85, 40)]
        text = "\n".join(json.dumps(line(i, *row)) for i, row in enumerate(rows))
        (run / "ledger.jsonl").write_text(text, encoding="utf-8")
        result = json.loads((run / "result.json").read_text())
        changed(run, "result.json", dense=result["dense"] | {"accuracy": 0.9, "macs": 100, "params": 100})

        def asked(**settings: object) -> Progress:
            return progress(read_run(changed(run, "config.json", search=settings)))

        return asked

    def test_with_a_budget_the_best_accuracy(self, search):
        course = search(budget="macs<=50%")
        assert course.own == pytest.approx([60, 90, 85])
        assert course.best == pytest.approx([60, 90, 90])
        assert (course.uniform, course.random) == pytest.approx((80, 75))

    def test_with_a_drop_the_fewest_macs_within_it(self, search):
        course = search(max_drop=0.1)
        assert course.own == [None, 60, 40]
        assert course.best == [None, 60, 40]
        assert (course.uniform, course.random) == (30, None)

    def test_a_drop_counts_from_the_dense_network_in_the_precision_of_the_ledger(self, search, run):
        changed(run, "result.json", dense_as_searched={"precision": "bfloat16", "accuracy": 0.96})
        assert search(max_drop=0.1).own == [None, 60, None]

    def test_with_neither_the_hypervolume(self, search):
        course = search()
        assert course.best == pytest.approx([0.48, 0.48 + 0.4 * 0.3, 0.48 + 0.4 * 0.3 + 0.2 * 0.25])
        assert course.uniform == pytest.approx(0.8 * 0.7)


class TestFigures:
    def test_the_front_line_is_the_front(self, run):
        data = read_run(run)
        line = next(trace for trace in figures(data)["front"].data if trace.mode == "lines")
        members = front(data.rows, {"accuracy": "max", "macs": "min"})
        assert list(line.y) == pytest.approx([100 * row.accuracy for row in members])

    def test_hovering_shows_the_whole_policy(self, demo, run):
        marks = next(trace for trace in figures(read_run(run))["front"].data if trace.name == "picked")
        (text,) = marks.text
        for group, sparsity in demo.files["result.json"]["picked"]["policy"].items():
            assert group in text
            assert percent(sparsity, 0) in text

    def test_many_groups_get_a_taller_figure_and_hover_columns(self, tmp_path):
        few, many = Demo(blocks=1), Demo(stages=6, blocks=8)
        small, large = (figures(read_run(d.write(tmp_path / str(i)))) for i, d in enumerate((few, many)))
        for name in ("policy", "heatmap", "curves"):
            assert large[name].layout.height > 3 * small[name].layout.height
        rows = len(many.names)
        assert large["policy"].layout.height / rows > 20
        hover = large["front"].data[0].text[0].split("<br>")
        assert len(hover) <= 3 + 16

    def test_heat_map_cells_hold_the_drop_and_touch(self, demo, run):
        data = read_run(run)
        trace = figures(data)["heatmap"].data[0]
        cells = data.groups[0]["cells"]
        assert list(trace.z[0]) == pytest.approx([max(0.0, 100 * (0.923 - cell["accuracy"])) for cell in cells])
        assert all(a < 100 * c["sparsity"] < b for a, b, c in zip(trace.x, trace.x[1:], cells, strict=False))
        assert len(trace.x) == len(cells) + 1

    def test_the_switch_turns_every_panel(self, demo, run):
        figure = figures(read_run(run))["curves"]
        accuracy, loss = figure.layout.updatemenus[0].buttons
        shown = [trace.visible is not False for trace in figure.data]
        assert list(accuracy.args[0]["visible"]) == shown
        assert list(loss.args[0]["visible"]) == [not on for on in shown]
        names = Counter(trace.name for trace, on in zip(figure.data, shown, strict=True) if not on)
        assert names["predicted by Taylor"] == len(demo.names)

    def test_what_moments_predict_is_a_third_view(self, demo, run):
        document = json.loads((run / "sensitivity.json").read_text())
        for group in document["groups"]:
            if group["prunable"]:
                group["predicted"] = [[0, 0.0], [group["size"] // 2, 0.25], [group["size"], 1.0]]
        (run / "sensitivity.json").write_text(json.dumps(document))
        figure = figures(read_run(run))["curves"]
        accuracy, loss, predicted = (button.args[0]["visible"] for button in figure.layout.updatemenus[0].buttons)
        assert all(sum(shown) == 1 for shown in zip(accuracy, loss, predicted, strict=True))
        curves = [trace for trace, on in zip(figure.data, predicted, strict=True) if on and trace.mode == "lines"]
        assert len(curves) == len(demo.names)
        assert list(curves[0].y) == [25.0, 100.0]  # the axis is logarithmic


class TestMissing:
    @pytest.mark.parametrize("absent", ["sensitivity.json", "front.json", "result.json", "final.json", "ledger.jsonl"])
    def test_one_file_absent_is_said_and_the_rest_shown(self, run, absent):
        (run / absent).unlink()
        page = outline(run)
        assert ABSENT[absent].replace("`", "").split(";")[0] in page.text
        assert "Settings" in page.text

    def test_config_alone(self, run):
        for name in ABSENT:
            (run / name).unlink()
        page = outline(run)
        assert "nothing has been picked yet" in page.text
        assert figures(read_run(run)) == {}

    def test_nothing_picked(self, run):
        changed(run, "result.json", picked=None)
        assert "no candidate qualified" in outline(run).text

    def test_widths_without_the_analysis(self, demo, run):
        (run / "sensitivity.json").unlink()
        removed = demo.files["result.json"]["picked"]["removed"]
        data = read_run(run)
        assert [width.text for width in data.widths(data.picked)] == [f"{count} removed" for count in removed.values()]

    def test_analysis_alone(self, run):
        for name in ABSENT:
            if name != "sensitivity.json":
                (run / name).unlink()
        assert list(figures(read_run(run))) == ["curves", "heatmap"]
        assert "Groups" in outline(run).text

    def test_a_killed_analysis_has_groups_without_cells(self, run):
        groups = json.loads((run / "sensitivity.json").read_text())["groups"]
        for group in groups[1:]:
            group["cells"] = []
        changed(run, "sensitivity.json", groups=groups)
        assert "conv1" in outline(run).text

    def test_a_ledger_cut_short_loses_its_last_line_only(self, demo, run):
        path = run / "ledger.jsonl"
        path.write_text(path.read_text()[:-30], encoding="utf-8")
        assert len(read_run(run).ledger) == len(demo.ledger()) - 1

    def test_a_ledger_broken_in_the_middle_is_refused(self, run):
        path = run / "ledger.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0][:-9], *lines[1:]]), encoding="utf-8")
        with pytest.raises(RunError, match=r"ledger\.jsonl' line 1 is not JSON"):
            write_report(run)

    def test_broken_json_is_refused(self, run):
        (run / "result.json").write_text("{", encoding="utf-8")
        with pytest.raises(RunError, match=r"result\.json' is not readable JSON"):
            write_report(run)

    def test_another_folder_is_refused(self, tmp_path):
        with pytest.raises(RunError, match=r"holds no config\.json, so it is not a run"):
            write_report(tmp_path)


class TestSafety:
    hostile = "</script><img src=http://example.com/x onerror=alert(1)>%{x}&lt;\"'"

    def test_strings_of_the_run_are_text(self, tmp_path):
        honest = outline(Demo(blocks=1).write(tmp_path / "honest"))
        demo = Demo(blocks=1, hostile=self.hostile)
        run = demo.write(tmp_path / "<b>run")
        groups = demo.files["sensitivity.json"]["groups"]
        for group in groups:
            group["reason"] = group["kind"] = self.hostile
        changed(run, "sensitivity.json", groups=groups)
        changed(run, "config.json", search={"agent": self.hostile}, versions={self.hostile: self.hostile})
        changed(run, "final.json", epochs=self.hostile)
        picked = demo.files["result.json"]["picked"] | {"rule": self.hostile, "fidelity": self.hostile}
        changed(run, "result.json", picked=picked, agent=self.hostile, stopped=self.hostile, evaluations=self.hostile)
        page = outline(run)
        assert page.elements["img"] == 0
        assert page.elements["script"] == honest.elements["script"]
        assert page.elements["b"] == 0
        assert page.addresses == []
        assert self.hostile in page.text

    def test_nothing_is_loaded_from_elsewhere(self, run):
        text = write_report(run).read_text(encoding="utf-8")
        page = Outline(text)
        assert page.addresses == []
        assert page.elements["link"] == 0
        assert "default-src 'none'" in text

    def test_the_outline_sees_what_would_be_loaded(self):
        page = Outline("<script src='https://example.com/a.js'></script><link href='http://example.com/b.css'>")
        assert page.addresses == ["https://example.com/a.js", "http://example.com/b.css"]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCH = """<script>
setTimeout(() => {
  const panel = document.getElementById("figure-curves");
  panel.querySelectorAll(".updatemenu-button")[1].dispatchEvent(new MouseEvent("click", {bubbles: true}));
  setTimeout(() => { document.body.dataset.switched = panel.layout.yaxis.type; }, 500);
}, 1500);
</script>"""


@dataclass(frozen=True)
class Seen:
    """A page after a browser has run it: the document, and the errors on its console."""

    document: str
    errors: list[str]

    @property
    def drawn(self) -> dict[str, int]:
        """The number of drawn traces of every figure."""
        parts = self.document.split('id="figure-')[1:]
        return {part.split('"')[0]: len(re.findall(r'class="(?:trace |hm")', part)) for part in parts}

    def check(self) -> None:
        assert self.errors == []
        assert f'data-drawn="{len(self.drawn)}"' in self.document
        assert all(self.drawn.values()), self.drawn


def browse(page: Path, profile: Path) -> Seen:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--v=0"]
    options += ["--virtual-time-budget=6000", "--enable-logging=stderr", "--window-size=1280,2000", "--dump-dom"]
    done = subprocess.run(
        [str(BROWSER), *options, f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Uncaught" in line]
    return Seen(done.stdout.split("</head>")[-1], errors)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on the PATH")
class TestBrowser:
    def test_every_figure_is_drawn_the_switch_works_and_hostile_names_run_nothing(self, tmp_path):
        demo = Demo(blocks=4, hostile="</script><img src=x onerror=boom()>")
        assert len(demo.names) % 4  # the last row of panels is not full
        page = write_report(demo.write(tmp_path / "run"))
        page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{SWITCH}</body>"), encoding="utf-8")
        seen = browse(page, tmp_path / "profile")
        seen.check()
        assert list(seen.drawn) == list(FIGURES)
        assert seen.drawn["heatmap"] == len(demo.names)
        assert 'data-switched="log"' in seen.document
        assert "<img" not in seen.document

    def test_a_run_without_the_optional_files(self, run, tmp_path):
        for name in ("sensitivity.json", "front.json", "result.json", "final.json"):
            (run / name).unlink()
        seen = browse(write_report(run), tmp_path / "profile")
        seen.check()
        assert list(seen.drawn) == ["front", "progress"]

    def test_the_check_sees_a_broken_page(self, run, tmp_path):
        page = write_report(run)
        broken = "<script>nowhere.to.be.found()</script><img src='http://127.0.0.1:9/x.png'></body>"
        page.write_text(page.read_text(encoding="utf-8").replace("</body>", broken), encoding="utf-8")
        seen = browse(page, tmp_path / "profile")
        assert any("nowhere is not defined" in line for line in seen.errors)
        assert any("127.0.0.1" in line and "Content Security Policy" in line for line in seen.errors)
        with pytest.raises(AssertionError):
            seen.check()

    def test_the_check_sees_a_figure_that_was_not_drawn(self, run, tmp_path):
        page = write_report(run)
        text = page.read_text(encoding="utf-8").replace("Plotly.newPlot(", "Promise.resolve(")
        page.write_text(text, encoding="utf-8")
        with pytest.raises(AssertionError):
            browse(page, tmp_path / "profile").check()
