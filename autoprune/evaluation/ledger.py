"""The ledger: every candidate on disk before its result is used, one JSON object a line.

Lines come in the order in which evaluations were done, candidates in that of their numbers.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from autoprune.errors import RunError
from autoprune.evaluation.candidate import Candidate

__all__ = ["Ledger"]


class Ledger:
    """What was evaluated, by policy id.

    A line is written, flushed and synced before `append` returns. A process killed while writing leaves half a line,
    whose candidate was not used yet. Whoever only reads leaves it out, as a process that runs may be writing it; who
    goes on writing cuts it off.

    Args:
        path: The file; None keeps the ledger in memory.

    Raises:
        RunError: A line other than the last can't be read, or repeats a policy.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._candidates: dict[str, Candidate] = {}
        self._numbers: set[int] = set()
        self._whole: int | None = None  # bytes of whole lines, if there is half a line behind them
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._candidates)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(sorted(self._candidates.values(), key=lambda candidate: candidate.number))

    def get(self, policy_id: str) -> Candidate | None:
        """Return the candidate of a policy, if it was evaluated."""
        return self._candidates.get(policy_id)

    def has(self, number: int) -> bool:
        """Say whether a candidate has this number."""
        return number in self._numbers

    def append(self, candidate: Candidate) -> None:
        """Write a candidate down; when this returns it is on disk."""
        if candidate.id in self._candidates:
            raise ValueError(f"policy {candidate.id} is in the ledger already")
        if self._path is not None:
            if self._whole is not None:
                os.truncate(self._path, self._whole)
                self._whole = None
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(candidate.to_dict()) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._add(candidate)

    def _add(self, candidate: Candidate) -> None:
        self._candidates[candidate.id] = candidate
        self._numbers.add(candidate.number)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._whole = len(whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                candidate = Candidate.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(
                    f"line {number} of {path} can't be read ({error}); move the file away to start anew"
                ) from error
            if candidate.id in self._candidates:
                raise RunError(
                    f"line {number} of {path} repeats policy {candidate.id}, as when two processes write one folder; "
                    "move the file away to start anew"
                )
            self._add(candidate)
