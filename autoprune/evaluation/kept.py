"""Batches that are read again and again: kept ready in memory or, where they are too large for it, in a mapped file.

The file lies in the folder for temporary files (`TMPDIR`), has no name where the system allows that, and goes with
whoever keeps it, even with one that is killed. Every process has its own. Nothing is copied from it on the CPU: the
system holds as much of it in memory as there is room for.
"""

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Self, final

import numpy as np
import torch

from autoprune.data import Batch, tensor_bytes
from autoprune.evaluation.precision import Precision

__all__ = ["Kept"]

_SPARE: Final = 1 << 30  # bytes that are left to others where the file lies


@final
class Kept:
    """Batches in one layout, read once and kept, so that a pass over them decodes and normalises nothing.

    Iterating gives them on the device; where they could not be kept they are read again for it.

    Args:
        batches: What is kept, read once.
        samples: How many they hold.
        precision: Whose layout inputs get.
        device: Where batches are wanted.
        memory: Bytes that may be kept on the device; more are kept in a file.
        again: Reads the batches where they can't be kept.
        seed: Of a random order that the samples are put in; None leaves them as they come.
        at_once: With a seed, samples of a batch at most.

    Attributes:
        ready: The batches in their layout, on the device or mapped from a file; None where they can't be kept.
        fault: Why they can't, or None.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        samples: int,
        precision: Precision,
        device: torch.device,
        memory: int,
        again: Callable[[], Iterable[Batch]],
        seed: int | None = None,
        at_once: int = 1,
    ) -> None:
        self._precision, self._device, self._again = precision, device, again
        self.ready: Sequence[Batch] | None = None
        self.fault: str | None = None
        ahead = iter(batches)
        first = list(itertools.islice(ahead, 1))
        batches = itertools.chain(first, ahead)
        size = samples * sum(part[:1].nbytes for batch in first for part in batch)
        if size <= memory:
            self.ready = list(precision.placed(batches if seed is None else _mixed(batches, seed, at_once), device))
            return
        try:
            self.ready = _mapped(batches, samples, size, precision, seed, at_once)
        except _NotKept as reason:
            self.fault = f"{size / 1e9:.1f} GB are kept neither in memory nor in a file: {reason}"

    def __iter__(self) -> Iterator[Batch]:
        return self.placed(self._again() if self.ready is None else self.ready)

    def placed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches on the device, in the layout."""
        return self._precision.placed(batches, self._device)


class _NotKept(Exception):
    """Says why batches can't be kept in a file."""


def _order(samples: int, seed: int) -> torch.Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed))


def _parts(samples: int, at_once: int) -> int:
    return -(-samples // at_once)


def _mixed(batches: Iterable[Batch], seed: int, at_once: int) -> Iterator[Batch]:
    """Yield the samples in random order, in batches of about one size."""
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for part in _order(len(inputs), seed).tensor_split(_parts(len(inputs), at_once)):
        yield inputs[part], targets[part]


def _mapped(
    batches: Iterable[Batch], samples: int, size: int, precision: Precision, seed: int | None, at_once: int
) -> Sequence[Batch]:
    """Write batches to files and return them mapped from there.

    Raises:
        _NotKept: There is no room, or the samples are not all alike.
    """
    places = None if seed is None else _order(samples, seed).argsort()  # where in the files each of them goes
    lengths: list[int] = []
    done = 0
    _require_room(size)
    with _File() as inputs, _File() as targets:
        for batch in batches:
            lengths.append(len(batch[0]))
            done += lengths[-1]
            if places is not None and done > samples:
                break
            here = range(done - lengths[-1], done)
            where = here if places is None else places[here.start : here.stop].tolist()
            inputs.write(_as_it_lies(precision.place(batch[0], torch.device("cpu")), precision), where)
            targets.write(batch[1], where)
        if places is not None:
            if done != samples:
                raise _NotKept(f"the split has not the {samples} samples that it says")
            lengths = [len(part) for part in torch.arange(samples).tensor_split(_parts(samples, at_once))]
        images = inputs.mapped()
        images = images.movedim(-1, 1) if precision.channels_last and images.dim() == 4 else images
        return list(zip(images.split_with_sizes(lengths), targets.mapped().split_with_sizes(lengths), strict=True))


def _as_it_lies(inputs: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Return inputs with the dimension last that is innermost in memory."""
    return inputs.movedim(1, -1) if precision.channels_last and inputs.dim() == 4 else inputs


def _require_room(size: int) -> None:
    try:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _NotKept(str(error)) from error
    if free < size + _SPARE:
        raise _NotKept(f"{folder} has {free / 1e9:.1f} GB free; set TMPDIR to a folder that has more")


class _File:
    """Rows of one shape and type in a file of their own."""

    def __init__(self) -> None:
        self._like: torch.Tensor | None = None
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        except OSError as error:
            raise _NotKept(str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what could not be written was told before
            self._file.close()  # what is mapped stays

    def write(self, rows: torch.Tensor, places: Sequence[int]) -> None:
        """Write rows, each to its place; a full disk is an error here, where it can be told, and not on reading."""
        if self._like is None:
            self._like = rows[:0]
        if rows.shape[1:] != self._like.shape[1:] or rows.dtype != self._like.dtype:
            raise _NotKept("samples are of several shapes or types")
        content = memoryview(tensor_bytes(rows))
        width = len(content) // len(rows)
        try:
            for number, place in enumerate(places):
                self._file.seek(place * width)
                self._file.write(content[number * width : (number + 1) * width])
        except OSError as error:
            raise _NotKept(str(error)) from error

    def mapped(self) -> torch.Tensor:
        """Return all rows; what is written to them from now on stays in this process."""
        assert self._like is not None  # a split has samples
        try:
            self._file.flush()
            content = np.memmap(self._file, np.uint8, "c")
        except (OSError, ValueError) as error:
            raise _NotKept(str(error)) from error
        return torch.from_numpy(content).view(self._like.dtype).view(-1, *self._like.shape[1:])
