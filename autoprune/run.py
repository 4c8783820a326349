"""The run folder: where every file of a search lies, and who may write there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

from autoprune.errors import RunError

__all__ = ["FORMAT", "RunFolder", "write_json"]

FORMAT: Final = 3
"""Version of the folder's files; raised when a change makes old ones unreadable."""


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


@final
class RunFolder:
    """Names of a run's files.

    Args:
        path: The folder; `create` makes it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.sensitivity = self.path / "sensitivity.json"
        self.precision = self.path / "precision.json"
        self.latency = self.path / "latency.json"
        self.moments = self.path / "moments.safetensors"
        self.shared = self.path / "shared.safetensors"
        self.shared_moments = self.path / "shared_moments.safetensors"
        self.ledger = self.path / "ledger.jsonl"
        self.front = self.path / "front.json"
        self.result = self.path / "result.json"
        self.final = self.path / "final.json"
        self.report = self.path / "report.html"
        self.figures = self.path / "figures"
        self.tracking = self.path / "tracking.json"
        self.baseline = self.path / "baseline.safetensors"
        self.pruned = self.path / "pruned"

    def ledger_of(self, level: int) -> Path:
        """Return the ledger of a rung; 0 is the search's own."""
        return self.ledger if level == 0 else self.path / f"finalists{'' if level == 1 else f'_{level}'}.jsonl"

    def create(self) -> None:
        """Make the folder.

        Raises:
            RunError: It can't be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise RunError(f"can't write to {self.path}: {error.strerror}; name another folder with --out") from error

    def claim(self, config: Mapping[str, Any], identity: tuple[str, ...]) -> bool:
        """Take the folder for one search, or go on with the same one.

        A folder whose search left nothing but its config (it failed before it began) is free.

        Args:
            config: Written to `config.json` if the folder is new.
            identity: The sections of the config that make it the same search.

        Returns:
            Whether the folder held this search already.

        Raises:
            RunError: The folder holds another search, or can't be written.
        """
        self.create()
        if not self.config.exists():
            if self.ledger.exists():
                raise RunError(f"{self.path} holds a ledger without its config; name another folder with --out")
            write_json(self.config, config)
            return False
        there = self.read(self.config)
        difference = _difference(there, json.loads(json.dumps(config)), identity)
        if difference is None:
            return True
        files = (self.sensitivity, self.ledger, self.tracking, self.result)
        if any(file.exists() for file in files) or any(self.path.glob("*/*/config.json")):  # a comparison's searches
            raise RunError(
                f"{self.path} holds another search: its {difference}; name another folder with --out, or repeat its "
                "settings to go on with it"
            )
        write_json(self.config, config)
        return False

    def read(self, file: Path) -> dict[str, Any]:
        """Return a JSON file of the folder.

        Raises:
            RunError: It is not there, or can't be read.
        """
        try:
            document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(f"{self.path} has no {file.name}; is it the --out folder of a finished search?") from error
        except (OSError, ValueError) as error:
            raise RunError(f"{file} can't be read: {error}") from error
        return document


def _difference(there: Mapping[str, Any], mine: Mapping[str, Any], identity: tuple[str, ...]) -> str | None:
    """Return the first value in which configs differ, in words."""
    if there.get("format") != mine.get("format"):
        return f"format is {there.get('format')}, not {mine.get('format')}, which is another version of autoprune"
    for section in identity:
        old, new = there.get(section) or {}, mine[section]
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                return f"{key} is {old.get(key)!r}, not {new.get(key)!r}"
    return None
