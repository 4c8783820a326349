"""Limits that a user sets on single groups, as a TOML table.

::

    [groups]
    conv1 = {lock = true}
    "layer3.*" = {min = 0.2, max = 0.8}

Names may hold the wildcards `*` and `?`; a later line wins over an earlier one. Numbers are sparsities, in [0, 1).
"""

import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from autoprune.errors import ConfigError, UnknownNameError
from autoprune.structure import Structure

__all__ = ["Bounds", "parse_bounds", "read_bounds"]

Bounds = Mapping[str, tuple[float, float]]
"""Group name → lowest and highest sparsity."""


def read_bounds(path: str | Path) -> dict[str, dict[str, Any]]:
    """Return the `[groups]` table of a TOML file.

    Raises:
        ConfigError: The file can't be read, or holds something else.
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read the groups' bounds from {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    table = document.pop("groups", None)
    if document or not isinstance(table, dict) or not all(isinstance(line, dict) for line in table.values()):
        raise ConfigError(
            f"{path} must hold one table [groups], with lines such as conv1 = {{lock = true}} or conv2 = {{max = 0.8}}"
        )
    return table


def parse_bounds(
    table: Mapping[str, Mapping[str, Any]], structure: Structure, max_sparsity: float
) -> dict[str, tuple[float, float]]:
    """Return every named group's lowest and highest sparsity.

    Args:
        table: Pattern → `lock`, or `min` and `max`.
        structure: The groups that patterns are matched with.
        max_sparsity: The highest sparsity where a line gives none.

    Raises:
        UnknownNameError: A pattern matches no group.
        ConfigError: A line is for a group that can't be pruned, has other keys, or numbers out of range.
    """
    bounds: dict[str, tuple[float, float]] = {}
    for pattern, line in table.items():
        matched = [name for name in structure.names if fnmatchcase(name, pattern)]
        if not matched:
            for locked in structure.locked:
                if locked.name == pattern:
                    raise ConfigError(f"group '{pattern}' can't be pruned, so it takes no bounds: {locked.reason}")
            raise UnknownNameError("group", pattern, structure.names)
        unknown = set(line) - {"lock", "min", "max"}
        if unknown:
            raise ConfigError(f"group '{pattern}' has a key '{min(unknown)}'; known are lock, min and max")
        bounds.update(dict.fromkeys(matched, _parse_line(pattern, line, max_sparsity)))
    return bounds


def _parse_line(pattern: str, line: Mapping[str, Any], max_sparsity: float) -> tuple[float, float]:
    lock = line.get("lock", False)
    if not isinstance(lock, bool):
        raise ConfigError(f"`lock` must be true or false for group '{pattern}', but got {lock!r}")
    low = line.get("min", 0.0)
    high = line.get("max", max_sparsity)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (low, high))
    if numbers and "max" not in line:
        high = max(low, high)
    if not numbers or not 0 <= low <= high < 1:
        raise ConfigError(f"`0 <= min <= max < 1` must hold for group '{pattern}', but got min={low!r}, max={high!r}")
    return (0.0, 0.0) if lock else (float(low), float(high))
