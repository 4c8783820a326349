"""For tests, ours and those of others: tiny networks, a synthetic evaluator, and the contracts of agents and spaces.

A contract is a class whose tests a subclass inherits by giving one fixture; pytest collects the subclass::

    class TestHillAgent(AgentContract):
        @pytest.fixture
        def agent(self):
            return HillAgent(step=0.1)

Nothing here is imported by the package itself, and pytest is not needed to import it.
"""

import math
import itertools
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from autoprune.cost import Budget, CostModel, FeasibleSet
from autoprune.environment import PruningEnv, layer_facts
from autoprune.errors import SearchOver
from autoprune.evaluation.candidate import Candidate, Measurement
from autoprune.policy import Policy
from autoprune.structure import Group, Slice, Structure

__all__ = [
    "AgentContract",
    "SearchSpaceContract",
    "SyntheticEvaluator",
    "TinyNet",
    "TinyResNet",
    "chain",
    "synthetic_env",
]


@final
class TinyNet(nn.Module):
    """Two convolutions with batch-norm and a linear layer: `(batch, 1, 8, 8)` to `(batch, 10)`, two groups of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return `(batch, 10)` scores of `(batch, 1, 8, 8)` images."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.relu(self.bn2(self.conv2(features)))
        scores: torch.Tensor = self.fc(features.mean((2, 3)))
        return scores


@final
class TinyResNet(nn.Module):
    """One residual block with a functional relu: `(batch, 1, 8, 8)` to `(batch, 10)`.

    Two groups of 8: the residual stream, which `stem` and `conv2` both write, and what lies within the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return `(batch, 10)` scores of `(batch, 1, 8, 8)` images."""
        stream = functional.relu(self.bn0(self.stem(images)))
        inner = functional.relu(self.bn1(self.conv1(stream)))
        stream = functional.relu(stream + self.bn2(self.conv2(inner)))
        scores: torch.Tensor = self.fc(functional.adaptive_avg_pool2d(stream, 1).flatten(1))
        return scores


def chain(widths: Sequence[int], budget: str = "macs<=50%", max_sparsity: float = 0.9) -> FeasibleSet:
    """Return the feasible policies of a plain chain of 3x3 convolutions on 8x8 images, made without tracing it.

    Args:
        widths: Channels of each convolution; each is a group, `conv1`, `conv2`, ...
        budget: Limits as the user writes them.
        max_sparsity: Highest sparsity of every group.
    """
    model = _chain_model(widths)
    names = [f"conv{number + 1}" for number in range(len(widths))]
    groups = []
    for name, reader, width in zip(names, [*names[1:], "fc"], widths, strict=True):
        positions = torch.arange(width)[:, None]
        slices = (
            Slice(f"{name}.weight", 0, positions, "written"),
            Slice(f"{name}.bias", 0, positions, "written"),
            Slice(f"{reader}.weight", 1, positions, "read"),
        )
        groups.append(Group(name, "channels", width, slices, (name,), (reader,)))
    structure = Structure(tuple(groups))
    costs = CostModel(model, torch.zeros(1, 3, 8, 8), structure)
    return FeasibleSet.build(structure, costs, Budget.parse(budget), max_sparsity=max_sparsity)


def _chain_model(widths: Sequence[int]) -> nn.Sequential:
    model = nn.Sequential()
    inputs = 3
    for number, width in enumerate(widths):
        model.add_module(f"conv{number + 1}", nn.Conv2d(inputs, width, 3, padding=1))
        inputs = width
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(inputs, 10))
    return model


@final
class SyntheticEvaluator:
    """Gives candidates from a formula in place of a network, counting and caching as the real evaluator does.

    With sparsities s, a group g loses `weights[g] s_g ** powers[g]`, and two consecutive groups together lose another
    `interactions[g] s_g s_(g+1)`, so that the curves of single groups do not tell everything. Weights and interactions
    sum to 1: accuracy is 1 for the dense network and never below 0. Some groups are far more sensitive than others.

    Args:
        feasible: Whose policies are priced.
        evaluations: How many different policies may be evaluated.
        seed: Of the formula.
        repeats: How many policies in a row may be repetitions.

    Attributes:
        weights: `(groups,)`.
        powers: `(groups,)`.
        interactions: `(groups - 1,)`.
        candidates: All different candidates, in the order of evaluation.
        calls: How often it was called, repetitions included.
    """

    def __init__(self, feasible: FeasibleSet, *, evaluations: int, seed: int = 0, repeats: int = 200) -> None:
        rng = np.random.default_rng(seed)
        groups = len(feasible.structure)
        weights = np.exp(rng.uniform(-2.5, 2.5, groups))
        interactions = rng.uniform(0, 0.5, groups - 1) * np.minimum(weights[1:], weights[:-1])
        total = weights.sum() + interactions.sum()
        self.weights, self.interactions = weights / total, interactions / total
        self.powers = rng.uniform(1.0, 3.0, groups)
        self.candidates: list[Candidate] = []
        self.calls = 0
        self._feasible = feasible
        self._evaluations = evaluations
        self._known: dict[Policy, Candidate] = {}
        self._repeats, self._allowed_repeats = 0, repeats

    def accuracy(self, policy: Policy) -> float:
        """Return the formula's value; counts nothing."""
        sparsities = np.array([policy[name] for name in self._feasible.structure.names])
        alone = self.weights @ sparsities**self.powers
        return float(1 - alone - self.interactions @ (sparsities[1:] * sparsities[:-1]))

    def optimum(self) -> Policy:
        """Return the best feasible policy, from trying all: for two or three small groups.

        Raises:
            ValueError: There are more than 20,000 to try.
        """
        ranges = [range(low, high + 1) for low, high in zip(self._feasible.lower, self._feasible.upper, strict=True)]
        if math.prod(len(counts) for counts in ranges) > 20_000:
            raise ValueError(f"the optimum is found by trying all policies, but there are {ranges}")
        every = (np.array(counts) for counts in itertools.product(*ranges))
        feasible = [self._feasible.policy(counts) for counts in every if self._feasible.utilisation(counts) <= 1]
        return max(feasible, key=self.accuracy)

    def __call__(self, policy: Policy) -> Candidate:
        """Return the candidate of a policy.

        Raises:
            SearchOver: The evaluations are spent, or the same policies come again and again.
        """
        self.calls += 1
        policy = self._feasible.structure.rounded(policy)
        if policy in self._known:
            self._repeats += 1
            if self._repeats > self._allowed_repeats:
                raise SearchOver(f"{self._repeats} policies in a row were evaluated before")
            return self._known[policy]
        if len(self.candidates) == self._evaluations:
            raise SearchOver(f"all {self._evaluations} evaluations are spent")
        self._repeats = 0
        removed = self._feasible.structure.removed(policy)
        accuracy = self.accuracy(policy)
        candidate = Candidate(
            number=len(self.candidates),
            id=policy.id,
            arm="search",
            agent="",
            policy=policy,
            removed=removed,
            cost=self._feasible.costs.cost(removed),
            measurements=(Measurement("short", accuracy, 0.0, 1 - accuracy, 0.0),),
            seconds=0.0,
        )
        self.candidates.append(candidate)
        self._known[policy] = candidate
        return candidate
