"""Where a network's weights meet their inputs: each convolution and matrix product, seen as it runs.

Seen at the dispatcher, so that it does not matter whether a module, a functional call or torch's own attention runs it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Picks", "Use", "Watch"]


@dataclass(frozen=True, slots=True, eq=False)
class Picks:
    """Which rows of a layer's inputs are looked at.

    Attributes:
        sample: `(rows,)` indices along the first dimension.
        places: Of a convolution, for every spatial dimension `(rows,)` output positions.
    """

    sample: torch.Tensor
    places: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One time that a weight meets an input, about to happen.

    A row is what one output position reads: of a linear layer the features, of a convolution a patch, `(d,)` with
    d = channels of one convolution group × kernel positions, channels first as in the weight.

    Attributes:
        weight: Name of the parameter.
        bias: Name of the parameter that is added, if any.
        groups: Of a convolution; 1 for a linear layer.
        input_dim: Dimension of the weight along which inputs lie.
        inputs: As the operator gets them.
        kernel: Of a convolution, sizes along the spatial dimensions.
        stride: Likewise.
        padding: Likewise.
        dilation: Likewise.
    """

    weight: str
    bias: str | None
    groups: int
    input_dim: int
    inputs: torch.Tensor
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def places(self) -> tuple[int, ...]:
        """Sizes of a convolution's output along the spatial dimensions."""
        sizes = zip(self.inputs.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)

    @property
    def width(self) -> int:
        """Length of a row."""
        return self.inputs.shape[1] // self.groups * math.prod(self.kernel)

    def picks(self, samples: int, each: int, generator: torch.Generator) -> Picks:
        """Choose rows at random: about `each` for every one of `samples`, or all, if there are not so many."""
        first, device = len(self.inputs), self.inputs.device
        positions = math.prod(self.places) if self.kernel else 1
        wanted = min(first * positions, samples * each)
        if wanted == first * positions:
            chosen = torch.arange(wanted)
        else:
            whole = torch.arange(wanted) * (first * positions) // wanted  # spread over all, then moved at random
            span = first * positions // wanted
            chosen = whole + torch.randint(span, (wanted,), generator=generator)
        sample, place = chosen // positions, chosen % positions
        places = []
        for size in reversed(self.places if self.kernel else ()):
            places.append((place % size).to(device))
            place = place // size
        return Picks(sample.to(device), tuple(reversed(places)))

    def rows(self, picks: Picks) -> torch.Tensor:
        """Return `(groups, rows, d)` of what the layer reads there."""
        if not self.kernel:
            return self.inputs[picks.sample].unsqueeze(0)
        ndim = len(self.kernel)
        index = [picks.sample.reshape(-1, *[1] * ndim)]
        outside = torch.zeros((), dtype=torch.bool, device=self.inputs.device)
        for dim, (place, size, kernel, stride, padding, dilation) in enumerate(
            zip(picks.places, self.inputs.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        ):
            along = torch.arange(kernel, device=place.device) * dilation - padding
            shape = [1] * (ndim + 1)
            shape[dim + 1] = kernel
            position = place.reshape(-1, *[1] * ndim) * stride + along.reshape(shape)
            outside = outside | (position < 0) | (position >= size)
            index.append(position.clamp(0, size - 1))
        patches = self.inputs.movedim(1, -1)[tuple(index)]  # without padding all of what is read for a few rows of it
        patches = patches.masked_fill_(outside.unsqueeze(-1), 0).movedim(-1, 1)  # (rows, channels, *kernel)
        return patches.reshape(len(patches), self.groups, -1).transpose(0, 1)

    def outputs(self, result: torch.Tensor, picks: Picks) -> torch.Tensor:
        """Return `(rows, outputs)` of what the layer gave there."""
        return result.movedim(1, -1)[(picks.sample, *picks.places)] if self.kernel else result[picks.sample]


@dataclass(slots=True)
class _Output:
    weight: str
    norm: str | None = None
    alone: bool = True


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Calls back at each use of a weight, while a network runs under it.

    Transposed convolutions, parts of packed weights and weights that are computed first are not seen.

    Args:
        model: The network.
        before: Called with a use before it happens; may change the weights in place.
        after: Called with the use and the operator's result.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Use], None] = lambda _: None,
        after: Callable[[Use, torch.Tensor], None] = lambda *_: None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before, self._after = before, after
        self._parameters: dict[int, tuple[str, torch.Tensor]] = {}
        self._statistics: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            self._parameters[parameter.untyped_storage().data_ptr()] = (name, parameter)
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                self._statistics[module.running_mean.data_ptr()] = name
        self._outputs: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._seen: dict[str, _Output] = {}
        self._sources: defaultdict[str, set[str | None]] = defaultdict(set)
        self._aside = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave out of account what runs inside a `with`: it is not the network's."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    @property
    def norms(self) -> Mapping[str, str]:
        """Weight → the batch-norm that every output of its layer goes into, and nothing else does; nor do they."""
        return {
            out.weight: out.norm
            for out in self._seen.values()
            if out.alone and out.norm is not None and self._sources[out.norm] == {out.weight}
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        if self._aside:
            return func(*args, **(kwargs or {}))
        self._note_readers(func, args)
        use = None if kwargs else self._use(func, args)  # a product that is scaled says so there
        if use is None:
            return func(*args, **(kwargs or {}))
        self._before(use)
        result = func(*args, **(kwargs or {}))
        self._after(use, result)
        self._outputs[result] = self._seen.setdefault(use.weight, _Output(use.weight))
        return result

    def _note_readers(self, func: Any, args: Sequence[Any]) -> None:
        """Keep in mind what each layer's output goes into."""
        norm = None
        if "batch_norm" in func.__name__ and len(args) > 3 and isinstance(args[3], torch.Tensor):
            norm = self._statistics.get(args[3].data_ptr())
        if norm is not None:
            self._sources[norm].add(self._outputs[args[0]].weight if args[0] in self._outputs else None)
        for place, value in enumerate(args):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if not isinstance(tensor, torch.Tensor) or tensor not in self._outputs:
                    continue
                output = self._outputs[tensor]
                into = norm if place == 0 else None
                output.alone = output.alone and into is not None and output.norm in (None, into)
                output.norm = into

    def _use(self, func: Any, args: Sequence[Any]) -> Use | None:
        packet = func.overloadpacket
        if packet is torch.ops.aten.convolution and not args[6]:
            named = self._named(args[1])
            if named is not None and args[1].shape == named[1].shape:
                bias = self._named(args[2])
                kernel = tuple(args[1].shape[2:])
                stride, padding, dilation = (tuple(_each(value, len(kernel))) for value in args[3:6])
                return Use(named[0], bias and bias[0], args[8], 1, args[0], kernel, stride, padding, dilation)
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm):
            added, inputs, matrix = (None, *args[:2]) if packet is torch.ops.aten.mm else args[:3]
            named = self._named(matrix)
            if named is not None and named[1].dim() == 2:
                whole = named[1]
                across = matrix.shape == whole.shape[::-1] and matrix.stride() == whole.stride()[::-1]
                if across or (matrix.shape == whole.shape and matrix.stride() == whole.stride()):
                    bias = None if added is None or added.dim() != 1 else self._named(added)
                    return Use(named[0], bias and bias[0], 1, int(across), inputs)
        return None

    def _named(self, tensor: torch.Tensor | None) -> tuple[str, torch.Tensor] | None:
        if tensor is None:
            return None
        named = self._parameters.get(tensor.untyped_storage().data_ptr())
        return None if named is None or tensor.storage_offset() != named[1].storage_offset() else named


def _each(value: Sequence[int], dims: int) -> Sequence[int]:
    return list(value) * dims if len(value) == 1 else value
