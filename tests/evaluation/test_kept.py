"""Batches that are kept: the same from a file as in memory, read once, and read again where there is no room."""

import errno
import io
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoprune.data import Batch
from autoprune.evaluation import Evaluator, Pipeline, Precision, Raced, Recovery, Workbench, workbench
from autoprune.evaluation.kept import Kept
from autoprune.policy import Policy
from autoprune.task import Task

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

CPU, LAST = torch.device("cpu"), Precision("float32", True)
MEMORY, FILE = 1 << 20, 0


class Images:
    """Ten images `(3, 2, 4)` and their numbers, in batches of four, as often as one likes."""

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        self.shapes = shapes or ((4, 3, 2, 4), (4, 3, 2, 4), (2, 3, 2, 4))
        self.dtype = dtype
        self.passes = 0

    def __call__(self) -> Iterator[Batch]:
        self.passes += 1
        done = 0
        for shape in self.shapes:
            numbers = torch.arange(done, done + shape[0])
            done += shape[0]
            inputs = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) / 7
            yield (inputs + 100 * numbers.view(-1, *[1] * (len(shape) - 1))).to(self.dtype), numbers

    def kept(self, memory: int, *order: Any, precision: Precision = LAST, samples: int = 10) -> Kept:
        return Kept(self(), samples, precision, CPU, memory, self, *order)


def no_room(path: object) -> Any:
    return shutil._ntuple_diskusage(10, 9, 1)  # type: ignore[attr-defined]  # what disk_usage returns


class Full(io.BytesIO):
    """A file on a disk on which two writes have room."""

    left = 2

    def write(self, content: Any) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


class TestKept:
    @pytest.mark.parametrize("order", [(), (5, 4)], ids=["as they come", "mixed"])
    @pytest.mark.parametrize("precision", [Precision(), LAST], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
    def test_a_file_holds_what_memory_holds(self, order: Any, precision: Precision, dtype: torch.dtype) -> None:
        images = Images(dtype=dtype)
        memory, file = (images.kept(where, *order, precision=precision) for where in (MEMORY, FILE))
        assert images.passes == 2  # one each
        for _ in range(2):
            for (inputs, targets), (mapped, numbers) in zip(memory, file, strict=True):
                assert (mapped.dtype, numbers.dtype) == (inputs.dtype, targets.dtype)
                assert (torch.equal(mapped, inputs), torch.equal(numbers, targets)) == (True, True)
                assert mapped.stride() == inputs.stride()
        assert images.passes == 2
        together = torch.cat([targets for _, targets in file])
        assert together.sort().values.tolist() == list(range(10))
        assert (together.tolist() == list(range(10))) == (not order)

    def test_tokens_are_not_turned(self) -> None:
        file = Images((4, 5), (3, 5)).kept(FILE, samples=7)
        assert [inputs.shape for inputs, _ in file] == [(4, 5), (3, 5)]
        assert [targets.tolist() for _, targets in file] == [[0, 1, 2, 3], [4, 5, 6]]

    def test_nothing_is_copied_from_the_file(self) -> None:
        file = Images().kept(FILE)
        (once, _), *_ = file
        (twice, _), *_ = file
        assert once.data_ptr() == twice.data_ptr()
        assert file.ready is not None
        assert len({inputs.untyped_storage().data_ptr() for inputs, _ in file.ready}) == 1

    def test_the_file_has_no_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        made: list[Any] = []
        real = tempfile.TemporaryFile
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda: made.append(real()) or made[-1])
        file = Images().kept(FILE)
        assert (file.fault, [one.closed for one in made]) == (None, [True, True])
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("images", "order", "reason"),
        [
            (Images((4, 3, 2, 4), (2, 3, 4, 2)), (), "samples are of several shapes or types"),
            (Images((4, 3, 2, 4), (4, 3, 2, 4)), (5, 4), "the split has not the 10 samples that it says"),
            (Images((4, 3, 2, 4), (6, 3, 2, 4), (1, 3, 2, 4)), (5, 4), "the split has not the 10 samples that it says"),
        ],
        ids=["shapes", "fewer", "more"],
    )
    def test_what_can_t_be_kept_is_read_again(self, images: Images, order: Any, reason: str) -> None:
        file = images.kept(FILE, *order)
        assert file.ready is None
        assert file.fault == f"0.0 GB are kept neither in memory nor in a file: {reason}"
        for _ in range(2):
            assert all(torch.equal(a, b) for (a, _), (b, _) in zip(file, images(), strict=True))
        assert next(iter(file))[0].is_contiguous(memory_format=torch.channels_last)

    def test_a_disk_without_room_is_left_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(shutil, "disk_usage", no_room)
        monkeypatch.setattr(tempfile, "TemporaryFile", None)
        file = Images().kept(FILE)
        assert file.fault is not None
        assert file.fault.endswith(f"{tmp_path} has 0.0 GB free; set TMPDIR to a folder that has more")
        assert len(list(file)) == 3

    def test_a_disk_that_fills_up_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "TemporaryFile", Full)
        file = Images().kept(FILE)
        assert file.fault is not None
        assert file.fault.endswith("file: [Errno 28] No space left on device")
        assert len(list(file)) == 3

    def test_errors_of_reading_are_the_user_s(self) -> None:
        def broken() -> Iterator[Batch]:
            yield torch.zeros(1, 3), torch.zeros(1)
            raise OSError("the picture is gone")

        with pytest.raises(OSError, match="the picture is gone"):
            Kept(broken(), 2, LAST, CPU, FILE, broken)

    def test_what_a_network_writes_to_its_inputs_stays_in_memory(self) -> None:
        images = Images()
        one, other = images.kept(FILE), images.kept(FILE)
        next(iter(one))[0].zero_()
        assert next(iter(one))[0].abs().max() == 0  # as in memory
        assert next(iter(other))[0].abs().max() > 0


class Counting(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Says how often samples were read."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets, self.read = inputs, targets, 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read += 1
        return self.inputs[index], int(self.targets[index])


MILD, HARD = Policy({"conv2": 0.25}), Policy({"conv1": 0.8, "conv2": 0.8})


class TestWorkbench:
    @pytest.fixture
    def val(self, task: Task) -> Counting:
        return Counting(*next(task.val_batches(200)))

    @pytest.fixture
    def make(self, task: Task, val: Counting, make_evaluator: Callable[..., Evaluator]) -> Callable[..., Workbench]:
        plain = make_evaluator(task).bench

        def made(rung: str = "reconstructed", race: bool = False) -> Workbench:
            again = Task(task.model, train=task._train, val=val)
            val.read = 0
            return Workbench(again, plain.structure, plain.orders, 200, 0, rung, race=race)

        return made

    @pytest.mark.parametrize("rung", ["reconstructed", "recalibrated"])
    @pytest.mark.parametrize("race", [False, True])
    def test_a_file_gives_the_values_of_memory_and_is_read_once(
        self, make: Callable[..., Workbench], val: Counting, rung: str, race: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def found() -> list[Tensor]:
            bench = make(rung, race)
            assert val.read == 101
            samples = [bench.dense, bench.measure(bench.recovered({"conv1": 3, "conv2": 4}))]
            samples += [bench.probe({"conv2": 3}), bench.probe({"conv2": 6})]
            assert val.read == 101
            assert bench.notes == []
            assert (bench.executed[-1] < 1) == (rung == "reconstructed")
            return [one.losses for one in samples]

        expected = found()
        monkeypatch.setattr(workbench, "_IN_MEMORY", 0)
        assert all(torch.equal(a, b) for a, b in zip(found(), expected, strict=True))

    def test_a_race_is_run_from_a_file(self, make: Callable[..., Workbench], monkeypatch: pytest.MonkeyPatch) -> None:
        def raced() -> tuple[Any, Any]:
            bench = make("recalibrated", True)
            bench._batch = 4
            bench._val = bench._validation()
            pipeline = Pipeline(bench, Recovery(200), 0)
            elsewhere = pickle.loads(pickle.dumps(pipeline))
            return pipeline(Raced(HARD, MILD)).measurements, elsewhere(MILD).measurements

        expected = raced()
        monkeypatch.setattr(workbench, "_IN_MEMORY", 0)
        assert raced() == expected
        ((bad,), _) = expected
        assert bad.samples is not None
        assert bad.samples < 101

    def test_without_room_all_is_read_again_and_told(
        self, make: Callable[..., Workbench], val: Counting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = make()
        expected = plain.probe({"conv2": 3})
        monkeypatch.setattr(workbench, "_IN_MEMORY", 0)
        monkeypatch.setattr(shutil, "disk_usage", no_room)
        for race in (False, True):
            bench = make(race=race)
            read = val.read
            probed = bench.probe({"conv2": 3})
            assert val.read == read + 101
            torch.testing.assert_close(probed.losses, expected.losses, rtol=0, atol=1e-6)
            assert bench.executed == [1.0]
            calibration, validation, *stopped = bench.notes
            assert calibration.startswith("calibration images are read again for each network: 0.0 GB are kept neither")
            assert validation.startswith("validation samples are read again for each network: 0.0 GB are kept neither")
            assert stopped == (["no candidate is stopped early"] if race else [])
            assert len(bench.measure(bench.recovered({"conv1": 6}), rival=expected)) == 101
