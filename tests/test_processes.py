"""Work in processes: what travels, what comes back, and what is left when one fails."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autoprune.errors import AutopruneError, ConfigError, ExecutorError, UnknownNameError
from autoprune.processes import apart, packed, users_modules


class OfThisFile(Exception):
    """Takes two arguments, so that it can't be made again from what it says."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def together(
    folder: Path, work: Callable[[Path, int], None], numbers: list[int], processes: int = 2, threads: int = 1
) -> None:
    apart(packed(work, folder), numbers, processes=processes, threads=threads)


def test_each_number_is_worked_on_once_in_a_process_of_its_own(tmp_path: Path) -> None:
    def work(folder: Path, number: int) -> None:
        (folder / str(number)).write_text(f"{os.getpid()} {torch.get_num_threads()}")

    together(tmp_path, work, [3, 1, 2], threads=1)
    told = [(tmp_path / str(number)).read_text().split() for number in (1, 2, 3)]
    assert len({process for process, _ in told} | {str(os.getpid())}) == 4
    assert [threads for _, threads in told] == ["1"] * 3


def test_as_many_together_as_may_be(tmp_path: Path) -> None:
    def work(folder: Path, number: int) -> None:
        (folder / f"{number}.begun").touch()
        other = folder / f"{1 - number}.begun"
        for _ in range(600):
            if other.exists():
                return
            time.sleep(0.05)
        raise TimeoutError("the other one never began")

    together(tmp_path, work, [0, 1])


def test_and_no_more(tmp_path: Path) -> None:
    def work(folder: Path, number: int) -> None:
        assert not (folder / "begun").exists()
        (folder / "begun").touch()
        time.sleep(0.3)
        (folder / "begun").unlink()

    together(tmp_path, work, [0, 1], processes=1)


def test_what_is_raised_there_is_raised_here_and_nothing_goes_on(tmp_path: Path) -> None:
    def work(folder: Path, number: int) -> None:
        if number == 0:
            raise ConfigError("`this >= 0` must hold")
        (folder / f"{number}.pid").write_text(str(os.getpid()))
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(ConfigError, match="`this >= 0` must hold") as error:
        together(tmp_path, work, [1, 0, 2])
    assert "in another process:" in error.value.__notes__[0]
    assert "in work" in error.value.__notes__[0]  # where it was raised
    assert time.monotonic() - started < 50
    assert not (tmp_path / "2.pid").exists()
    process = tmp_path / "1.pid"
    assert not process.exists() or not is_running(int(process.read_text()))


def test_an_exception_that_does_not_travel_says_the_same(tmp_path: Path) -> None:
    def work(folder: Path, number: int) -> None:
        raise OfThisFile(1, 2)

    with pytest.raises(RuntimeError, match="OfThisFile: 1 and 2"):
        together(tmp_path, work, [0])

    def ours(folder: Path, number: int) -> None:
        raise UnknownNameError("agent", "tpee", ["tpe"])

    with pytest.raises(AutopruneError, match="Did you mean 'tpe'"):
        together(tmp_path, ours, [0])


def test_a_process_that_dies_is_told_of(tmp_path: Path) -> None:
    def work(folder: Path, number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ExecutorError, match=f"signal {signal.SIGKILL}; memory may have run out"):
        together(tmp_path, work, [0])

    def leaving(folder: Path, number: int) -> None:
        raise SystemExit(0)  # which is no success

    with pytest.raises(ExecutorError, match="exit code 0"):
        together(tmp_path, leaving, [0])


def test_processes_end_with_who_waits_for_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "from autoprune.processes import apart, packed\n"
        "def work(folder, number):\n"
        "    open(f'{folder}/pid', 'w').write(str(os.getpid()))\n"
        "    time.sleep(100)\n"
        "apart(packed(work, sys.argv[1]), [0], processes=1, threads=1)\n"
    )
    waiting = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    told = tmp_path / "pid"
    assert within(60, lambda: told.exists() and told.read_text() != "")
    waiting.kill()
    waiting.wait()
    assert within(30, lambda: not is_running(int(told.read_text())))


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Wait until something holds, but not for ever."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def is_running(process: int) -> bool:
    """Say whether a process is there, and is more than an entry that nobody asked for."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_can_t_be_sent_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ExecutorError, match="can't be sent to another process"):
        packed(lambda lock, number: None, threading.Lock())


def test_nothing_to_do() -> None:
    apart(packed(lambda folder, number: None, None), [], processes=2, threads=1)


def test_what_a_process_prints_is_no_part_of_what_is_printed_here(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from autoprune.processes import apart, packed\n"
        "def work(given, number): print('from the process', given, number)\n"
        "apart(packed(work, 'x'), [7], processes=1, threads=1)\n"  # no guard of __main__: the script is not run again
        "print('from here')\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout == "from here\n"
    assert "from the process x 7" in done.stderr


def test_modules_of_the_user_are_those_that_are_not_installed() -> None:
    names = {module.__name__ for module in users_modules()}
    assert __name__ in names
    assert not {"torch", "autoprune", "json", "pytest"} & names
