"""What a probe of one group shares with the dense network: all that runs before the group, computed once.

Modules run one after another, so what ran before the first tensor that was cut is the dense network's own, whatever the
code between modules does. A probe begins at a *cut point*: the output of one module is handed in, and modules that
ended before it do not run. That all that follows depends on this output alone is verified: the dense network must give
its outputs with NaN, and with zeros, in place of all that is skipped, after it ran on something else.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from autoprune.inputs import evaluating
from autoprune.structure import Cut

__all__ = ["CutPoint", "Handed", "Prefix", "Resumed"]

_TRIED: Final = 16  # modules that ended last are tried as cut points: more than a residual block has


@dataclass(frozen=True, slots=True)
class CutPoint:
    """A module at whose output a network can begin.

    Attributes:
        name: The module.
        end: Its place in the order in which modules begin and end.
        skipped: Modules that need not run; the last is the module itself.
    """

    name: str
    end: int
    skipped: tuple[str, ...]


@dataclass(slots=True)
class Handed:
    """What stands in for the modules that are skipped, batch by batch.

    Attributes:
        value: The cut point's output.
        samples: In the batch.
        filler: What every number of the other outputs is.
    """

    value: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    samples: int = 0
    filler: float = 0.0

    def give(self, value: torch.Tensor, samples: int) -> None:
        """Set the next batch's."""
        self.value, self.samples = value, samples


class Resumed(nn.Module):
    """A network that begins at a cut point (see `Prefix.skipped`): called with inputs and the outputs there."""

    def __init__(self, model: nn.Module, handed: Handed) -> None:
        super().__init__()
        self.model = model
        self._handed = handed

    def forward(self, given: tuple[torch.Tensor, torch.Tensor]) -> Any:
        """Return the network's outputs for `(inputs, outputs at the cut point)`."""
        inputs, outputs = given
        self._handed.give(outputs, len(inputs))
        return self.model(inputs)


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    start: int
    end: int
    output: torch.Tensor | None  # of a few samples, if it is of the batch
    size: int  # bytes of the output


class _Reached(Exception):
    """Carries a cut point's output out of a forward pass."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class Prefix:
    """The cut points of a network.

    Args:
        model: The dense network; its mode is restored.
        inputs: A few samples, of a number that no dimension has by chance.
        running: What networks are measured under.
        fits: Whether there is room for the outputs of a cut point, given the bytes of one sample's: as the network
            computes them by itself, and under `running`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: torch.Tensor,
        running: Callable[[], AbstractContextManager[Any]] = nullcontext,
        fits: Callable[[int, int], bool] = lambda size, measured: True,
    ) -> None:
        self._model, self._inputs, self._fits = model, inputs, fits
        self._calls: list[_Call] = []
        self._starts: dict[str, int] = {}
        self._owners: dict[str, list[str]] = {}
        self._points: dict[int, CutPoint | None] = {}
        self._verified: dict[str, CutPoint | None] = {}
        self._measured: dict[str, int] = {}  # bytes of outputs
        clock = iter(range(1 << 62))
        begun: dict[str, int] = {}
        times = Counter[str]()

        def before(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                begun[name] = next(clock)
                self._starts.setdefault(name, begun[name])
                times[name] += 1

            return hook

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                floats = isinstance(output, torch.Tensor) and output.is_floating_point() and output.dim() > 0
                batched = floats and not len(output) % len(self._inputs)
                kept = output.clone() if batched else None  # what follows may change it in place
                size = output.nbytes if batched else 0
                self._calls.append(_Call(name, begun[name], next(clock), kept, size))

            return hook

        def sized(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                self._measured[name] = output.nbytes if isinstance(output, torch.Tensor) else 0

            return hook

        modules = dict(model.named_modules())
        with torch.no_grad(), evaluating(model), ExitStack() as stack:
            for name, module in modules.items():
                stack.callback(module.register_forward_pre_hook(before(name)).remove)
                stack.callback(module.register_forward_hook(after(name)).remove)
            self._expected = model(inputs)
        with torch.no_grad(), evaluating(model), ExitStack() as stack, running():
            for name, module in modules.items():
                stack.callback(module.register_forward_hook(sized(name)).remove)
            model(inputs)
        holding = {name for name, module in model.named_modules() if any(True for _ in module.buffers(recurse=False))}
        self._repeated = [
            (self._starts[name], max(call.end for call in self._calls if call.name == name))
            for name in holding
            if times[name] > 1
        ]
        self._calls = [call for call in self._calls if call.name and times[call.name] == 1 and call.output is not None]
        same: dict[int, list[str]] = {}
        for module_name, module in model.named_modules(remove_duplicate=False):
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                same.setdefault(id(tensor), []).append(module_name)
                self._owners[f"{module_name}.{key}".lstrip(".")] = same[id(tensor)]

    def begins(self, change: Cut) -> int:
        """Return when the first module that a cut touches begins, in the order of modules."""
        touched = [owner for tensor in (*change.kept, *change.zeroed) for owner in self._owners[tensor]]
        return min((self._start(name) for name in (*touched, *change.attributes, *change.blocks)), default=0)

    def point(self, change: Cut) -> CutPoint | None:
        """Return the last cut point before all that a cut touches for which there is room, or None."""
        first = self.begins(change)
        if first not in self._points:
            ended = sorted((c for c in self._calls if c.end < first), key=lambda call: -call.end)
            fitting = [call for call in ended if self._fits(*self._sizes(call))]
            self._points[first] = next(filter(None, map(self._known, fitting[:_TRIED])), None)
        return self._points[first]

    def _sizes(self, call: _Call) -> tuple[int, int]:
        return call.size // len(self._inputs), self._measured.get(call.name, call.size) // len(self._inputs)

    def _known(self, call: _Call) -> CutPoint | None:
        """Return a module as a cut point if it stands as one, verified once."""
        if call.name not in self._verified:
            self._verified[call.name] = self._stands(call)
        return self._verified[call.name]

    def skipped(self, model: nn.Module, point: CutPoint | None) -> AbstractContextManager[Handed]:
        """Let a network begin at a cut point inside a `with`.

        Args:
            model: The dense network, or one cut from it after the point.
            point: Where; None lets all of it run.

        Returns:
            What is handed in; give it every batch's output before the network runs.
        """
        return self._without(model, () if point is None else point.skipped)

    @torch.no_grad()
    def outputs(
        self,
        point: CutPoint,
        batches: Iterable[torch.Tensor],
        running: Callable[[], AbstractContextManager[Any]],
        earlier: tuple[CutPoint, Iterable[torch.Tensor]] | None = None,
    ) -> list[torch.Tensor]:
        """Return the cut point's outputs in the dense network.

        Args:
            point: Where.
            batches: Inputs.
            running: What the network runs under.
            earlier: A cut point before it with its outputs, to begin at; taken one after another.
        """

        def stop(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            raise _Reached(output)

        found = []
        handle = self._model.get_submodule(point.name).register_forward_hook(stop)
        try:
            before = None if earlier is None else iter(earlier[1])
            with evaluating(self._model), self.skipped(self._model, earlier and earlier[0]) as handed:
                for inputs in batches:
                    if before is not None:
                        handed.give(next(before), len(inputs))
                    try:
                        with running():
                            self._model(inputs)
                    except _Reached as reached:
                        found.append(reached.value)
        finally:
            handle.remove()
        return found

    def _start(self, name: str) -> int:
        """Return when a module begins; of one that is never called as one, what holds it does."""
        while name and name not in self._starts:
            name = name.rpartition(".")[0]
        return self._starts[name]

    @torch.no_grad()
    def _stands(self, call: _Call) -> CutPoint | None:
        if any(start < call.end < end for start, end in self._repeated):
            return None  # a module with statistics runs on both sides
        skipped: list[_Call] = []
        for one in sorted((c for c in self._calls if c.end <= call.end), key=lambda one: one.start):
            if not skipped or one.start > skipped[-1].end:  # else it lies within
                skipped.append(one)
        names = tuple(one.name for one in skipped)
        assert call.output is not None
        for filler in (torch.nan, 0.0):
            with evaluating(self._model):
                self._model(self._inputs[:2].flip(0))  # what modules keep for later is now of other inputs
                with self._without(self._model, names) as handed:
                    handed.filler = filler
                    handed.give(call.output.clone(), len(self._inputs))
                    try:
                        found = self._model(self._inputs)
                    except Exception:  # code that can't stand what it gets: no cut point
                        return None
            if not torch.equal(found, self._expected) or not torch.equal(handed.value, call.output):
                return None  # it depends on more, or what is handed in would not stay as it is
        return CutPoint(call.name, call.end, names)

    @contextmanager
    def _without(self, model: nn.Module, names: Sequence[str]) -> Iterator[Handed]:
        handed = Handed()
        shapes = {call.name: call.output for call in self._calls}

        def given(*_: Any, **__: Any) -> torch.Tensor:
            return handed.value

        def filled(output: torch.Tensor) -> Callable[..., torch.Tensor]:
            each = len(output) // len(self._inputs)

            def forward(*_: Any, **__: Any) -> torch.Tensor:
                one = torch.full((), handed.filler, dtype=handed.value.dtype, device=output.device)
                return one.expand(each * handed.samples, *output.shape[1:])

            return forward

        modules = [model.get_submodule(name) for name in names]
        own = [module.__dict__.get("forward") for module in modules]
        try:
            for name, module in zip(names, modules, strict=True):
                output = shapes[name]
                assert output is not None
                module.forward = given if name == names[-1] else filled(output)
            yield handed
        finally:
            for module, forward in zip(modules, own, strict=True):
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward
