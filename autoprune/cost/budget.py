"""`Budget`: upper limits on what the picked network may cost, as the user writes them."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from autoprune.cost.count import Cost
from autoprune.errors import BudgetError, UnknownNameError

__all__ = ["METRICS", "Budget", "Limit"]

METRICS = ("macs", "params", "bytes")
"""What can be limited."""

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "KB": 1e3, "MB": 1e6, "GB": 1e9}
_LIMIT = re.compile(r"\s*(?P<metric>[A-Za-z_]+)\s*<=\s*(?P<number>[0-9.]+(?:e[+-]?[0-9]+)?)\s*(?P<unit>%|[A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True)
class Limit:
    """One upper limit.

    Attributes:
        metric: "macs", "params" or "bytes".
        value: A fraction of the dense network's cost if `relative`, else the number itself.
        relative: Whether the value is a fraction.
    """

    metric: str
    value: float
    relative: bool

    def absolute(self, dense: Cost) -> float:
        """Return the limit as a number, given the dense network's cost."""
        whole: int = getattr(dense, self.metric)
        return self.value * whole if self.relative else self.value

    def __str__(self) -> str:
        """Return the shortest text from which `Budget.parse` reads exactly this limit."""
        plain = f"{self.metric}<={self.value!r}"
        return next((text for text in self._spellings() if _parse_limit(text) == self), plain)

    def _spellings(self) -> Iterator[str]:
        units = [unit for unit in ("G", "M", "K", "") if self.value >= _UNITS[unit]]
        for digits in range(6, 18):
            if self.relative:
                yield f"{self.metric}<={self.value * 100:.{digits}g}%"
            else:
                yield from (f"{self.metric}<={self.value / _UNITS[unit]:.{digits}g}{unit}" for unit in units)


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
        """Read limits such as `macs<=50%`, `macs<=20M`, `params<=0.4` (a fraction), separated by commas.

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
        return max(float(getattr(cost, limit.metric) / limit.absolute(dense)) for limit in limits)

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
    if unit == "%":
        number, relative = number / 100, True
    elif unit.upper() in _UNITS:
        number, relative = number * _UNITS[unit.upper()], unit == "" and number <= 1
    else:
        raise UnknownNameError("budget unit", unit, ["%", *filter(None, _UNITS)])
    if not 0 < number < math.inf:
        raise BudgetError(f"a budget must be a positive number, but got {text.strip()!r}")
    return Limit(metric, number, relative)
