"""`Moments`: what each layer reads, in second moments; collected in one pass, kept in a file."""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from autoprune.errors import RunError
from autoprune.inputs import evaluating
from autoprune.moments.reading import Use, Watch
from autoprune.moments.solve import regularised
from autoprune.structure import Structure
from autoprune.structure.trace import plain_attention

__all__ = ["LayerMoments", "Moments", "readers_of"]

MEMORY = 2 << 30
"""Bytes that moments may take where nothing else is said."""

_FEWEST = 64  # rows in place of moments, where memory allows for them


@dataclass(frozen=True, slots=True, eq=False)
class LayerMoments:
    """What one layer reads.

    Attributes:
        weight: Name of the parameter.
        bias: Name of the parameter that is added, if any.
        norm: Name of the batch-norm that the layer's output goes into, if it goes nowhere else.
        input_dim: Dimension of the weight along which inputs lie.
        rows: How many rows were looked at.
        mean: `(groups, d)` mean of the rows; d is inputs of a convolution group × kernel positions.
        second: `(groups, d, d)` mean of x xᵀ, about the mean where `centred`; None where that is too wide.
        samples: `(groups, n, d)` rows themselves, as they are read, in place of it.
    """

    weight: str
    bias: str | None
    norm: str | None
    input_dim: int
    rows: int
    mean: torch.Tensor
    second: torch.Tensor | None
    samples: torch.Tensor | None

    @property
    def centred(self) -> bool:
        """Whether a shift of the output's mean is made up for elsewhere: by a bias, or by the batch-norm."""
        return self.bias is not None or self.norm is not None

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight as `(groups, outputs of a group, d)`."""
        return as_matrix(weight, len(self.mean), self.input_dim)

    def moments(self, group: int) -> torch.Tensor:
        """Return `(d, d)` moments, about the mean where that is made up for, with their ridge; float64.

        Raises:
            ValueError: The layer is too wide for them.
        """
        return regularised(self.bare_moments(group), self.rows)

    def bare_moments(self, group: int) -> torch.Tensor:
        """Return the same without a ridge."""
        if self.second is None:
            raise ValueError(f"{self.weight} has rows in place of moments")
        return self.second[group].double()

    def centred_samples(self, group: int) -> torch.Tensor:
        """Return `(n, d)` rows, about their mean where that is made up for; float64.

        Raises:
            ValueError: The layer has moments in their place.
        """
        if self.samples is None:
            raise ValueError(f"{self.weight} has moments in place of rows")
        samples = self.samples[group].double()
        return samples - samples.mean(0) if self.centred else samples


def as_matrix(weight: torch.Tensor, groups: int, input_dim: int) -> torch.Tensor:
    """Return a weight as `(groups, outputs of a group, d)`."""
    weight = weight.detach()
    weight = weight.T if input_dim == 0 else weight.flatten(1)
    return weight.reshape(groups, -1, weight.shape[1])


def readers_of(structure: Structure) -> set[str]:
    """Return the names of the weights that read a group, or that are zeroed in place."""
    read = {part.tensor for group in structure for part in group.slices if part.role == "read"}
    return read | {group.pattern.tensor for group in structure if group.pattern is not None}


class Moments(Mapping[str, LayerMoments]):
    """The moments of a network's layers, by the names of their weights.

    Args:
        layers: By weight.
        notes: What was left out or made smaller, in words.
    """

    def __init__(self, layers: Mapping[str, LayerMoments], notes: Collection[str] = ()) -> None:
        self._layers = dict(layers)
        self.notes = tuple(notes)

    def __getitem__(self, weight: str) -> LayerMoments:
        return self._layers[weight]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @classmethod
    @torch.no_grad()
    def collect(
        cls,
        model: nn.Module,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        wanted: Collection[str],
        *,
        each: int = 20,
        memory: int = MEMORY,
        seed: int = 0,
    ) -> Self:
        """Run a network over batches and sum up what its layers read.

        Args:
            model: The dense network; it runs in eval mode, and its mode is restored.
            batches: `(inputs, targets)`, augmented as in training.
            wanted: Names of the weights whose inputs count.
            each: Rows (output positions, tokens) that are looked at, for every sample.
            memory: Bytes that all moments may take; the widest layers keep rows in place of moments beyond it, and
                fewer of them, if that is needed.
            seed: Of the rows.
        """
        batches = list(batches)
        sums = _Sums(model, wanted, sum(len(inputs) for inputs, _ in batches), each, memory, seed)
        with evaluating(model), plain_attention():
            for inputs, _ in batches[:1]:
                with sums.glance:
                    model(inputs[:2])
            sums.plan()
            with sums.watch:
                for inputs, _ in batches:
                    sums.samples = len(inputs)
                    model(inputs)
        return cls(*sums.result())

    def save(self, path: Path, digest: Mapping[str, str]) -> None:
        """Write a file, with what it was made from."""
        tensors: dict[str, torch.Tensor] = {}
        layers = []
        for place, layer in enumerate(self._layers.values()):
            layers.append({name: getattr(layer, name) for name in ("weight", "bias", "norm", "input_dim", "rows")})
            for name in ("mean", "second", "samples"):
                tensor = getattr(layer, name)
                if tensor is not None:
                    tensors[f"{place}.{name}"] = tensor.cpu().contiguous()
        document = {"layers": layers, "notes": self.notes, "digest": dict(digest)}
        temporary = path.with_name(f".{path.name}")
        save_file(tensors, temporary, {"moments": json.dumps(document)})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, digest: Mapping[str, str], device: torch.device | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            path: The file.
            digest: What it must have been made from.
            device: Where the moments go, as a rule the network's; the CPU by default.

        Raises:
            RunError: The file can't be read, or is of something else.
        """
        try:
            with safe_open(path, "pt") as file:
                document = json.loads(file.metadata()["moments"])
                tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 - no mapping
            layers = [
                LayerMoments(
                    **layer,
                    mean=tensors[f"{place}.mean"],
                    second=tensors.get(f"{place}.second"),
                    samples=tensors.get(f"{place}.samples"),
                )
                for place, layer in enumerate(document["layers"])
            ]
        except Exception as error:  # safetensors raises its own, and json and the records theirs
            raise RunError(f"{path} holds no moments ({error}); move it away to collect them anew") from error
        if document["digest"] != dict(digest):
            raise RunError(f"{path} holds the moments of another network or other data; move it away")
        return cls({layer.weight: layer for layer in layers}, document["notes"])


@dataclass(slots=True)
class _Sum:
    """What one weight reads, in the making; `keep` rows of it in place of moments, if any.

    Summed up is what rows differ by from the mean of the first ones: a mean far from zero would hide their spread.
    """

    first: Use
    mean: torch.Tensor
    keep: int = 0
    count: int = 0
    shift: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    second: torch.Tensor | None = None
    samples: list[torch.Tensor] = field(default_factory=list)

    @property
    def row(self) -> int:
        """Bytes of one row."""
        return self.mean.nbytes

    @property
    def whole(self) -> int:
        """Bytes of moments."""
        return self.mean.nbytes * self.mean.shape[1]

    def add(self, rows: torch.Tensor, share: float) -> None:
        """Add rows, which are this share of all that there will be."""
        if not self.count:
            self.shift = rows.mean(1)
            self.second = None if self.keep else rows.new_zeros(*self.mean.shape, self.mean.shape[1])
        differ = rows - self.shift[:, None]
        self.count += rows.shape[1]
        self.mean += differ.sum(1)
        if self.second is None:
            self.samples.append(spread(rows, math.ceil(self.keep * share)))
        else:
            self.second.baddbmm_(differ.transpose(1, 2), differ)

    def result(self, norm: str | None) -> LayerMoments:
        mean = self.mean.div_(self.count)
        centred = self.first.bias is not None or norm is not None
        if self.second is not None:
            self.second.div_(self.count).baddbmm_(mean[:, :, None], mean[:, None], alpha=-1)
        mean += self.shift
        if self.second is not None and not centred:
            self.second.baddbmm_(mean[:, :, None], mean[:, None])
        samples = spread(torch.cat(self.samples, 1), self.keep) if self.samples else None
        return LayerMoments(
            self.first.weight, self.first.bias, norm, self.first.input_dim, self.count, mean, self.second, samples
        )


def spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` of `(groups, rows, d)`, evenly spread; all of them where there are no more."""
    if count >= rows.shape[1]:
        return rows
    return rows[:, torch.linspace(0, rows.shape[1] - 1, count).long().to(rows.device)]


class _Sums:
    """Moments in the making."""

    def __init__(
        self, model: nn.Module, wanted: Collection[str], samples: int, each: int, memory: int, seed: int
    ) -> None:
        self.glance = Watch(model, before=self._meet)
        self.watch = Watch(model, before=self._add)
        self.samples = 0
        self._wanted = [name for name, _ in model.named_parameters() if name in wanted]
        self._each = each
        self._total = samples
        self._memory = memory
        self._generator = torch.Generator().manual_seed(seed)
        self._sums: dict[str, _Sum] = {}
        self._unlike: set[str] = set()

    def _meet(self, use: Use) -> None:
        if use.weight not in self._wanted:
            return
        dtype = use.inputs.dtype if use.inputs.dtype == torch.float64 else torch.float32
        use = replace(use, inputs=use.inputs.new_empty(0, *use.inputs.shape[1:]))  # what was read may go
        known = self._sums.get(use.weight)
        if known is None:
            mean = torch.zeros(use.groups, use.width, dtype=dtype, device=use.inputs.device)
            self._sums[use.weight] = _Sum(use, mean)
        elif (use.groups, use.width, use.input_dim) != (*known.mean.shape, known.first.input_dim):
            self._unlike.add(use.weight)
        elif use.bias != known.first.bias:
            known.first = replace(known.first, bias=None)

    def plan(self) -> None:
        """Choose for the widest layers how many rows to keep in place of moments, so that all fit.

        As few layers as can be, and as many rows of each as there is room for, up to one of every sample. Another layer
        makes room where there is none for 64 rows of each, or for a sixteenth of what their moments take.
        """
        for name in self._unlike:
            del self._sums[name]
        sums = sorted(self._sums.values(), key=lambda one: one.whole)
        room = self._memory - sum(one.row for one in sums)  # the means
        for moments in range(len(sums), -1, -1):
            left = room - sum(one.whole for one in sums[:moments])
            wide = sums[moments:]
            if left >= sum(one.row * min(self._total, _FEWEST, one.mean.shape[1] // 16 + 1) for one in wide):
                break
        for place, one in enumerate(wide):
            one.keep = max(1, min(self._total, one.mean.shape[1], left // sum(other.row for other in wide[place:])))
            left -= one.keep * one.row

    def _add(self, use: Use) -> None:
        if use.weight in self._sums:
            rows = use.rows(use.picks(self.samples, self._each, self._generator))
            known = self._sums[use.weight]
            known.add(rows.to(known.mean.dtype), self.samples / self._total)

    def result(self) -> tuple[dict[str, LayerMoments], list[str]]:
        """Return the moments, and what there is to say of them."""
        norms = self.watch.norms
        layers = {name: one.result(norms.get(name)) for name, one in self._sums.items() if one.count}
        notes = [
            f"{name} reads {layer.mean.numel()} inputs: {layer.samples.shape[1]} rows are kept in place of "
            "their moments"
            for name, layer in layers.items()
            if layer.samples is not None
        ]
        notes += [f"what {name} reads was not seen" for name in self._wanted if name not in layers]
        return layers, notes
