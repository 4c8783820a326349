"""`Budget`: upper limits on what the picked network may cost, as the user writes them."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from autoprune.cost.count import Cost
from autoprune.errors import BudgetError, UnknownNameError

__all__ = ["METRICS", "Budget", "Limit"]

_COUNTS = {"G": 1e9, "M": 1e6, "K": 1e3, "": 1.0}
_SIZES = {**_COUNTS, "GB": 1e9, "MB": 1e6, "KB": 1e3}
_TIMES = {"s": 1e3, "ms": 1.0, "us": 1e-3}
_UNITS = {  # of each metric, in the order in which a limit's text tries them
    "macs": _COUNTS,
    "params": _COUNTS,
    "bytes": _SIZES,
    "activations": _SIZES,
    "nonzero_params": _COUNTS,
    "nonzero_macs": _COUNTS,
    "latency": _TIMES,
}

METRICS = tuple(_UNITS)
"""What can be limited, named as in `Cost`; activations in bytes, latency in milliseconds."""

_LIMIT = re.compile(r"\s*(?P<metric>[A-Za-z_]+)\s*<=\s*(?P<number>[0-9.]+(?:e[+-]?[0-9]+)?)\s*(?P<unit>%|[A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True)
class Limit:
    """One upper limit.

    Attributes:
        metric: One of `METRICS`.
        value: A fraction of the dense network's cost if `relative`, else the number itself; latencies in milliseconds.
        relative: Whether the value is a fraction.
    """

    metric: str
    value: float
    relative: bool

    def used(self, cost: Cost) -> float:
        """Return the number of a cost that is limited.

        Raises:
            BudgetError: It is the latency, and none was predicted.
        """
        number: float = getattr(cost, self.metric)
        return number

    def absolute(self, dense: Cost) -> float:
        """Return the limit as a number, given the dense network's cost.

        Raises:
            BudgetError: It is a share of nothing, or of a latency that was not predicted.
        """
        if not self.relative:
            return self.value
        whole = self.used(dense)
        if not whole:
            raise BudgetError(f"the dense network has 0 {self.metric}, of which {self} is no limit; give a number")
        return self.value * whole

    def __str__(self) -> str:
        """Return the shortest text from which `Budget.parse` reads exactly this limit."""
        plain = f"{self.metric}<={self.value!r}{'ms' if self.metric == 'latency' and not self.relative else ''}"
        return next((text for text in self._spellings() if _parse_limit(text) == self), plain)

    def _spellings(self) -> Iterator[str]:
        units = [(unit, size) for unit, size in _UNITS[self.metric].items() if self.value >= size]
        for digits in range(6, 18):
            if self.relative:
                yield f"{self.metric}<={self.value * 100:.{digits}g}%"
            else:
                yield from (f"{self.metric}<={self.value / size:.{digits}g}{unit}" for unit, size in units)


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper limits that must all hold; none at all means the dense network's own cost.

    Example:
        >>> str(Budget.parse("macs<=50%, params<=0.4"))
        'macs<=50%,params<=40%'
    """

    limits: tuple[Limit, ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> Self:
        """Read limits such as `macs<=50%`, `params<=0.4` (a fraction), `latency<=5ms`, separated by commas.

        Raises:
            BudgetError: The text can't be read, or a limit is not positive.
            UnknownNameError: A metric is not known.
        """
        if text is None:
            return cls()
        return cls(tuple(_parse_limit(part) for part in text.split(",")))

    def utilisation(self, cost: Cost, dense: Cost) -> float:
        """Return the largest share of a limit that a cost uses; at most 1 where the budget is met."""
        limits = self.limits or (Limit("macs", 1.0, relative=True),)
        return max(float(limit.used(cost) / limit.absolute(dense)) for limit in limits)

    def __str__(self) -> str:
        return ",".join(str(limit) for limit in self.limits)


def _parse_limit(text: str) -> Limit:
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise BudgetError(
            f"can't read the budget {text.strip()!r}; write for example macs<=50%, macs<=20M or params<=0.4"
        )
    metric, unit = match["metric"].lower(), match["unit"]
    if metric not in METRICS:
        raise UnknownNameError("budget metric", metric, METRICS)
    try:
        number = float(match["number"])
    except ValueError as error:
        raise BudgetError(f"can't read the number in the budget {text.strip()!r}") from error
    units = {known.lower(): size for known, size in _UNITS[metric].items()}
    relative = unit == "%" or (unit == "" and number <= 1)
    if unit == "%":
        number /= 100
    elif unit.lower() in units:
        number *= units[unit.lower()]
    elif unit:
        raise UnknownNameError(f"unit of {metric}", unit, ["%", *filter(None, _UNITS[metric])])
    elif not relative:
        raise BudgetError(f"a latency needs its unit, but got {text.strip()!r}; write for example latency<=5ms")
    if not 0 < number < math.inf:
        raise BudgetError(f"a budget must be a positive number, but got {text.strip()!r}")
    return Limit(metric, number, relative)
