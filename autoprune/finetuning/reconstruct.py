"""Recovery in closed form: the weights that stay make up for those that went, by least squares and without a gradient.

Two ways, one without data and one with a single pass of it:

- `reconstruct` solves each layer for itself from cached moments of the dense network (see `autoprune.moments`). It
  takes milliseconds, and knows nothing of what layers before have lost.
- `Refit` runs the smaller network once; each layer, as its turn comes, is fitted to the dense layer's outputs from what
  really reaches it, and batch-norm takes its statistics in passing, so that later layers make up for earlier ones.

Channel Pruning (He et al. 2017, https://arxiv.org/abs/1707.06168, eq. 1 and section 3.2) fits layers so, one after
another; here all are fitted within one forward pass, and layers that lost nothing themselves are fitted too.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from autoprune.inputs import evaluating
from autoprune.moments import LayerMoments, Moments, Picks, Use, Watch
from autoprune.moments.solve import fitted, gram, kept_from_rows, kept_weights, masked_weights, regularised
from autoprune.moments.store import as_matrix
from autoprune.structure import Cut
from autoprune.structure.heads import FewerHeadsAttention
from autoprune.structure.trace import plain_attention

__all__ = ["Refit", "reconstruct"]

_SINGLE = 1e-6
_SAMPLED = 1 << 14  # values by which a batch is known again


@torch.no_grad()
def reconstruct(dense: nn.Module, smaller: nn.Module, change: Cut, moments: Moments) -> None:
    """Give the layers of a smaller network that lost inputs the weights that make up best for them, in place.

    A bias takes over the mean of what went; where there is none but batch-norm follows, its running mean does. And its
    running variance becomes that of the outputs that are left, so that a network of such layers needs no recalibration.

    Args:
        dense: The network that was cut.
        smaller: What `cut` made of it.
        change: The cut.
        moments: Of the dense network's layers; those that are not there stay as they are sliced.
    """
    before, after = dict(dense.named_parameters()), dict(smaller.named_parameters())
    for name, layer in moments.items():
        kept = change.kept.get(name, {})
        zeroed = change.zeroed.get(name)
        if name in after and (layer.input_dim in kept or (zeroed is not None and layer.second is not None)):
            _solve(layer, before, after, kept, zeroed, smaller)


def _solve(
    layer: LayerMoments,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    kept: Mapping[int, torch.Tensor],
    zeroed: torch.Tensor | None,
    smaller: nn.Module,
) -> None:
    weight = layer.matrix(before[layer.weight])
    groups, outputs, width = weight.shape
    kernel = before[layer.weight].shape[2:].numel()
    inputs = kept.get(layer.input_dim, torch.arange(width // kernel))
    stays = None if zeroed is None else ~as_matrix(zeroed, 1, layer.input_dim)[0].to(weight.device)
    columns = (inputs[:, None] * kernel + torch.arange(kernel)).flatten().to(weight.device)
    rows = kept.get(1 - layer.input_dim, torch.arange(groups * outputs))
    parts: list[torch.Tensor] = []
    shifts, spreads = [], []
    for group in range(groups):
        mine = (rows[(rows >= group * outputs) & (rows < (group + 1) * outputs)] - group * outputs).to(weight.device)
        if not len(mine):
            continue
        whole, mean = weight[group, mine].double(), layer.mean[group].double()
        if layer.second is None:
            samples = layer.centred_samples(group)
            left = kept_from_rows(whole, samples, columns)
            change = (left @ samples[:, columns].T).square().mean(1) - (whole @ samples.T).square().mean(1)
        else:
            second = layer.bare_moments(group)
            ridged = layer.moments(group)
            left = kept_weights(whole, ridged, columns)
            if stays is not None:
                done = sum(len(part) for part in parts)
                left = masked_weights(left, ridged[columns][:, columns], stays[done : done + len(left)])
            small = second[columns][:, columns]
            change = ((left @ small) * left).sum(1) - ((whole @ second) * whole).sum(1)
        parts.append(left)
        shifts.append(left @ mean[columns] - whole @ mean)
        spreads.append(change)
    solved, shift, spread = torch.cat(parts), torch.cat(shifts), torch.cat(spreads)
    if layer.second is None and stays is not None:
        solved = solved * stays
    target = after[layer.weight]
    target.copy_((solved.T if layer.input_dim == 0 else solved).reshape(target.shape))
    if layer.bias is not None:
        after[layer.bias].sub_(shift.to(after[layer.bias].dtype))
    if layer.norm is not None:
        running_var = smaller.get_buffer(f"{layer.norm}.running_var")
        running_var.copy_(torch.maximum(running_var + spread, 0.01 * running_var))
        if layer.bias is None:
            running_mean = smaller.get_buffer(f"{layer.norm}.running_mean")
            running_mean.add_(shift.to(running_mean.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """What a dense layer reads, a sample of it, and gives: `outputs` `(rows, outputs)` at `picks`, for these sizes."""

    read: torch.Tensor
    picks: Picks
    outputs: torch.Tensor
    places: tuple[int, ...]
    first: int


class Refit:
    """Fits the layers of smaller networks to what the dense network's give, each in one pass.

    What lies before everything that was cut stays exactly as it is, batch-norm's statistics too.

    Args:
        model: The dense network; it runs in eval mode, and its mode is restored.
        inputs: `(images, ...)`, augmented as in training; one batch.
        each: Rows (output positions, tokens) that are fitted, for every image.
        seed: Of the rows.
    """

    def __init__(self, model: nn.Module, inputs: torch.Tensor, *, each: int = 10, seed: int = 0) -> None:
        self._inputs = inputs
        self._each = each
        self._targets: dict[str, _Target] = {}
        self._twice: set[str] = set()
        self._normed: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self._generator = torch.Generator().manual_seed(seed)
        watch = Watch(model, after=self._note)

        def note(name: str, values: torch.Tensor) -> bool:
            self._normed[name].append(_sample(values))
            return False

        with torch.no_grad(), evaluating(model), _attention_alike(model), _norms_told(model, watch, note), watch:
            model(inputs)
        for name in self._twice:
            del self._targets[name]
        self._norms = watch.norms

    def _note(self, use: Use, result: torch.Tensor) -> None:
        if use.weight in self._targets or use.weight in self._twice:
            self._twice.add(use.weight)
            return
        picks = use.picks(len(self._inputs), self._each, self._generator)
        outputs = use.outputs(result, picks)
        places = use.places if use.kernel else ()
        self._targets[use.weight] = _Target(_sample(use.inputs), picks, outputs, places, len(use.inputs))

    @torch.no_grad()
    def __call__(self, smaller: nn.Module, change: Cut) -> None:
        """Fit a smaller network's layers and take its batch-norms' statistics, in place.

        Zeros in place stay zero; layers whose weights run twice stay as they are, and so does what is as it was.

        Args:
            smaller: What `cut` made of the dense network; its mode is restored.
            change: The cut.
        """
        parameters = dict(smaller.named_parameters())

        def fit(use: Use) -> None:
            target = self._targets.get(use.weight)
            if target is None or target.first != len(use.inputs):
                return
            kept, zeroed = change.kept.get(use.weight, {}), change.zeroed.get(use.weight)
            if use.input_dim not in kept and zeroed is None and _alike(use.inputs, target.read):
                return  # the outputs that stay are what they were
            if target.places == (use.places if use.kernel else ()):
                self._fit(use, target, parameters, kept, zeroed)

        calls = Counter[str]()

        def anew(name: str, values: torch.Tensor) -> bool:
            known = self._normed.get(name, [])  # one for each call
            number = calls[name]
            calls[name] += 1
            same = number < len(known) and _alike(values, known[number])
            return len(self._inputs) > 1 and not same  # one has no variance

        watch = Watch(smaller, before=fit)
        with evaluating(smaller), _attention_alike(smaller), _norms_told(smaller, watch, anew), watch:
            smaller(self._inputs)

    def _fit(
        self,
        use: Use,
        target: _Target,
        parameters: Mapping[str, torch.Tensor],
        kept: Mapping[int, torch.Tensor],
        zeroed: torch.Tensor | None,
    ) -> None:
        weight = parameters[use.weight]
        there = _single(use.rows(target.picks))
        wanted = target.outputs
        if 1 - use.input_dim in kept:
            wanted = wanted[:, kept[1 - use.input_dim].to(wanted.device)]
        groups, rows, _ = there.shape
        wanted = _single(wanted).reshape(rows, groups, -1).transpose(0, 1)
        old = _single(as_matrix(weight, groups, use.input_dim))
        missing = wanted - there @ old.transpose(1, 2)
        mean, shift = there.mean(1, keepdim=True), missing.mean(1, keepdim=True)
        if use.bias is not None or use.weight in self._norms:
            there, missing = there - mean, missing - shift
        more = fitted(there, missing)
        if zeroed is not None:
            stays = ~as_matrix(zeroed, groups, use.input_dim).to(old.device)
            more = _beside_zeros(old.double() + more, there, stays) - old
        new = (old.double() + more).flatten(0, 1)
        weight.copy_((new.T if use.input_dim == 0 else new).reshape(weight.shape))
        if use.bias is not None:
            level = shift.double() - mean.double() @ more.transpose(1, 2)
            bias = parameters[use.bias]
            bias.copy_(level.flatten())


def _beside_zeros(weight: torch.Tensor, there: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """Return `(groups, outputs, d)` weights with zeros, fitted around them where there are rows enough."""
    rows, width = there.shape[1:]
    if rows < width:
        return weight * stays
    second = regularised(gram(there) / rows, rows)
    return torch.stack([masked_weights(*part) for part in zip(weight, second, stays, strict=True)])


@contextmanager
def _norms_told(model: nn.Module, watch: Watch, anew: Callable[[str, torch.Tensor], bool]) -> Iterator[None]:
    """Let every batch-norm take its statistics from what it reads where `anew(name, inputs)` says so."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    norms = {name: norm for name, norm in norms.items() if norm.track_running_stats}
    momenta = [norm.momentum for norm in norms.values()]

    def hook(name: str, norm: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        with watch.aside():
            norm.train(anew(name, args[0] if args else kwargs["input"]))

    handles = [norm.register_forward_pre_hook(partial(hook, name), with_kwargs=True) for name, norm in norms.items()]
    try:
        for norm in norms.values():
            norm.momentum = 1.0
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms.values(), momenta, strict=True):
            norm.momentum = momentum


def _sample(values: torch.Tensor) -> torch.Tensor:
    """Return some of the values of some of a batch; at random, since its rows may be tokens, whose order has a rule."""
    rows = torch.randint(len(values), (8,), generator=torch.Generator().manual_seed(len(values)))
    some = values[rows.to(values.device)].flatten()
    return some[:: -(-len(some) // _SAMPLED)].clone()


def _alike(values: torch.Tensor, sample: torch.Tensor) -> bool:
    """Return whether a batch is that of a sample, but for rounding."""
    found = _sample(values)
    if found.shape != sample.shape:
        return False
    eps = torch.finfo(sample.dtype).eps
    near = 64 * eps * float(sample.abs().max()) if eps < _SINGLE else 0.0  # of half precision that would be a lot
    return bool((found - sample).abs().max() <= near)


@contextmanager
def _attention_alike(model: nn.Module) -> Iterator[None]:
    """Let attention run as matrix products, whose rows come in the same order with all heads as with fewer."""
    modules = [module for module in model.modules() if type(module) is nn.MultiheadAttention]
    try:
        for module in modules:
            module.__class__ = FewerHeadsAttention
        with plain_attention():
            yield
    finally:
        for module in modules:
            module.__class__ = nn.MultiheadAttention


def _single(values: torch.Tensor) -> torch.Tensor:
    """Return at least single precision."""
    return values if values.dtype == torch.float64 else values.float()
