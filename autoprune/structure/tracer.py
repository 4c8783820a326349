"""What every operator does to labels: the rules of a trace, operator by operator.

A few dozen operators are left below autograd, each of one of a few sorts (`_VIEWS`, `_ELEMENTWISE`, …) that say what it
does to labels (see `labels.py`). What is in no table ends the labels that flow into it: they are blocked, with the
operator's name, and the run goes on.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from autoprune.errors import StructureError
from autoprune.structure.labels import Area, Maps, compact, distinct, varying
from autoprune.structure.seen import Block, LeafCall, Product, Storage, Trace

__all__ = ["Tracer", "tensors"]


# -- the modules that are running -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Running:
    name: str
    module: nn.Module
    start: int
    inputs: tuple[tuple[tuple[int, ...], Area], ...]
    source: torch.Tensor | None
    chain: set[int] = field(default_factory=set)
    branches: list[tuple[int, int]] = field(default_factory=list)
    blocks_before: int = 0
    is_leaf: bool = True


# -- the operators ----------------------------------------------------------------------------------------------------
# Names are without the underscore at the end that marks an operator as in-place.

_VIEWS_NAMES = """
    _reshape_alias _unsafe_view channel_shuffle constant_pad_nd diagonal expand flip index index_select narrow
    native_channel_shuffle permute pixel_shuffle pixel_unshuffle repeat reshape roll select slice split
    split_with_sizes squeeze t transpose unbind unfold unsafe_split unsafe_split_with_sizes unsqueeze view
"""
_VIEWS = frozenset(_VIEWS_NAMES.split())
"""What rearranges positions: it does the same to the labels."""

_ELEMENTWISE_NAMES = """
    _prelu_kernel _to_copy alias bernoulli clone contiguous copy detach dropout empty_like fill full_like hardswish
    lift_fresh log_sigmoid_forward masked_fill native_dropout normal ones_like prelu rand_like randn_like
    rrelu_with_noise rsub tril triu uniform zero zeros_like
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())
"""What meets position with position: labels that meet belong together. Most such operators have torch's own tag."""

_FRESH = frozenset({"new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "empty_strided"})
"""What makes a tensor whose size the code states."""

_SPATIAL = {
    "_adaptive_avg_pool2d": 2,
    "_adaptive_avg_pool3d": 3,
    "adaptive_avg_pool1d": 1,
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
    "avg_pool1d": 1,
    "avg_pool2d": 2,
    "avg_pool3d": 3,
    "fractional_max_pool2d": 2,
    "fractional_max_pool3d": 3,
    "grid_sampler_2d": 2,
    "grid_sampler_3d": 3,
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "max_unpool2d": 2,
    "max_unpool3d": 3,
    "reflection_pad1d": 1,
    "reflection_pad2d": 2,
    "reflection_pad3d": 3,
    "replication_pad1d": 1,
    "replication_pad2d": 2,
    "replication_pad3d": 3,
    "upsample_bicubic2d": 2,
    "upsample_bilinear2d": 2,
    "upsample_linear1d": 1,
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 2,
    "upsample_nearest3d": 3,
    "upsample_trilinear3d": 3,
    "_upsample_bicubic2d_aa": 2,
    "_upsample_bilinear2d_aa": 2,
    "_upsample_nearest_exact1d": 1,
    "_upsample_nearest_exact2d": 2,
    "_upsample_nearest_exact3d": 3,
}
"""What mixes positions along the last dimensions only, with their number."""

_REDUCTIONS = {
    "all": 1,
    "amax": 1,
    "amin": 1,
    "any": 1,
    "argmax": 1,
    "argmin": 1,
    "linalg_vector_norm": 2,
    "logsumexp": 1,
    "max": 1,
    "mean": 1,
    "median": 1,
    "min": 1,
    "norm": 2,
    "prod": 1,
    "std": 1,
    "std_mean": 1,
    "sum": 1,
    "var": 1,
    "var_mean": 1,
}
"""What reduces dimensions, with the argument that names them."""

_ALONG = {
    "_softmax": 1,
    "_safe_softmax": 1,
    "_log_softmax": 1,
    "cummax": 1,
    "cummin": 1,
    "cumprod": 1,
    "cumsum": 1,
    "sort": 1,
    "topk": 2,
}
"""What mixes positions along one dimension and keeps the others, with the argument that names it."""

_BATCH_NORMS_NAMES = """
    _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm native_batch_norm
"""
_BATCH_NORMS = frozenset(_BATCH_NORMS_NAMES.split())

_PRODUCTS = {
    # the operands' positions among the arguments, and the names of their dimensions and of the output's
    "mm": (0, 1, "nk", "km", "nm"),
    "mv": (0, 1, "nk", "k", "n"),
    "bmm": (0, 1, "bnk", "bkm", "bnm"),
    "addmm": (1, 2, "nk", "km", "nm"),
    "addmv": (1, 2, "nk", "k", "n"),
    "baddbmm": (1, 2, "bnk", "bkm", "bnm"),
}


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
    """Follows labels through every operator of one run."""

    def __init__(self, model: nn.Module, result: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._result = result
        self._nodes = result.nodes
        self._names: dict[int, str] = {}
        self._by_storage: dict[int, str] = {}
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            self._names[id(tensor)] = name
            self._by_storage[tensor.untyped_storage()._cdata] = name
        self._weights = {name for name, _ in model.named_parameters()}
        self._kept = list(model.parameters()) + list(model.buffers())  # so that no id is used twice
        self._maps: Any = WeakTensorKeyDictionary()
        self._tokens: Any = WeakTensorKeyDictionary()
        self._across: tuple[str, Maps, tuple[int, ...]] | None = None
        self._unused: Any = WeakTensorKeyDictionary()
        self._token = 0
        self._at = 0
        self._looking = False  # whether operators that run are the tracer's own
        self._active: list[_Running] = []
        self._storage_of: dict[int, int] = {}
        self._finalizers: list[Any] = []

    # modules

    def begin(self, inputs: Any) -> None:
        """Take note of what the network is called with; called once, before the run."""
        for tensor in tensors(inputs):
            self._allocated(tensor, -1)

    def close(self) -> None:
        """Let go of the tensors that are still there."""
        for finalizer in self._finalizers:
            finalizer.detach()

    def end(self, outputs: Any) -> None:
        """Take note of what the network returned; called once, after the run."""
        found = tensors(outputs)
        if not found:
            raise StructureError(
                f"there is no tensor in what the network returns, a {type(outputs).__name__}: wrap it in a module that "
                "returns one, or a tuple or mapping of them"
            )
        for tensor in found:
            self._used(tensor)
            for label in self._of(tensor):
                self._nodes.block(label, "its elements are the network's output")

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Take note of a module that begins to run; a forward pre-hook but for the name."""
        for running in self._active[-1:]:
            running.is_leaf = False
        self._result.names.setdefault(name, len(self._result.names))
        given = tensors((args, kwargs))
        source = given[0] if given else None
        self._looking = True
        shapes = tuple((tuple(t.shape), Area.of(t.shape, self._of(t))) for t in given)
        self._looking = False
        running = _Running(name, module, self._at, shapes, source, blocks_before=len(self._result.blocks))
        if source is not None:
            running.chain.add(self._token_of(source))
        self._active.append(running)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Take note of a module that has run, and whether it is a block; a forward hook."""
        running = self._active.pop()
        if running.is_leaf:
            self._result.calls.append(LeafCall(running.start, running.name, running.inputs))
        elif (
            running.branches
            and running.name
            and isinstance(output, torch.Tensor)
            and running.source is not None
            and output.shape == running.source.shape
            and self._token_of(output) in running.chain
            and len(self._result.blocks) == running.blocks_before
        ):
            ends = [self._storage_of.get(t.untyped_storage()._cdata) for t in (running.source, output)]
            if ends[0] is not None and ends[1] is not None:
                self._result.blocks.append(
                    Block(running.name, running.start, self._at, tuple(running.branches), ends[0], ends[1])
                )

    @property
    def _where(self) -> str:
        return self._active[-1].name if self._active else ""

    @property
    def _who(self) -> str:
        return f"`{self._where}`" if self._where else "the network's own code"

    def _token_of(self, tensor: torch.Tensor) -> int:
        if tensor not in self._tokens:
            self._renew(tensor)
        return int(self._tokens[tensor])

    def _renew(self, tensor: torch.Tensor) -> int:
        self._token += 1
        self._tokens[tensor] = self._token
        return self._token

    # maps

    def _of(self, tensor: torch.Tensor) -> Maps:
        """Return the maps of a tensor; a parameter or buffer gets its nodes the first time it is met."""
        found: Maps | None = self._maps.get(tensor)
        if found is not None:
            return found
        name = self._names.get(id(tensor))
        if name is None:
            return ()
        maps = []
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                shape = [1] * tensor.dim()
                shape[dim] = size
                maps.append(self._nodes.side(name, dim, size).reshape(shape).expand(tensor.shape))
        self._maps[tensor] = tuple(maps)
        return tuple(maps)

    def _parameter(self, tensor: torch.Tensor) -> str | None:
        return self._by_storage.get(tensor.untyped_storage()._cdata)

    def _allocated(self, tensor: torch.Tensor, at: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._by_storage or key in self._storage_of:
            return
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        maps = self._maps.get(tensor, ()) if whole else ()
        area = Area.of(tensor.shape, maps) if whole else Area(storage.nbytes() // tensor.element_size(), ())
        self._storage_of[key] = len(self._result.storages)
        record = Storage(at, area, tensor.element_size())
        self._result.storages.append(record)

        def freed() -> None:
            record.died = self._at
            del self._storage_of[key]

        self._finalizers.append(weakref.finalize(storage, freed))

    # operators

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._looking:
            return function(*args, **kwargs)
        if torch.is_inference_mode_enabled() and function._can_decompose():  # else that is done on the way here
            with self:
                return function.decompose(*args, **kwargs)
        output = function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        in_place = name.endswith("_") and not name.startswith("__")
        base = name.removesuffix("_")
        if in_place:
            output = args[0]
        before = [self._token_of(t) if isinstance(t, torch.Tensor) else 0 for t in args[:2]]
        inputs = _tensors((args, kwargs))
        for tensor in inputs:
            self._used(tensor)
        if base in _PRODUCTS or base == "convolution" or any(self._is_labelled(t) for t in inputs):
            maps = self._follow(base, function, args, kwargs, output)
            for tensor, its in zip(_tensors(output), maps, strict=False):
                if id(tensor) not in self._names:
                    self._maps[tensor] = its
                if self._across:
                    self._unused[tensor] = self._at, *self._across
            self._across = None
        for tensor in _tensors(output):
            self._allocated(tensor, self._at)
        self._chain(base, args, output, before)
        self._result.operators.append(function._schema.name)
        self._at += 1
        return output

    def _is_labelled(self, tensor: torch.Tensor) -> bool:
        return bool(self._maps.get(tensor)) or id(tensor) in self._names

    def _chain(self, base: str, args: Any, output: Any, before: list[int]) -> None:
        """Notice what is still the input of a running module, but for branches that were added to it."""
        if not isinstance(output, torch.Tensor) or not args or not isinstance(args[0], torch.Tensor):
            return
        token = self._renew(output)
        for running in self._active:
            if base == "add" and len(args) > 1 and isinstance(args[1], torch.Tensor):
                ours = [place for place in (0, 1) if before[place] in running.chain]
                if len(ours) == 1 and args[0].shape == args[1].shape == output.shape:
                    running.chain.add(token)
                    running.branches.append((self._at, 1 - ours[0]))
            elif base in ("relu", "clone", "alias", "detach", "dropout", "contiguous") and before[0] in running.chain:
                running.chain.add(token)

    def _follow(self, base: str, function: Any, args: Any, kwargs: Any, output: Any) -> Sequence[Maps]:
        outputs = _tensors(output)
        if base in _FRESH:
            return [()] * len(outputs)
        if base == "as_strided" and [n for n in args[0].shape if n > 1] == [n for n in outputs[0].shape if n > 1]:
            base = "view"  # how torch spells the removal of dimensions of size 1
        if base in _VIEWS:
            return self._rearranged(base, function, args, kwargs, outputs)
        if base in ("view_as_complex", "view_as_real"):
            return [self._complex(base, args, outputs[0])]
        if base in _ELEMENTWISE or (torch.Tag.pointwise in function.tags and outputs):
            operands = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            return [self._met([(_stated(t), self._of(t)) for t in operands], outputs[0].shape)] * len(outputs)
        if base in ("cat", "stack"):
            return [self._joined(base, args, kwargs, outputs[0])]
        if base == "convolution":
            return [self._convolved(args, outputs[0])]
        if base in _PRODUCTS:
            return [self._multiplied(base, args, outputs[0])]
        if base in _BATCH_NORMS:
            return self._batch_normed(args, outputs)
        if base == "native_layer_norm":
            return [self._layer_normed(args, outputs[0])]
        if base == "native_group_norm":
            return self._group_normed(args, outputs)
        if base == "_weight_norm_interface":
            return self._weight_normed(args, outputs)
        if base == "embedding":
            return [self._looked_up(args, outputs[0])]
        if base == "glu":
            return [self._gated(args, outputs[0])]
        if base in _SPATIAL:
            return self._spatial(base, args, outputs)
        if base in _REDUCTIONS:
            return self._reduced(base, args, kwargs, outputs)
        if base in _ALONG:
            return self._along_one(base, args, outputs)
        self._result.unfollowed[base] = self._result.unfollowed.get(base, 0) + 1
        for tensor in _tensors((args, kwargs)):
            if self._parameter(tensor) in self._weights:
                self._wrote(self._of(tensor)[:1])
            for label in self._of(tensor):
                self._nodes.block(label, f"{self._who} runs `{base}` on it, whose effect on channels is not known")
        return [()] * len(outputs)

    def _rearranged(
        self, base: str, function: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]
    ) -> Sequence[Maps]:
        changed: list[list[torch.Tensor]] = [[] for _ in outputs]
        rest, kwargs = tree_map_only(torch.Tensor, torch.Tensor.cpu, (args[1:], kwargs))  # indices
        for label in self._of(args[0]):
            if base in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
                moved: Any = label.reshape(outputs[0].shape)
            elif base == "constant_pad_nd":
                moved = _padded(label, args[1], outputs[0].shape)
            else:
                moved = function(label, *rest, **kwargs)
            for place, small in enumerate(_tensors(moved)):
                aliased = small.untyped_storage()._cdata == label.untyped_storage()._cdata
                changed[place].append(small if aliased and len(varying(small)) < 2 else compact(small))
            self._note(base, label, [maps[-1] for maps in changed], args[1] if len(args) > 1 else None)
        return [tuple(label for label in maps if bool(varying(label))) for maps in changed]

    def _note(self, base: str, label: torch.Tensor, moved: list[torch.Tensor], number: Any) -> None:
        """Remember what holds only for a whole dimension, to explain why its indices can't leave."""
        dims = varying(label)
        if len(dims) != 1:
            return
        dim, before = dims[0], label.shape[dims[0]]
        grid = None
        if base in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
            after = varying(moved[0])
            if len(after) < 2:
                return
            grid = _flat(moved[0], [d for d in range(moved[0].dim()) if d not in after]).squeeze()
            text = f"reshapes the {before} of them into {_times(grid.shape)}"
        elif base in ("channel_shuffle", "native_channel_shuffle", "pixel_shuffle"):
            grid = _line(label).reshape((-1, number**2) if base == "pixel_shuffle" else (number, -1))
            text = f"shuffles the {before} of them as {_times(grid.shape)}"
        elif base in ("slice", "split", "split_with_sizes", "narrow") and moved[0].shape[dim] != before:
            text = f"splits the {before} of them at {' + '.join(str(small.shape[dim]) for small in moved)}"
        elif base in ("index", "index_select") and (picked := len(distinct(moved[0]))) < before:
            text = f"picks {picked} of the {before} of them by number"
        else:
            return
        self._nodes.mark(self._nodes.notes, label, f"{self._who} {text}")
        if grid is not None:
            self._nodes.grids.append((grid.numpy(), f"{self._who} {text}"))

    def _complex(self, base: str, args: Any, output: torch.Tensor) -> Maps:
        """Follow pairs of numbers into complex ones and back."""
        if base == "view_as_real":
            return tuple(label.unsqueeze(-1).expand(output.shape) for label in self._of(args[0]))
        last = args[0].dim() - 1
        return tuple(
            label.squeeze(last) for label in self._unmixed(self._of(args[0]), [last], f"{self._who} splits it")
        )

    def _met(self, operands: Sequence[tuple[Sequence[int], Maps]], shape: Sequence[int]) -> Maps:
        """Return the maps where operands meet position by position, as elementwise operators do with broadcasting."""
        shape = tuple(shape)
        everything: list[tuple[set[int], torch.Tensor]] = []
        own: list[set[int]] = []
        maps_of: list[list[set[int]]] = []
        for size, maps in operands:
            offset = len(shape) - len(size)
            own.append({offset + d for d, n in enumerate(size) if n > 1})
            maps_of.append([])
            for label in maps:
                wide = label.expand(shape)
                everything.append((set(varying(wide)), wide))
                maps_of[-1].append(set(varying(wide)))
        result = []
        while everything:
            dims, label = everything.pop()
            cluster = [(dims, label)]
            grown = True
            while grown:
                near = [item for item in everything if item[0] & dims]
                everything = [item for item in everything if not item[0] & dims]
                cluster += near
                dims = dims.union(*(item[0] for item in near))
                grown = bool(near)
            cluster.sort(key=lambda item: -len(item[0]))
            whole = cluster[0][1]
            for _, other in cluster[1:]:
                self._nodes.unite(whole, other, f"{self._who} joins it with padding of a fixed size")
            fixed = any(
                there & dims and not any(m & dims for m in maps) for there, maps in zip(own, maps_of, strict=True)
            )
            if fixed or cluster[0][0] != dims:
                how = "a tensor of a fixed size" if fixed else "another along several dimensions"
                for _, label in cluster:
                    self._nodes.block(label, f"{self._who} combines it with {how}")
            else:
                result.append(whole)
        return tuple(result)

    def _joined(self, base: str, args: Any, kwargs: Any, output: torch.Tensor) -> Maps:
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.dim()
        parts = [(t, self._of(t)) for t in args[0] if t.dim() + (base == "stack") == output.dim()]
        if base == "stack":
            parts = [(t.unsqueeze(dim), tuple(label.unsqueeze(dim) for label in maps)) for t, maps in parts]
        along, across = [], []
        for tensor, maps in parts:
            along.append(next((m for m in maps if dim in varying(m)), None))
            across.append((tensor, tuple(m for m in maps if dim not in varying(m))))
        one = [1 if d == dim else n for d, n in enumerate(output.shape)]
        result = list(
            self._met(
                [([1 if d == dim else n for d, n in enumerate(t.shape)], _narrowed(m, dim)) for t, m in across], one
            )
        )
        result = [label.expand(output.shape) for label in result]
        if any(label is not None for label in along):
            filled = [
                torch.zeros(1, dtype=torch.int64).expand(t.shape) if label is None else label
                for (t, _), label in zip(parts, along, strict=True)
            ]
            others = {d for label in along if label is not None for d in varying(label)} - {dim}
            if others or any(dim in varying(m) for m in result):
                for label in filled:
                    self._nodes.block(label, f"{self._who} joins tensors along several dimensions")
            else:
                line = torch.cat([_flat(label, [d for d in range(output.dim()) if d != dim]) for label in filled], dim)
                result.append(line.expand(output.shape))
        return tuple(result)

    def _convolved(self, args: Any, output: torch.Tensor) -> Maps:
        inputs, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
        kept = self._unmixed(self._of(inputs), range(2, inputs.dim()), f"{self._who} convolves across it")
        for label in kept:
            if varying(label) != (1,):
                self._nodes.block(label, f"{self._who} convolves across it")
        read = _along(tuple(kept), 1)
        weights = self._of(weight)
        column = [1, output.shape[1], *[1] * (output.dim() - 2)]
        if groups == 1:
            out_dim = 1 if transposed else 0
            self._consumed(read, _along(weights, 1 - out_dim))
            out = _along(weights, out_dim)
        else:
            out = self._grouped(read, weight, weights, groups, output.shape[1], transposed)
        result = () if out is None else (out.reshape(column).expand(output.shape),)
        self._wrote(result)
        counted = inputs if transposed else output  # each of its positions meets each weight of a filter once
        area = Area.of(weight.shape, weights)
        macs = Area(area.fixed * (counted.numel() // counted.shape[1]), area.maps)
        self._result.products.append(Product(self._at, self._parameter(weight), macs))
        if bias is None:
            return result
        biases = tuple(label.reshape(column) for label in self._of(bias))
        return self._met([(output.shape, result), (column, biases)], output.shape)

    def _grouped(
        self,
        read: torch.Tensor | None,
        weight: torch.Tensor,
        weights: Maps,
        groups: int,
        outputs: int,
        transposed: bool,
    ) -> torch.Tensor | None:
        """Return the labels `(outputs,)` of a grouped convolution.

        Where there are more groups than channels in each, whole groups can leave, with all they read and write; a
        depthwise convolution is the extreme. Otherwise, and where the network's input is read, the channels with the
        same place in every group leave together.
        """
        rows, columns = _along(weights, 0), _along(weights, 1)
        each = weight.shape[0] // groups if transposed else weight.shape[1]
        reason = f"{self._who} is a convolution in {groups} groups, which must stay alike"
        if rows is None:
            return None
        if read is None and weight.shape[0] == groups:
            self._nodes.block(rows, "it goes with the network's input")
            return None if transposed else rows
        if read is not None and groups >= each:
            if columns is not None:
                self._nodes.block(columns, reason)
            wide, tall = read.reshape(groups, -1), rows.reshape(groups, -1)
            self._nodes.unite(wide, wide[:, :1].expand_as(wide), reason)
            self._nodes.unite(tall, wide[:, :1].expand_as(tall), reason)
            self._sized(weight, "groups", groups, weight.shape[0] // groups)
            return wide[:, :1].expand(groups, outputs // groups).reshape(-1) if transposed else rows
        if transposed:
            for label in (read, rows, columns):
                if label is not None:
                    self._nodes.block(label, reason)
            return None
        tall = rows.reshape(groups, -1)
        self._nodes.unite(tall, tall[:1].expand_as(tall), reason)
        if read is not None:
            wide = read.reshape(groups, -1)
            self._nodes.unite(wide, wide[:1].expand_as(wide), reason)
            read = wide[0]
        self._consumed(read, columns)
        return rows

    def _sized(self, tensor: torch.Tensor, attribute: str, value: int, positions: int) -> None:
        """Remember that an attribute of the running module shrinks by one with so many positions of a tensor."""
        if not self._active or getattr(self._active[-1].module, attribute, None) != value:
            return
        own = self._active[-1].module._parameters.get("weight")  # what a derived weight, as a standardised one, is of
        name = self._parameter(tensor if own is None or own.shape[0] != tensor.shape[0] else own)
        if name is not None:
            self._result.sized[name] = (self._where, attribute, positions)

    def _consumed(self, read: torch.Tensor | None, taken: torch.Tensor | None) -> None:
        """Join what a layer reads, `(inputs,)`, to the dimension of its weight, `(inputs,)`, that consumes it."""
        if taken is not None:
            self._nodes.read.append(distinct(taken))
        if read is not None and taken is not None:
            self._nodes.unite(taken, read, "it reads padding of a fixed size")
            return
        for label in (read, taken):
            if label is not None:
                self._nodes.block(label, f"{self._who} reads it with weights of a fixed size")

    def _wrote(self, maps: Maps) -> None:
        self._nodes.wrote.extend(distinct(label) for label in maps)

    def _multiplied(self, base: str, args: Any, output: torch.Tensor) -> Maps:
        first, second, first_names, second_names, out_names = _PRODUCTS[base]
        index = first_names + "".join(n for n in second_names if n not in first_names)
        gone = next(n for n in index if n not in out_names)
        at = index.index(gone)
        sizes: dict[str, int] = {}
        operands = []  # of each: its own size and its maps, both over all dimensions of the product
        for tensor, names in ((args[first], first_names), (args[second], second_names)):
            sizes |= dict(zip(names, tensor.shape, strict=True))
            own = [dict(zip(names, tensor.shape, strict=True)).get(n, 1) for n in index]
            operands.append((own, [_spread(label, names, index) for label in self._of(tensor)]))
        shape = [sizes[n] for n in index]
        over = [next((m for m in maps if at in varying(m)), None) for _, maps in operands]
        parameters = [self._parameter(args[place]) for place in (first, second)]
        weight = parameters[1] if parameters[1] in self._weights else parameters[0]
        joint = None
        if over[0] is not None and over[1] is not None:
            joint = over[0].expand(_both(over[0], over[1]))
            other = over[1].expand(joint.shape)
            self._nodes.unite(joint, other, f"{self._who} multiplies it with padding of a fixed size")
            if len(varying(other)) > len(varying(joint)):
                joint = other
            self._nodes.read.extend(
                distinct(label)
                for label, parameter in zip(over, parameters, strict=True)
                if label is not None and parameter is not None
            )
        else:
            for label in over:
                if label is not None:
                    self._nodes.block(label, f"{self._who} multiplies it with a tensor of a fixed size")
        rest: list[torch.Tensor] = []
        if joint is not None and len(varying(joint)) > 1:  # a product for each of several heads
            ahead = joint.narrow(at, 0, 1)
            self._nodes.unite(joint, ahead.expand_as(joint), "")
            self._nodes.mark(self._nodes.heads, ahead, self._where)
            rest = [ahead]
        kept = []
        for (own, maps), label, parameter in zip(operands, over, parameters, strict=True):
            left = [m for m in maps if m is not label]
            if parameter is not None and parameter == weight:
                self._wrote(tuple(left))
            kept.append(
                ([1 if d == at else n for d, n in enumerate(own)], (*left, *rest) if label is not None else left)
            )
        flat = [1 if d == at else n for d, n in enumerate(shape)]
        met = self._met([(own, tuple(_narrowed(maps, at))) for own, maps in kept], flat)
        parts = [m.expand(shape) for m in met] + ([joint.expand(shape)] if joint is not None else [])
        self._result.products.append(Product(self._at, parameters[1] or parameters[0], Area.of(shape, parts)))
        result = tuple(m.squeeze(at).expand(output.shape) for m in met)
        if base in ("addmm", "addmv", "baddbmm"):
            return self._met([(output.shape, result), (args[0].shape, self._of(args[0]))], output.shape)
        return result

    def _batch_normed(self, args: Any, outputs: Sequence[torch.Tensor]) -> Sequence[Maps]:
        inputs = args[0]
        column = [1, inputs.shape[1], *[1] * (inputs.dim() - 2)]
        tensors = [t for t in args[1:5] if isinstance(t, torch.Tensor) and t.numel() == inputs.shape[1]]
        columns = [(column, tuple(label.reshape(column) for label in self._of(t))) for t in tensors]
        result = self._met([(inputs.shape, self._of(inputs)), *columns], inputs.shape)
        flat = self._without(result, [d for d in range(inputs.dim()) if d != 1])
        statistics = tuple(_line(label) for label in flat)
        return [result, *[statistics if output.shape == inputs.shape[1:2] else () for output in outputs[1:]]]

    def _layer_normed(self, args: Any, output: torch.Tensor) -> Maps:
        inputs, shape = args[0], args[1]
        dims = tuple(range(inputs.dim() - len(shape), inputs.dim()))
        self._normed(self._of(inputs), dims)
        self._without(self._of(inputs), dims)
        tensors = [t for t in args[:4] if isinstance(t, torch.Tensor)]
        return self._met([(t.shape, self._of(t)) for t in tensors], output.shape)

    def _normed(self, maps: Maps, dims: tuple[int, ...]) -> None:
        """Note that the running operator reduces these dimensions, of which some may carry labels."""
        across = tuple(label for label in maps if varying(label) and set(varying(label)) <= set(dims))
        if across:
            self._across = self._who, across, dims

    def _used(self, tensor: torch.Tensor) -> None:
        """Count a norm as one when its result is read: attention averages its weights over heads, mostly for nobody."""
        if tensor in self._unused:
            at, who, across, dims = self._unused.pop(tensor)
            for label in across:
                self._nodes.mark(self._nodes.norms, label, who)
            self._result.norms[at] = (across, dims)

    def _without(self, maps: Maps, dims: Sequence[int]) -> list[torch.Tensor]:
        """Return maps with size 1 along dimensions that are mixed; what a map still tells apart stays whole there."""
        left = []
        for label in maps:
            flat = _flat(label, dims)
            if varying(flat) != varying(label):
                if not varying(flat):
                    continue
                self._nodes.unite(label, flat.expand_as(label), f"{self._who} mixes it with padding")
            left.append(flat)
        return left

    def _group_normed(self, args: Any, outputs: Sequence[torch.Tensor]) -> Sequence[Maps]:
        inputs, groups = args[0], args[6]
        channels = inputs.shape[1]
        statistics: Maps = ()
        reason = f"{self._who} normalises across it"
        for label in self._unmixed(self._of(inputs), range(2, inputs.dim()), reason):
            if varying(label) != (1,):
                self._nodes.block(label, reason)
            elif groups == 1:
                self._normed((label,), tuple(range(1, inputs.dim())))
            else:
                wide = _line(label).reshape(groups, -1)
                self._nodes.unite(wide, wide[:, :1].expand_as(wide), f"{self._who} normalises it with padding")
                statistics = (wide[:, 0].expand(outputs[1].shape),)
        if groups > 1 and args[1] is not None:
            self._sized(args[1], "num_groups", groups, channels // groups)
        column = [1, channels, *[1] * (inputs.dim() - 2)]
        tensors = [t for t in args[1:3] if isinstance(t, torch.Tensor)]
        columns = [(column, tuple(label.reshape(column) for label in self._of(t))) for t in tensors]
        return [self._met([(inputs.shape, self._of(inputs)), *columns], inputs.shape), statistics, statistics]

    def _weight_normed(self, args: Any, outputs: Sequence[torch.Tensor]) -> Sequence[Maps]:
        kept = args[2] if len(args) > 2 else 0
        self._normed(self._of(args[0]), tuple(d for d in range(args[0].dim()) if d != kept))
        weight = self._met([(t.shape, self._of(t)) for t in args[:2]], outputs[0].shape)
        norms = [_flat(label, [d for d in range(label.dim()) if d != kept]) for label in weight]
        return [weight, tuple(label.expand(outputs[1].shape) for label in norms if varying(label))]

    def _looked_up(self, args: Any, output: torch.Tensor) -> Maps:
        weights = self._of(args[0])
        rows, columns = _along(weights, 0), _along(weights, 1)
        if rows is not None:
            self._nodes.block(rows, f"{self._who} looks its rows up")
        result = () if columns is None else (columns.expand(output.shape),)
        self._wrote(result)
        return result

    def _gated(self, args: Any, output: torch.Tensor) -> Maps:
        dim = (args[1] if len(args) > 1 else -1) % output.dim()
        half = output.shape[dim]
        halves = [tuple(m.narrow(dim, start, half) for m in self._of(args[0])) for start in (0, half)]
        return self._met([(output.shape, maps) for maps in halves], output.shape)

    def _spatial(self, base: str, args: Any, outputs: list[torch.Tensor]) -> Sequence[Maps]:
        dims = range(args[0].dim() - _SPATIAL[base], args[0].dim())
        reason = f"{self._who} runs `{base}` across it"
        for tensor in _tensors(args[1:]):  # where to look, or which ones
            for label in self._of(tensor):
                if varying(label) != (1,):
                    self._nodes.block(label, reason)
        kept = self._unmixed(self._of(args[0]), dims, reason)
        return [tuple(label.expand(output.shape) for label in kept) for output in outputs]

    def _reduced(self, base: str, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Sequence[Maps]:
        place = _REDUCTIONS[base]
        named = kwargs["dim"] if "dim" in kwargs else args[place] if len(args) > place else None
        if isinstance(named, torch.Tensor):  # `max` and `min` of two tensors
            return [self._met([(t.shape, self._of(t)) for t in args[:2]], outputs[0].shape)]
        rank = args[0].dim()
        wanted = [named] if isinstance(named, int) and not isinstance(named, bool) else named
        dims = tuple(sorted(d % rank for d in wanted)) if isinstance(wanted, (list, tuple)) and wanted else None
        dims = tuple(range(rank)) if dims is None else dims
        maps = self._of(args[0])
        self._normed(maps, dims)
        result = self._without(maps, dims)
        if outputs[0].dim() < rank:
            result = [small.reshape([n for d, n in enumerate(small.shape) if d not in dims]) for small in result]
        return [tuple(label.expand(output.shape) for label in result) for output in outputs]

    def _along_one(self, base: str, args: Any, outputs: list[torch.Tensor]) -> Sequence[Maps]:
        place = _ALONG[base]
        named = args[place] if len(args) > place and isinstance(args[place], int) else -1
        dims = [named % args[0].dim()]
        kept = self._unmixed(self._of(args[0]), dims, f"{self._who} runs `{base.strip('_')}` across it")
        return [tuple(label.expand(output.shape) for label in kept) for output in outputs]

    def _unmixed(self, maps: Maps, dims: Sequence[int], reason: str) -> list[torch.Tensor]:
        """Return the maps without the dimensions, and block those that vary along no other."""
        for label in maps:
            if varying(label) and set(varying(label)) <= set(dims):
                self._nodes.block(label, reason)
        return self._without(maps, dims)


# -- small tools ------------------------------------------------------------------------------------------------------


def tensors(values: Any) -> list[torch.Tensor]:
    """Return all tensors in what a module takes or returns: in containers, dataclasses and other objects."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            left += reversed(_parts(value))
    return found


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, (type, nn.Module, ModuleType)) or callable(value):
        return []
    if is_dataclass(value):
        return [getattr(value, part.name) for part in fields(value)]
    return list(vars(value).values()) if hasattr(value, "__dict__") else []


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _stated(tensor: torch.Tensor) -> list[int]:
    """Return a tensor's shape with 1 where it was expanded, most likely to the size of what it meets next."""
    return [1 if stride == 0 else n for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _flat(label: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Return a map with size 1 along dimensions on which it is constant."""
    for dim in dims:
        label = label.narrow(dim, 0, 1)
    return label


def _padded(label: torch.Tensor, pad: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Return a map padded by 0 along the dimensions that carry labels; padding along others adds positions alike."""
    dims = varying(label)
    small = _flat(label, [d for d in range(label.dim()) if d not in dims])
    pairs = list(pad) + [0] * (2 * label.dim() - len(pad))  # the last dimension's pair comes first
    for place in range(label.dim()):
        if label.dim() - 1 - place not in dims:
            pairs[2 * place : 2 * place + 2] = 0, 0
    return nn.functional.pad(small, pairs).expand(tuple(shape))


def _narrowed(maps: Sequence[torch.Tensor], dim: int) -> Maps:
    return tuple(_flat(label, [dim]) for label in maps)


def _line(label: torch.Tensor) -> torch.Tensor:
    """Return the labels `(n,)` along the one dimension on which a map varies."""
    (dim,) = varying(label)
    return _flat(label, [d for d in range(label.dim()) if d != dim]).reshape(-1)


def _along(maps: Maps, dim: int) -> torch.Tensor | None:
    """Return the labels `(n,)` along a dimension, of the map that varies on just that one; or None."""
    return next((_line(label) for label in maps if varying(label) == (dim,)), None)


def _spread(label: torch.Tensor, names: str, index: str) -> torch.Tensor:
    """Return a map over the dimensions `names` as one over all of `index`, with size 1 along the others."""
    for place, name in enumerate(index):
        if name not in names:
            label = label.unsqueeze(place)
    return label


def _both(first: torch.Tensor, second: torch.Tensor) -> tuple[int, ...]:
    return np.broadcast_shapes(first.shape, second.shape)
