"""`Policy`: one sparsity a group. What travels between agents, spaces, the evaluator and disk, and nothing else."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, Self

from autoprune.errors import PolicyError

__all__ = ["Policy"]


class Policy(Mapping[str, float]):
    """A frozen, ordered map from group name to sparsity, the fraction of the group's elements removed, in [0, 1].

    Two policies are equal when they give the same sparsity to the same groups, in any order. Being a map, it can't
    hold two sparsities for one group. Sparsity 1 removes a group whole, which only blocks can bear.

    Args:
        sparsities: Group name to sparsity.

    Raises:
        PolicyError: A sparsity is not a number in [0, 1].

    Example:
        >>> policy = Policy({"conv1": 0.5, "conv2": 0.0})
        >>> policy["conv1"]
        0.5
        >>> Policy.from_json(policy.to_json()) == policy
        True
    """

    __slots__ = ("_id", "_sparsities")

    def __init__(self, sparsities: Mapping[str, float]) -> None:
        checked: dict[str, float] = {}
        for group, sparsity in sparsities.items():
            if isinstance(sparsity, bool) or not (isinstance(sparsity, Real) and 0.0 <= sparsity <= 1.0):
                raise PolicyError(f"`0 <= sparsity <= 1` must hold for every group, but got {group}={sparsity!r}")
            checked[group] = float(sparsity) + 0.0  # turns -0.0 into the 0.0 that it equals
        self._sparsities = checked
        text = json.dumps({group: round(value, 9) for group, value in sorted(checked.items())})
        self._id = hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits, the same in every process, for policies equal to nine decimals."""
        return self._id

    def to_json(self) -> str:
        """Return the policy as a JSON object."""
        return json.dumps(self._sparsities)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            PolicyError: The text is not a JSON object of numbers, or names a group twice.
        """

        def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            names = [name for name, _ in pairs]
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise PolicyError(f"a policy gives each group one sparsity, but '{twice[0]}' is named twice")
            return dict(pairs)

        try:
            values = json.loads(text, object_pairs_hook=refuse_duplicates)
        except json.JSONDecodeError:
            values = None
        if not isinstance(values, dict):
            raise PolicyError(f"a policy is a JSON object of groups and sparsities, but got {text[:80]!r}")
        return cls(values)

    def __getitem__(self, group: str) -> float:
        return self._sparsities[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sparsities)

    def __len__(self) -> int:
        return len(self._sparsities)

    def __hash__(self) -> int:
        return hash(self._id)

    def __repr__(self) -> str:
        return f"Policy({self._sparsities})"
