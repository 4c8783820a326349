"""The layers that read a group, made ready for the arithmetic of its removal."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from autoprune.moments.solve import Elimination, Eliminator, losses, removal_order
from autoprune.moments.store import LayerMoments, Moments
from autoprune.structure import Group

__all__ = ["Reader", "Readers"]

_CACHE = 1 << 30  # bytes of inverses that are kept for the next group


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """One layer, or one convolution group of it, that reads a group.

    Its weights are scaled so that the loss of all inputs is 1: rows by the batch-norm that follows, if one does, and
    all by the power of the outputs. So losses of different layers can be added.

    Attributes:
        weight: `(outputs, d)` float64.
        inverse: `(d, d)`, inverse of the moments with their ridge; None of a layer that is too wide.
        columns: `(size, b)`: what each element is to it.
        alone: `(size,)` loss of each element without compensation, of a layer that is too wide; else None.
    """

    weight: torch.Tensor
    inverse: torch.Tensor | None
    columns: torch.Tensor
    alone: torch.Tensor | None = None

    def losses(self, order: torch.Tensor) -> torch.Tensor:
        """Return `(size + 1,)` relative losses while elements go in an order."""
        if self.inverse is not None:
            return losses(self.weight, self.inverse, self.columns[order])
        assert self.alone is not None
        return torch.cat([self.alone.new_zeros(1), self.alone[order].cumsum(0)])


class Readers:
    """Finds readers, and keeps what several groups need of one.

    Args:
        model: The dense network.
        moments: Of its layers.
        influences: Weight → `(outputs,)` power of the network's outputs that an error of each output makes (see
            `autoprune.moments.influence`); losses are then shares of that power, and layers without are no readers.
    """

    def __init__(
        self, model: nn.Module, moments: Moments, influences: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self._influences = influences
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._moments = moments
        self._inverses: OrderedDict[tuple[str, int], torch.Tensor] = OrderedDict()

    def of(self, group: Group) -> list[Reader]:
        """Return the readers of a group whose moments are known."""
        found = []
        for part in group.slices:
            layer = self._moments.get(part.tensor)
            known = self._influences is None or part.tensor in self._influences
            if part.role == "read" and layer is not None and known and part.dim == layer.input_dim:
                kernel = layer.mean.shape[1] // self._parameters[part.tensor].shape[part.dim]
                columns = part.positions[:, :, None] * kernel + torch.arange(kernel)
                found += self._parts(layer, columns.flatten(1).to(layer.mean.device))
        return found

    def order(self, group: Group) -> torch.Tensor | None:
        """Return a group's elements, least important first, or None where no reader's moments are known."""
        readers = self.of(group)
        if not readers:
            return None
        return removal_order([_eliminator(reader) for reader in readers], group.size)

    def losses(self, group: Group, order: torch.Tensor) -> torch.Tensor | None:
        """Return `(size + 1,)` sums of the readers' relative losses, in an order; None where no moments are known."""
        readers = self.of(group)
        return torch.stack([reader.losses(order).cpu() for reader in readers]).sum(0) if readers else None

    def saliency(self, weight: str, *, relative: bool = True) -> torch.Tensor | None:
        """Return for every weight the loss of its removal alone, in the weight's shape; None if not known.

        Optimal Brain Surgeon, `w² / (H⁻¹)_ii` (Hassibi & Stork 1993, eq. 5).

        Args:
            weight: The parameter's name.
            relative: Whether the loss is relative, as of `Reader`s: outputs count as the batch-norm that follows scales
                them, and all together as 1. Else all outputs count alike.
        """
        layer = self._moments.get(weight)
        if layer is None or layer.second is None:
            return None
        if relative and self._influences is not None and weight not in self._influences:
            return None
        parameter = self._parameters[weight]
        scaled = self._scaled(layer) if relative else layer.matrix(parameter).double()
        diagonals = torch.stack([self._inverse(layer, group).diagonal() for group in range(len(layer.mean))])
        saliency = scaled.square() / diagonals[:, None]
        flat = saliency.flatten(0, 1)
        return (flat.T if layer.input_dim == 0 else flat).reshape(parameter.shape)

    def _parts(self, layer: LayerMoments, columns: torch.Tensor) -> list[Reader]:
        scaled = self._scaled(layer)
        if layer.second is not None:
            return [Reader(part, self._inverse(layer, group), columns) for group, part in enumerate(scaled)]
        readers = []
        for group, part in enumerate(scaled):
            rows = layer.centred_samples(group)
            read, weights = rows[:, columns].transpose(0, 1), part[:, columns].transpose(0, 1)
            alone = (read.transpose(1, 2) @ read / len(rows)) * (weights.transpose(1, 2) @ weights)  # (size, b, b)
            readers.append(Reader(part, None, columns, alone.sum((1, 2))))
        return readers

    def _scaled(self, layer: LayerMoments) -> torch.Tensor:
        """Return `(groups, outputs, d)` weights whose output has power 1 in all, after its batch-norm."""
        weight = layer.matrix(self._parameters[layer.weight]).double()
        if self._influences is not None:
            return weight * self._influences[layer.weight].to(weight).sqrt().reshape(*weight.shape[:2], 1)
        if layer.norm is not None:
            weight = weight * norm_scale(self._model, layer.norm).reshape(*weight.shape[:2], 1)
        powers = []
        for group, part in enumerate(weight):
            if layer.second is None:
                powers.append((part @ layer.centred_samples(group).T).square().mean(1).sum())
            else:
                powers.append(((part @ layer.moments(group)) * part).sum())
        power = torch.stack(powers).sum()
        return weight / power.sqrt() if power > 0 else weight

    def _inverse(self, layer: LayerMoments, group: int) -> torch.Tensor:
        key = (layer.weight, group)
        if key not in self._inverses:
            self._inverses[key] = torch.cholesky_inverse(torch.linalg.cholesky(layer.moments(group)))
            while len(self._inverses) > 1 and sum(i.numel() * 8 for i in self._inverses.values()) > _CACHE:
                self._inverses.popitem(last=False)
        self._inverses.move_to_end(key)
        return self._inverses[key]


def norm_scale(model: nn.Module, name: str) -> torch.Tensor:
    """Return `(channels,)` float64: what a batch-norm in eval mode multiplies by."""
    norm = model.get_submodule(name)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
        raise TypeError(f"{name} is no batch-norm with statistics")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    return scale if not norm.affine else scale * norm.weight.detach().double()


class _Apart:
    """A reader that is too wide to compensate: every element costs what it costs alone."""

    def __init__(self, alone: torch.Tensor) -> None:
        self._alone = alone

    def costs(self, left: torch.Tensor) -> torch.Tensor:
        return self._alone[left]

    def remove(self, elements: torch.Tensor) -> None:
        pass


def _eliminator(reader: Reader) -> Elimination:
    if reader.inverse is None:
        assert reader.alone is not None
        return _Apart(reader.alone)
    return Eliminator(reader.weight, reader.inverse, reader.columns)
