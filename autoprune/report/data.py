"""Reading a run folder's files into one frozen record; what is drawn of it, and in which words, is elsewhere."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.errors import RunError
from autoprune.run import RunFolder

__all__ = ["Row", "Run", "Width", "read_run"]

OPTIONAL = ("sensitivity.json", "front.json", "result.json", "final.json")


@dataclass(frozen=True, slots=True)
class Row:
    """One measured candidate of the ledger; accuracy, loss and fidelity are those of its last measurement."""

    id: str
    arm: str
    policy: Mapping[str, float]
    accuracy: float
    accuracy_se: float
    macs: float
    params: float
    fidelity: str


@dataclass(frozen=True, slots=True)
class Width:
    """What a policy does to one group; `before` is None where the group's size is not on record."""

    group: str
    before: int | None
    removed: int
    sparsity: float

    @property
    def text(self) -> str:
        """The width before and after, or what is removed where the width is not known."""
        return f"{self.removed} removed" if self.before is None else f"{self.before} → {self.before - self.removed}"


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder holds; a file that is absent is None (the ledger: empty).

    Attributes:
        name: The folder's own name.
        config: `config.json`.
        ledger: The lines of `ledger.jsonl`, in the order of proposal, failed candidates too; then those of finalists
            that are not there, or failed.
        rows: The measured ones of `ledger.jsonl`.
        finalists: Those that were fine-tuned after the search, as they are then, on the last rung of the ladder; empty
            where there is none.
        missing: The files that are absent.
        precision: `precision.json`, which a search that has begun leaves.
    """

    name: str
    config: Mapping[str, Any]
    ledger: Sequence[Mapping[str, Any]]
    rows: Sequence[Row]
    finalists: Sequence[Row]
    sensitivity: Mapping[str, Any] | None
    front: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    final: Mapping[str, Any] | None
    missing: Sequence[str]
    precision: Mapping[str, Any] | None

    @property
    def search(self) -> Mapping[str, Any]:
        """The settings of the search."""
        return self.config.get("search") or {}

    @property
    def dense(self) -> Mapping[str, Any]:
        """What is known of the dense network: of the result, else what the other files tell."""
        known: dict[str, Any] = {}
        if self.sensitivity:
            known |= self.sensitivity["dense"]
        if self.front:
            known |= {name: self.front["reference"][name] for name in ("macs", "params")}
        return known | (self.result["dense"] if self.result else {})

    @property
    def dense_as_searched(self) -> Mapping[str, Any]:
        """The dense network in the precision of the ledger and the cells, which they are compared with."""
        return {**self.dense, **(self.result or {}).get("dense_as_searched", {})}

    @property
    def picked(self) -> Mapping[str, Any] | None:
        """The picked candidate, where there is one."""
        return self.result["picked"] if self.result else None

    @property
    def groups(self) -> Sequence[Mapping[str, Any]]:
        """The groups that can be pruned, in the order of execution."""
        return [group for group in self._all_groups if group["prunable"]]

    @property
    def locked(self) -> Sequence[Mapping[str, Any]]:
        """What can't be pruned, with the reason."""
        return [group for group in self._all_groups if not group["prunable"]]

    @property
    def failures(self) -> Sequence[Mapping[str, Any]]:
        """The ledger's lines of candidates that failed."""
        return [line for line in self.ledger if line.get("failure")]

    def arm(self, name: str) -> Sequence[Row]:
        """Return the measured candidates of one arm: "search", "uniform" or "random"."""
        return [row for row in self.rows if row.arm == name]

    def line(self, identity: str) -> Mapping[str, Any] | None:
        """Return the ledger's line of a candidate."""
        return next((line for line in self.ledger if line["id"] == identity), None)

    def widths(self, candidate: Mapping[str, Any]) -> list[Width]:
        """Return what a candidate's policy does to every group, in the order of execution."""
        sizes = {group["name"]: int(group["size"]) for group in self.groups}
        policy, removed = candidate["policy"], candidate["removed"]
        names = list(sizes) or list(policy)
        return [
            Width(
                group=name,
                before=sizes.get(name),
                removed=int(removed.get(name, 0)),
                sparsity=removed.get(name, 0) / sizes[name] if name in sizes else float(policy[name]),
            )
            for name in names
        ]

    @property
    def _all_groups(self) -> Sequence[Mapping[str, Any]]:
        return self.sensitivity["groups"] if self.sensitivity else []


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        RunError: There is no `config.json`, or a file is not readable JSON (a ledger's last line may be cut short: that
            is how a killed search leaves it).
    """
    if not (folder / "config.json").is_file():
        raise RunError(f"'{folder}' holds no config.json, so it is not a run; give the folder that --out named")
    ledger = _read_ledger(folder / "ledger.jsonl")
    files = {name: _read_json(folder / name) if (folder / name).is_file() else None for name in OPTIONAL}
    level = len((files["result.json"] or {}).get("rungs") or [0]) - 1
    last = _read_ledger(RunFolder(folder).ledger_of(level)) if level else []
    known = {line["id"] for line in ledger}
    return Run(
        name=folder.resolve().name,
        config=_read_json(folder / "config.json"),
        ledger=[*ledger, *(line for line in last if line.get("failure") or line["id"] not in known)],
        rows=[_row(line) for line in ledger if _is_measured(line)],
        finalists=[_row(line) for line in last if _is_measured(line)],
        sensitivity=files["sensitivity.json"],
        front=files["front.json"],
        result=files["result.json"],
        final=files["final.json"],
        missing=[name for name, content in files.items() if content is None] + ([] if ledger else ["ledger.jsonl"]),
        precision=_read_json(folder / "precision.json") if (folder / "precision.json").is_file() else None,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"'{path}' is not readable JSON ({error}); restore it, or run the search again") from error
    return content


def _read_ledger(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    lines = []
    for number, line in enumerate(text, start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(text):
                raise RunError(f"'{path}' line {number} is not JSON ({error}); remove that line") from error
    return sorted(lines, key=lambda line: int(line["number"]))


def _is_measured(line: Mapping[str, Any]) -> bool:
    measurements = line.get("measurements") or []
    return not line.get("failure") and bool(measurements) and math.isfinite(measurements[-1]["accuracy"])


def _row(line: Mapping[str, Any]) -> Row:
    last = line["measurements"][-1]
    return Row(
        id=line["id"],
        arm=line["arm"],
        policy=line["policy"],
        accuracy=last["accuracy"],
        accuracy_se=last["accuracy_se"],
        macs=line["macs"],
        params=line["params"],
        fidelity=last["fidelity"],
    )
