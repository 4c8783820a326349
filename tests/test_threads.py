"""Work side by side: results in order, what is raised arrives, and torch's threads are as before."""

import threading

import pytest
import torch

from autoprune.threads import side_by_side, suited_threads


def test_each_runs_in_a_thread_of_its_own_with_one_torch_thread() -> None:
    both = threading.Barrier(2, timeout=60)  # broken unless they run at the same time

    def work() -> tuple[int, int]:
        both.wait()
        return threading.get_ident(), torch.get_num_threads()

    before = torch.get_num_threads()
    found = side_by_side([work, work])
    assert len({found[0][0], found[1][0], threading.get_ident()}) == 3
    assert [threads for _, threads in found] == [1, 1]
    assert torch.get_num_threads() == before


def test_results_come_in_the_order_of_the_functions() -> None:
    first_is_last = threading.Event()

    def first() -> str:
        assert first_is_last.wait(60)
        return "first"

    def second() -> str:
        first_is_last.set()
        return "second"

    assert side_by_side([first, second]) == ["first", "second"]


def test_one_runs_here() -> None:
    assert side_by_side([threading.get_ident]) == [threading.get_ident()]


def test_what_is_raised_arrives_and_threads_are_restored() -> None:
    def fails() -> None:
        raise KeyError("a")

    before = torch.get_num_threads()
    with pytest.raises(KeyError, match="a"):
        side_by_side([lambda: None, fails])
    assert torch.get_num_threads() == before


def test_new_threads_have_what_torch_has_afterwards() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        side_by_side([lambda: None] * 2)
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [2]
    finally:
        torch.set_num_threads(before)


def test_small_networks_get_one() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with suited_threads(1000):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with suited_threads(10**9):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
