"""Data: how splits are read, cut, compared and augmented, and the named data sets; a task decides what they are for.

Every pass over a split takes its randomness from a generator given to it. User code that draws from the global
generators (torch's, numpy's, Python's), as most augmenting datasets do, runs on a seed derived from that generator, and
the global generators are put back as they were.
"""

import copy
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol, Self, cast, final, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from autoprune.errors import SplitError, UnknownNameError

__all__ = [
    "Augment",
    "Batch",
    "DatasetSplit",
    "LoaderSplit",
    "NamedData",
    "Normalise",
    "RandomCropFlip",
    "RandomShift",
    "Split",
    "TensorSplit",
    "as_split",
    "callable_name",
    "crop_flip",
    "cut",
    "isolated_rng",
    "load",
    "names",
    "overlap",
    "subset",
    "tensor_bytes",
]

Batch = tuple[Tensor, Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]
Indices = npt.NDArray[np.int64]

_DIGEST_SAMPLES: Final = 64
_SAME_CONTENT_TOLERATED: Final = 0.01


# ---------------------------------------------------------------------------------------------------- small tools


@contextmanager
def isolated_rng(seed: int, *generators: torch.Generator) -> Iterator[None]:
    """Run a block on freshly seeded global generators (torch's on the CPU, numpy's, Python's), then restore them.

    Args:
        seed: In [0, 2**32).
        generators: Others to treat the same way.
    """
    torch_generators = (torch.default_generator, *generators)
    torch_states = [generator.get_state() for generator in torch_generators]
    numpy_state = np.random.get_state()  # noqa: NPY002 - the user's code may draw from it; it is put back
    python_state = random.getstate()
    try:
        for generator in torch_generators:
            generator.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - as above
        random.seed(seed)
        yield
    finally:
        for generator, state in zip(torch_generators, torch_states, strict=True):
            generator.set_state(state)
        np.random.set_state(numpy_state)  # noqa: NPY002 - as above
        random.setstate(python_state)


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**32, (), generator=generator).item())


def callable_name(function: object) -> str:
    """Return a name that is the same in every process: a function's own, a partial's parts, or a record's `repr`."""
    if isinstance(function, partial):
        given = [*map(repr, function.args), *(f"{key}={value!r}" for key, value in sorted(function.keywords.items()))]
        return f"{callable_name(function.func)}({', '.join(given)})"
    name = getattr(function, "__qualname__", None)
    if name is not None:
        return str(name)
    return type(function).__qualname__ if type(function).__repr__ is object.__repr__ else repr(function)


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's content, in row-major order, as bytes; any dtype, any device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _seed_of_pass(shuffle: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if shuffle is None else shuffle


# --------------------------------------------------------------------------------------------------------- splits


@runtime_checkable
class Split(Protocol):
    """A finite set of samples, read in batches of `(inputs, targets)`, as often as one likes."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def batches(self, batch_size: int, *, shuffle: torch.Generator | None = None) -> Iterator[Batch]:
        """Iterate once over all samples; the last batch may be short. Without `shuffle`, always in the same order."""
        ...

    def digest(self) -> str:
        """Return a short text that changes when the content does, and is the same in every process."""
        ...


@final
class TensorSplit:
    """Samples held in memory, images best as uint8; a transform makes them floats a batch at a time.

    Args:
        inputs: `(n, ...)`, any dtype.
        targets: `(n, ...)`.
        transform: Applied to every batch of inputs; must not be random.

    Raises:
        SplitError: Inputs and targets are not equally many.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
            raise SplitError(
                f"inputs and targets must be equally many, but got shapes {tuple(inputs.shape)} and "
                f"{tuple(targets.shape)}; give one target for each input"
            )
        self.inputs = inputs
        self.targets = targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, batch_size: int, *, shuffle: torch.Generator | None = None) -> Iterator[Batch]:
        """Iterate once, in the stored order or in one that `shuffle` draws."""
        order = None if shuffle is None else torch.randperm(len(self), generator=shuffle)
        for start in range(0, len(self), batch_size):
            chosen = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
            inputs = self.inputs[chosen]
            yield (inputs if self.transform is None else self.transform(inputs)), self.targets[chosen]

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        """Pickle the samples as they are on the CPU: who unpickles them may have another device, or none."""
        return type(self), (self.inputs.cpu(), self.targets.cpu(), self.transform)

    def digest(self) -> str:
        """Return a digest of every byte, the shapes, and the transform's name."""
        digest = hashlib.sha256(callable_name(self.transform).encode())
        for tensor in (self.inputs, self.targets):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()[:16]

    @cached_property
    def content(self) -> frozenset[bytes]:
        """One digest of each distinct input, however it is labelled; 0.3 seconds for CIFAR-10's training images."""
        rows = memoryview(tensor_bytes(self.inputs))
        width = len(rows) // max(len(self), 1)
        return frozenset(
            hashlib.sha256(rows[start : start + width]).digest() for start in range(0, len(self) * width, width or 1)
        )


@final
class DatasetSplit:
    """A map-style dataset whose items are `(input, target)`.

    Args:
        dataset: Has `__len__` and `__getitem__`. If it augments at random, every pass augments anew.
        collate: Joins a list of items into a batch.
        workers: Processes that read it; 0 reads in this one.
    """

    def __init__(
        self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any] = default_collate, workers: int = 0
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.workers = workers

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's base class leaves __len__ out

    def batches(self, batch_size: int, *, shuffle: torch.Generator | None = None) -> Iterator[Batch]:
        """Iterate once, in the dataset's order or in one that `shuffle` draws."""
        seeds = _seed_of_pass(shuffle)
        order = list(range(len(self))) if shuffle is None else torch.randperm(len(self), generator=shuffle).tolist()
        chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        loader = DataLoader(self.dataset, batch_sampler=chunks, collate_fn=self.collate, num_workers=self.workers)
        return _isolated_pass(loader, seeds)

    def digest(self) -> str:
        """Return a digest of the type, the length and up to 64 evenly spaced samples.

        Samples are read on seeded generators, so that augmentation inside the dataset gives the same digest every
        time. Where it draws from elsewhere (reading a sample twice gives two inputs), targets alone are read.
        """
        return _dataset_digest(self.dataset, np.arange(len(self)))


@final
class LoaderSplit:
    """A user's `DataLoader`, iterated as it is: its batch size, its order, its workers.

    Workers that would persist are started for each pass all the same: those that live on draw from where the last pass
    left their random state, and the next one would not be the same for its seed.

    Args:
        loader: Over a map-style dataset, giving `(inputs, targets)`.

    Raises:
        SplitError: Its dataset has no length.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        if isinstance(loader.dataset, IterableDataset):
            raise SplitError("a DataLoader over an IterableDataset has no length; give a map-style Dataset")
        self.loader = copy.copy(loader)
        vars(self.loader).update(persistent_workers=False, _iterator=None)  # which can't be set as attributes

    def __len__(self) -> int:
        if self.loader.batch_size is None:  # the user's own batch sampler
            return len(self.loader.dataset)  # type: ignore[arg-type]  # torch's base class leaves __len__ out
        samples = len(cast(Sequence[int], self.loader.sampler))
        return samples - samples % self.loader.batch_size if self.loader.drop_last else samples

    def batches(self, batch_size: int, *, shuffle: torch.Generator | None = None) -> Iterator[Batch]:
        """Iterate once. `batch_size` is the loader's own, and so is the order: `shuffle` only seeds what it draws."""
        return _isolated_pass(self.loader, _seed_of_pass(shuffle))

    def digest(self) -> str:
        """Return a digest of the dataset's type, the length and up to 64 samples, read as `DatasetSplit` reads."""
        return _dataset_digest(self.loader.dataset, _loader_indices(self.loader))


def _isolated_pass(loader: DataLoader[Any], seeds: torch.Generator) -> Iterator[Batch]:
    """Iterate over a loader once, the global generators and its own seeded for each batch and put back."""
    own = [getattr(source, "generator", None) for source in (loader, loader.sampler)]
    generators = [generator for generator in own if isinstance(generator, torch.Generator)]
    with isolated_rng(_draw_seed(seeds), *generators):
        iterator = iter(loader)
    while True:
        with isolated_rng(_draw_seed(seeds), *generators):
            batch = next(iterator, None)
        if batch is None:
            return
        yield _checked(batch)


def _checked(batch: object) -> Batch:
    if isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    got = f"{len(batch)} parts" if isinstance(batch, Sequence | dict) else f"a {type(batch).__name__}"
    raise SplitError(
        f"a batch must be a pair of tensors, (inputs, targets), but the data gives {got}; wrap the dataset"
    )


def _loader_indices(loader: DataLoader[Any]) -> Indices:
    if isinstance(loader.sampler, SubsetRandomSampler):
        return np.asarray(loader.sampler.indices, dtype=np.int64)
    return np.arange(len(loader.dataset))  # type: ignore[arg-type]  # torch's base class leaves __len__ out


def _dataset_digest(dataset: Dataset[Any], indices: Indices) -> str:
    def parts(index: int) -> list[bytes]:
        with isolated_rng(0):
            return [_value_bytes(value) for value in dataset[index]]

    root, places = _unwrapped(dataset, indices)
    digest = hashlib.sha256(f"{type(root).__qualname__} {len(indices)}".encode())
    digest.update(places.tobytes())
    chosen = indices[np.linspace(0, len(indices), min(_DIGEST_SAMPLES, len(indices)), endpoint=False, dtype=np.int64)]
    repeatable = len(indices) == 0 or parts(int(indices[0])) == parts(int(indices[0]))
    for index in chosen:
        for part in parts(int(index))[0 if repeatable else 1 :]:
            digest.update(part)
    return digest.hexdigest()[:16]


def _value_bytes(value: object) -> bytes:
    return tensor_bytes(value) if isinstance(value, Tensor) else np.asarray(value).tobytes()


def as_split(data: object) -> Split:
    """Return what a user brings as a split: a Split, a Dataset, a DataLoader or a pair of tensors.

    Raises:
        SplitError: It is none of these.
    """
    if isinstance(data, DataLoader):
        return LoaderSplit(data)
    if type(data) is TensorDataset and len(data.tensors) == 2:
        return TensorSplit(*data.tensors)
    if isinstance(data, Split):
        return data
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return TensorSplit(*data)
    map_style = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if map_style and not isinstance(data, IterableDataset | tuple | list | dict | str | Tensor):
        return DatasetSplit(cast(Dataset[Any], data))
    raise SplitError(
        f"a split must be a map-style Dataset, a DataLoader or a pair of tensors (inputs, targets), "
        f"but got a {type(data).__name__}; wrap it in one of these"
    )


def subset(split: Split, indices: Tensor) -> Split:
    """Return the samples of a split at `indices`, `(k,)` int64.

    Of a `DataLoader` the dataset, the collate function and the workers are kept, its order is not.

    Raises:
        SplitError: A split of this kind has no numbered samples.
    """
    if isinstance(split, TensorSplit):
        return TensorSplit(split.inputs[indices], split.targets[indices], split.transform)
    if isinstance(split, DatasetSplit):
        return DatasetSplit(Subset(split.dataset, indices.tolist()), split.collate, split.workers)
    if isinstance(split, LoaderSplit) and isinstance(
        split.loader.sampler, SequentialSampler | RandomSampler | SubsetRandomSampler
    ):
        loader = split.loader
        if loader.batch_size is not None:
            places = torch.from_numpy(_loader_indices(loader))[indices].tolist()
            return DatasetSplit(Subset(loader.dataset, places), loader.collate_fn, loader.num_workers)
    raise SplitError("validation can't be cut from a split with its own sampling; give `val` yourself")


def cut(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Cut a split in two that share no sample, at random, by `seed` alone.

    Args:
        split: What to cut.
        fraction: Of its samples that the second part gets, in (0, 1); rounded to whole samples.
        seed: Of the draw.

    Returns:
        The rest and the part held out, each in the original order.

    Raises:
        SplitError: A part would be empty, or the split can't be cut.
    """
    held_out = round(len(split) * fraction)
    if not (0.0 < fraction < 1.0 and 0 < held_out < len(split)):
        raise SplitError(
            f"`0 < fraction < 1` must hold and leave samples on both sides, but got fraction={fraction:g} of "
            f"{len(split)} samples; choose another fraction or give `val` yourself"
        )
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return subset(split, order[held_out:].sort().values), subset(split, order[:held_out].sort().values)


def overlap(a: Split, b: Split) -> int:
    """Return how many samples two splits share, as far as can be seen without reading them all.

    For data sets: the indices in common, if both lie (through any depth of `Subset`) on one dataset object. For data
    in memory: the equal inputs, where these are more than 1 % of the smaller split; fewer count as none, since
    real data sets hold some images twice. Two dataset objects over the same files are not recognised.
    """
    if isinstance(a, TensorSplit) and isinstance(b, TensorSplit):
        common = len(a.content & b.content)
        return common if common > _SAME_CONTENT_TOLERATED * min(len(a.content), len(b.content)) else 0
    (root_a, places_a), (root_b, places_b) = _source(a), _source(b)
    return len(np.intersect1d(places_a, places_b)) if root_a is root_b else 0


def _source(split: Split) -> tuple[object, Indices]:
    """Return the object that a split's samples lie on, and where."""
    if isinstance(split, DatasetSplit):
        return _unwrapped(split.dataset, np.arange(len(split)))
    if isinstance(split, LoaderSplit):
        return _unwrapped(split.loader.dataset, _loader_indices(split.loader))
    return split, np.arange(len(split))


def _unwrapped(dataset: Dataset[Any], indices: Indices) -> tuple[Dataset[Any], Indices]:
    while isinstance(dataset, Subset):
        indices = np.asarray(dataset.indices, dtype=np.int64)[indices]
        dataset = dataset.dataset
    return dataset, indices


# --------------------------------------------------------------------------------- transforms and augmentation


def _per_channel(values: Iterable[float], like: Tensor) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float32, device=like.device).view(1, -1, 1, 1)


@dataclass(frozen=True, slots=True)
class Normalise:
    """Make images `(n, c, h, w)` of any dtype into floats: `(x / scale - mean) / std`, a channel at a time."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return a new float32 tensor of the same shape."""
        mean, std = _per_channel(self.mean, inputs), _per_channel(self.std, inputs)
        return inputs.float().div(self.scale).sub_(mean).div_(std)

    def black(self) -> tuple[float, ...]:
        """Return what a pixel of value 0 becomes, a channel at a time."""
        return tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))


def crop_flip(
    inputs: Tensor, top: Tensor, left: Tensor, flip: Tensor, *, padding: int, fill: Sequence[float] = (0.0,)
) -> Tensor:
    """Pad each image, cut a window of the original size out, and mirror some; no loop over images.

    Args:
        inputs: `(n, c, h, w)` float.
        top: `(n,)` int64 in [0, 2 * padding], the window's first row.
        left: `(n,)` int64 in [0, 2 * padding], the window's first column.
        flip: `(n,)` bool, mirrored left to right.
        padding: Pixels added on each side.
        fill: Their value; one, or one a channel.

    Returns:
        `(n, c, h, w)`, a new tensor.
    """
    n, channels, height, width = inputs.shape
    border = _per_channel(fill, inputs).to(inputs.dtype)
    padded = border.expand(n, channels, height + 2 * padding, width + 2 * padding).clone()
    padded[:, :, padding : padding + height, padding : padding + width] = inputs
    rows = top[:, None] + torch.arange(height)
    forward = torch.arange(width)
    columns = left[:, None] + torch.where(flip[:, None], forward.flip(0), forward)
    device = inputs.device
    image = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return padded[image, channel, rows.to(device)[:, None, :, None], columns.to(device)[:, None, None, :]]


@dataclass(frozen=True, slots=True)
class RandomCropFlip:
    """Random crop after padding, and a mirror image half of the time: the usual augmentation for CIFAR.

    Attributes:
        padding: Pixels added on each side.
        flip: Whether to mirror.
        fill: Value of the pixels added, one or one a channel, in the units of the inputs.
    """

    padding: int = 4
    flip: bool = True
    fill: tuple[float, ...] = (0.0,)

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return new images for `(n, c, h, w)`; three draws of `(n,)` from the generator, on the CPU."""
        n = len(inputs)
        top = torch.randint(2 * self.padding + 1, (n,), generator=generator)
        left = torch.randint(2 * self.padding + 1, (n,), generator=generator)
        flip = torch.randint(2, (n,), generator=generator).bool() & self.flip
        return crop_flip(inputs, top, left, flip, padding=self.padding, fill=self.fill)


@dataclass(frozen=True, slots=True)
class RandomShift:
    """Shift each image by up to `pixels` in both directions; for digits, which have no mirror image.

    Attributes:
        pixels: The largest shift.
        fill: Value of the pixels that come in, one or one a channel, in the units of the inputs.
    """

    pixels: int = 1
    fill: tuple[float, ...] = (0.0,)

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return new images for `(n, c, h, w)`."""
        return RandomCropFlip(self.pixels, flip=False, fill=self.fill)(inputs, generator)


# ------------------------------------------------------------------------------------------------ named data sets


@dataclass(frozen=True, slots=True, eq=False)
class NamedData:
    """A data set known by name.

    Attributes:
        name: As in `names()`.
        train: Training samples, normalised, not augmented.
        test: Test samples, normalised.
        num_classes: Targets are 0 to `num_classes - 1`, int64.
        in_channels: Channels of an image.
        input_size: Height and width of an image, in pixels.
        augment: What training batches go through.
        val_fraction: Share of the training samples that are cut off for validation where nothing else is asked for;
            larger for small data, so that a candidate's accuracy has a standard error worth reading.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    in_channels: int
    input_size: int
    augment: Augment
    val_fraction: float = 0.1


_MNIST: Final = Normalise((0.1307,), (0.3081,))
_FASHION_MNIST: Final = Normalise((0.2860,), (0.3530,))
# ImageNet's constants, because the published CIFAR-10 checkpoints of akamaster/pytorch_resnet_cifar10 use them.
_CIFAR10: Final = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_DIGITS: Final = Normalise((0.3053,), (0.3760,), scale=16.0)


def _digits() -> NamedData:
    """Scikit-learn's 1,797 digits of 8x8; every fifth image of each class is the test split."""
    with isolated_rng(0):  # importing it draws from Python's generator
        from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    targets = torch.from_numpy(bunch.target).long()
    place_in_class = (targets[:, None] == targets[None, :]).tril().sum(1) - 1
    test = place_in_class % 5 == 0
    train_split = TensorSplit(images[~test], targets[~test], _DIGITS)
    return NamedData(
        "digits",
        train_split,
        TensorSplit(images[test], targets[test], _DIGITS),
        10,
        1,
        8,
        RandomShift(1, _DIGITS.black()),
        val_fraction=0.25,
    )


def _from_torchvision(
    name: str, class_name: str, normalise: Normalise, augment: Augment, root: str | Path | None, download: bool
) -> NamedData:
    import torchvision

    if root is None:
        raise SplitError(f"{name} is read from a folder, but none was given; pass --data-root DIR (root=DIR)")
    dataset_class = getattr(torchvision.datasets, class_name)
    try:
        stored = [dataset_class(Path(root).expanduser(), train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        raise SplitError(
            f"{name} could not be read from {root} ({reason}); pass the --data-root DIR that holds it, or --download"
        ) from error
    splits = []
    for dataset in stored:
        images = torch.as_tensor(dataset.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        splits.append(TensorSplit(images, torch.as_tensor(dataset.targets).long(), normalise))
    channels, size = splits[0].inputs.shape[1:3]
    return NamedData(name, splits[0], splits[1], 10, channels, size, augment)


_TORCHVISION: Mapping[str, tuple[str, Normalise, Augment]] = MappingProxyType(
    {
        "cifar10": ("CIFAR10", _CIFAR10, RandomCropFlip(4, fill=_CIFAR10.black())),
        "fashion-mnist": ("FashionMNIST", _FASHION_MNIST, RandomCropFlip(2, fill=_FASHION_MNIST.black())),
        "mnist": ("MNIST", _MNIST, RandomShift(2, fill=_MNIST.black())),
    }
)


def names() -> list[str]:
    """Return the names that `load` takes, sorted."""
    return sorted(["digits", *_TORCHVISION])


def load(name: str, root: str | Path | None = None, download: bool = False) -> NamedData:
    """Load a named data set into memory.

    Args:
        name: One of `names()`. `digits` comes with scikit-learn and needs no folder.
        root: The folder that torchvision keeps its data sets in.
        download: Whether it may be fetched into `root` where it is not there.

    Raises:
        UnknownNameError: There is no data set of that name.
        SplitError: The folder is not given, or does not hold it.
    """
    if name == "digits":
        return _digits()
    if name not in _TORCHVISION:
        raise UnknownNameError("data set", name, names())
    return _from_torchvision(name, *_TORCHVISION[name], root, download)
