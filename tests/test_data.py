"""Splits are read the same way whatever lies under them, never share samples, and touch no global generator."""

import functools
import pickle
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from autoprune import data
from autoprune.errors import SplitError, UnknownNameError
from autoprune.progress import Silent

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


class Numbers(Dataset[tuple[Tensor, int]]):
    """Sample i is (i, i), plus what `noise` gives."""

    def __init__(self, n: int, noise: Callable[[], float] = lambda: 0.0) -> None:
        self.n = n
        self.noise = noise

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([index + self.noise()]), index


def global_noise() -> float:
    return float(torch.rand(())) + float(np.random.rand()) + random.random()  # noqa: NPY002 - what users' code does


def numbers(n: int) -> data.TensorSplit:
    return data.TensorSplit(torch.arange(float(n)).view(n, 1), torch.arange(n))


def targets(split: data.Split, batch_size: int = 4, **options: Any) -> list[int]:
    return [int(y) for _, batch in split.batches(batch_size, **options) for y in batch]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_kind(n: int, noise: Callable[[], float] = lambda: 0.0) -> list[data.Split]:
    loader: DataLoader[Any] = DataLoader(Numbers(n, noise), batch_size=4, shuffle=True)
    return [numbers(n), data.DatasetSplit(Numbers(n, noise)), data.LoaderSplit(loader)]


# ---------------------------------------------------------------------------------------------------------- reading


def test_a_pass_gives_every_sample_once_and_keeps_the_short_batch() -> None:
    for split in every_kind(10):
        sizes = [len(inputs) for inputs, _ in split.batches(4)]
        assert (len(split), sizes) == (10, [4, 4, 2])
        assert sorted(targets(split)) == list(range(10))
        assert all(torch.equal(x.view(-1).long(), y) for x, y in split.batches(4, shuffle=seeded(1)))


def test_the_order_depends_on_the_generator_alone() -> None:
    for split in every_kind(30):
        assert targets(split) == targets(split)
        assert targets(split, shuffle=seeded(1)) == targets(split, shuffle=seeded(1))
        assert targets(split, shuffle=seeded(1)) != targets(split, shuffle=seeded(2))
        one_generator = seeded(1)
        assert targets(split, shuffle=one_generator) != targets(split, shuffle=one_generator)


def test_random_augmentation_inside_a_dataset_is_repeatable() -> None:
    def inputs(split: data.Split, seed: int) -> Tensor:
        return torch.cat([x for x, _ in split.batches(4, shuffle=seeded(seed))])

    for split in every_kind(8, global_noise)[1:]:
        assert torch.equal(inputs(split, 1), inputs(split, 1))
        assert not torch.equal(inputs(split, 1).sort(0).values, inputs(split, 2).sort(0).values)


def test_a_loader_with_a_generator_of_its_own_is_repeatable_and_the_generator_stays() -> None:
    own = seeded(3)
    split = data.LoaderSplit(DataLoader(Numbers(30), batch_size=4, shuffle=True, generator=own))
    before = own.get_state()
    assert targets(split, shuffle=seeded(1)) == targets(split, shuffle=seeded(1))
    assert targets(split, shuffle=seeded(1)) != targets(split, shuffle=seeded(2))
    assert torch.equal(before, own.get_state())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_the_same_for_a_seed(persistent: bool) -> None:
    loader = DataLoader(Numbers(9, global_noise), 2, shuffle=True, num_workers=2, persistent_workers=persistent)
    split = data.LoaderSplit(loader)

    def drawn(seed: int) -> list[float]:
        return torch.cat([inputs for inputs, _ in split.batches(2, shuffle=seeded(seed))]).flatten().tolist()

    first = drawn(1)
    noise = [value % 1 for value in first]
    assert len(set(noise)) == 9
    assert drawn(2) != first
    assert drawn(1) == first
    assert loader.persistent_workers == persistent  # the user's own stays as it is
    with data.isolated_rng(0):
        assert len(list(loader)) == 5
    again = data.LoaderSplit(loader)  # whose workers may be at work
    assert torch.equal(next(again.batches(2, shuffle=seeded(1)))[0].flatten(), torch.tensor(first[:2]))
    assert pickle.loads(pickle.dumps(again.loader)).num_workers == 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_dataset_read_by_workers_draws_the_same_for_a_seed() -> None:
    split = data.DatasetSplit(Numbers(6, global_noise), workers=2)
    first, second, again = (
        torch.cat([inputs for inputs, _ in split.batches(2, shuffle=seeded(seed))]).tolist() for seed in (1, 2, 1)
    )
    assert first == again
    assert first != second


def test_isolated_rng_puts_the_generators_back_after_an_error() -> None:
    own = seeded(1)
    before, drawn = own.get_state(), []

    def fail() -> None:
        with data.isolated_rng(5, own):
            drawn.append((global_noise(), float(torch.rand((), generator=own))))
            raise RuntimeError("on purpose")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="on purpose"):
            fail()
    assert drawn[0] == drawn[1]
    assert torch.equal(before, own.get_state())


def test_a_loaders_length_counts_what_it_gives() -> None:
    dropping = DataLoader(Numbers(10), batch_size=4, drop_last=True)
    sampled = DataLoader(Numbers(10), batch_size=4, sampler=SubsetRandomSampler([1, 2, 3]))
    batched = DataLoader(Numbers(10), batch_sampler=BatchSampler(SequentialSampler(range(10)), 4, False))
    for loader, expected in ((dropping, 8), (sampled, 3), (batched, 10)):
        split = data.LoaderSplit(loader)
        assert len(split) == expected == len(targets(split))


def test_a_transform_makes_each_batch_and_the_memory_keeps_uint8() -> None:
    split = data.TensorSplit(
        torch.full((3, 2, 2, 2), 51, dtype=torch.uint8), torch.zeros(3), data.Normalise((0.1, 0.2), (0.5, 0.25))
    )
    inputs, _ = next(split.batches(2))
    assert split.inputs.dtype == torch.uint8
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs[0, :, 0, 0], torch.tensor([0.2, 0.0]))


def test_black_is_what_a_pixel_of_zero_becomes() -> None:
    normalise = data.Normalise((0.1, 0.2), (0.5, 0.25))
    torch.testing.assert_close(normalise(torch.zeros(1, 2, 1, 1)).view(-1), torch.tensor(normalise.black()))


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from ()


def test_as_split_takes_what_users_have() -> None:
    tensors = (torch.zeros(3, 1), torch.zeros(3))
    assert isinstance(data.as_split(tensors), data.TensorSplit)
    assert isinstance(data.as_split(TensorDataset(*tensors)), data.TensorSplit)
    assert isinstance(data.as_split(Numbers(3)), data.DatasetSplit)
    assert isinstance(data.as_split(DataLoader(Numbers(3))), data.LoaderSplit)
    split = numbers(3)
    assert data.as_split(split) is split


@pytest.mark.parametrize("wrong", [3, "folder", torch.zeros(3), {"train": 1}, Endless(), [torch.zeros(1)] * 3])
def test_as_split_refuses_the_rest(wrong: object) -> None:
    with pytest.raises(SplitError, match="a split must be a map-style Dataset"):
        data.as_split(wrong)


def test_unreadable_data_is_refused() -> None:
    with pytest.raises(SplitError, match="equally many"):
        data.TensorSplit(torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(SplitError, match="IterableDataset"):
        data.as_split(DataLoader(Endless()))
    with pytest.raises(SplitError, match="gives 3 parts"):
        next(data.DatasetSplit(TensorDataset(*[torch.zeros(2)] * 3)).batches(2))


# ---------------------------------------------------------------------------------------------------------- digests


def test_a_digest_is_repeatable_and_changes_with_the_content() -> None:
    for one, same, other in zip(every_kind(70), every_kind(70), every_kind(71), strict=True):
        assert one.digest() == one.digest() == same.digest() != other.digest()
    changed = numbers(70)
    changed.targets = changed.targets.flip(0)
    assert changed.digest() != numbers(70).digest()
    assert data.DatasetSplit(Numbers(70, lambda: 0.5)).digest() != data.DatasetSplit(Numbers(70)).digest()


@pytest.mark.parametrize("noise", [global_noise, np.random.default_rng(0).random], ids=["global", "its own"])
def test_a_digest_of_an_augmenting_dataset_is_repeatable(noise: Callable[[], float]) -> None:
    split = data.DatasetSplit(Numbers(5, noise))
    assert split.digest() == split.digest()
    assert split.digest() != data.DatasetSplit(Numbers(6, noise)).digest()


def test_two_parts_of_one_dataset_have_two_digests() -> None:
    whole = Numbers(200)
    first, second = (data.DatasetSplit(Subset(whole, part)) for part in (range(100), range(100, 200)))
    loaders = [data.LoaderSplit(DataLoader(whole, sampler=SubsetRandomSampler(part))) for part in ([0, 1], [2, 3])]
    assert first.digest() != second.digest()
    one_place = [*range(2), 150, *range(3, 100)]  # the third of a hundred samples is not among the 64 that are read
    assert first.digest() != data.DatasetSplit(Subset(whole, one_place)).digest()
    assert loaders[0].digest() != loaders[1].digest()


# --------------------------------------------------------------------------------------------------- cut and overlap


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 60), fraction=st.floats(0.02, 0.98), seed=st.integers(0, 2**31), kind=st.integers(0, 2))
def test_a_cut_loses_nothing_shares_nothing_and_repeats(n: int, fraction: float, seed: int, kind: int) -> None:
    split = every_kind(n)[kind]
    if not 0 < round(n * fraction) < n:
        with pytest.raises(SplitError, match="leave samples on both sides"):
            data.cut(split, fraction, seed)
        return
    rest, held_out = data.cut(split, fraction, seed)
    assert len(held_out) == round(n * fraction)
    assert sorted(targets(rest) + targets(held_out)) == list(range(n))
    assert data.overlap(rest, held_out) == 0
    assert targets(data.cut(split, fraction, seed)[1]) == targets(held_out)


def test_another_seed_cuts_elsewhere() -> None:
    assert targets(data.cut(numbers(100), 0.2, 0)[1]) != targets(data.cut(numbers(100), 0.2, 1)[1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_a_fraction_outside_is_refused(fraction: float) -> None:
    with pytest.raises(SplitError, match="`0 < fraction < 1`"):
        data.cut(numbers(10), fraction, 0)


def test_a_loaders_own_subset_is_cut_within_itself() -> None:
    rest, held_out = data.cut(
        data.LoaderSplit(DataLoader(Numbers(20), sampler=SubsetRandomSampler([3, 5, 7, 9]))), 0.5, 0
    )
    assert sorted(targets(rest) + targets(held_out)) == [3, 5, 7, 9]


def test_a_loader_with_its_own_sampling_is_not_cut() -> None:
    weighted = DataLoader(Numbers(10), sampler=WeightedRandomSampler([1.0] * 10, 10))
    batched = DataLoader(Numbers(10), batch_sampler=BatchSampler(SequentialSampler(range(10)), 4, False))
    for loader in (weighted, batched):
        with pytest.raises(SplitError, match="give `val` yourself"):
            data.cut(data.LoaderSplit(loader), 0.5, 0)


def test_overlap_counts_equal_content_above_one_percent() -> None:
    a = numbers(1000)
    part = data.subset(a, torch.arange(500, 1000))
    relabelled = data.TensorSplit(part.inputs.clone(), part.targets * 0)  # type: ignore[attr-defined]
    few = data.TensorSplit(torch.arange(995.0, 1995.0).view(-1, 1), torch.zeros(1000))
    assert data.overlap(a, relabelled) == 500
    assert data.overlap(a, few) == 0
    assert data.overlap(a, data.TensorSplit(torch.arange(985.0, 1985.0).view(-1, 1), torch.zeros(1000))) == 15


def test_overlap_looks_through_subsets_and_samplers() -> None:
    whole = Numbers(10)
    left, right = random_split(whole, [6, 4], generator=seeded(0))
    nested = Subset(left, [0, 1])
    assert data.overlap(data.as_split(left), data.as_split(right)) == 0
    assert data.overlap(data.as_split(left), data.as_split(nested)) == 2
    assert data.overlap(data.as_split(whole), data.as_split(DataLoader(right))) == 4
    a, b = (data.as_split(DataLoader(whole, sampler=SubsetRandomSampler(part))) for part in ([0, 1, 2], [2, 3]))
    assert data.overlap(a, b) == 1
    assert data.overlap(data.as_split(whole), data.as_split(Numbers(10))) == 0


# ------------------------------------------------------------------------------------------------------ augmentation


def naive_crop_flip(image: Tensor, top: int, left: int, flip: bool, padding: int, fill: tuple[float, ...]) -> Tensor:
    channels, height, width = image.shape
    out = torch.empty_like(image)
    for c in range(channels):
        for row in range(height):
            for column in range(width):
                y = row + top - padding
                x = (width - 1 - column if flip else column) + left - padding
                inside = 0 <= y < height and 0 <= x < width
                out[c, row, column] = image[c, y, x] if inside else fill[c % len(fill)]
    return out


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 4),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    padding=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("fill", [(0.0,), (-1.0, 2.0)])
def test_crops_and_flips_equal_a_loop_over_pixels(
    fill: tuple[float, ...], n: int, height: int, width: int, padding: int, seed: int
) -> None:
    generator = seeded(seed)
    images = torch.rand(n, 2, height, width, generator=generator)
    top, left = (torch.randint(2 * padding + 1, (n,), generator=generator) for _ in range(2))
    flip = torch.randint(2, (n,), generator=generator).bool()
    expected = [naive_crop_flip(images[i], int(top[i]), int(left[i]), bool(flip[i]), padding, fill) for i in range(n)]
    assert torch.equal(data.crop_flip(images, top, left, flip, padding=padding, fill=fill), torch.stack(expected))


def test_augmentation_draws_every_crop_and_flip_anew_for_each_image() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3) + 1
    out = data.RandomCropFlip(padding=1)(image.expand(600, -1, -1, -1), seeded(0))
    assert len({tuple(one.view(-1).tolist()) for one in out}) == 3 * 3 * 2
    shifted = data.RandomShift(1)(image.expand(600, -1, -1, -1), seeded(0))
    assert len({tuple(one.view(-1).tolist()) for one in shifted}) == 3 * 3
    assert torch.equal(shifted, data.RandomShift(1)(image.expand(600, -1, -1, -1), seeded(0)))
    assert {
        float(one[0, 0, 0]) for one in data.RandomShift(1, fill=(-5.0,))(image.expand(99, -1, -1, -1), seeded(0))
    } >= {-5.0}


# ------------------------------------------------------------------------------------------------------- named data


def test_digits_are_cut_by_class_and_do_not_overlap() -> None:
    digits = data.load("digits")
    assert (len(digits.train), len(digits.test), digits.in_channels, digits.input_size) == (1433, 364, 1, 8)
    assert isinstance(digits.train, data.TensorSplit)
    assert isinstance(digits.test, data.TensorSplit)
    assert not digits.train.content & digits.test.content
    assert digits.test.targets.bincount().tolist() == [36, 37, 36, 37, 37, 37, 37, 36, 35, 36]
    inputs = torch.cat([x for x, _ in digits.train.batches(500)])
    assert abs(float(inputs.mean())) < 0.02
    assert abs(float(inputs.std()) - 1) < 0.02
    assert data.load("digits").train.digest() == digits.train.digest()


@pytest.mark.parametrize(
    ("name", "train", "channels", "size"),
    [("cifar10", 50_000, 3, 32), ("mnist", 60_000, 1, 28), ("fashion-mnist", 60_000, 1, 28)],
)
def test_torchvision_data_is_read_from_its_folder(
    name: str, train: int, channels: int, size: int, data_root: Path
) -> None:
    source = data.load(name, data_root)
    assert (len(source.train), len(source.test)) == (train, 10_000)
    start = time.process_time()
    assert data.overlap(source.train, source.test) == 0
    assert time.process_time() - start < 2
    inputs, labels = next(source.train.batches(256))
    assert inputs.shape == (256, channels, size, size)
    assert labels.dtype == torch.int64
    augmented = source.augment(inputs, seeded(0))
    assert augmented.shape == inputs.shape
    # Shifting brings in black and nothing darker.
    torch.testing.assert_close(augmented.amin((0, 2, 3)), inputs.amin((0, 2, 3)))


def test_named_data_that_is_not_there_gets_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(SplitError, match="pass --data-root DIR"):
        data.load("mnist")
    for name in ("cifar10", "mnist"):
        with pytest.raises(SplitError, match=f"{name} could not be read from .* or --download"):
            data.load(name, tmp_path)
    with pytest.raises(UnknownNameError, match="Did you mean 'fashion-mnist'"):
        data.load("fashionmnist")


def test_names_are_the_same_in_every_process() -> None:
    named = data.callable_name(functools.partial(cross_entropy, reduction="none", label_smoothing=0.1))
    assert named == "cross_entropy(label_smoothing=0.1, reduction='none')"  # without an address
    assert data.callable_name(functools.partial(functools.partial(max, 1), 2)) == "max(1, 2)"
    assert data.callable_name(cross_entropy) == "cross_entropy"
    assert data.callable_name(Silent()) == "Silent"
