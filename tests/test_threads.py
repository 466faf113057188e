"""Work on a CPU's cores: what it returns does not depend on how many there are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from quantize.kernels.attention.reference import attend
from quantize.methods.sbvr.fit import fit_codebook
from quantize.threads import Beside, at_once, few_threads, side_by_side, spare_threads

MANY = 1 << 21
"""Elements that keep all threads busy."""


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_few_threads_for_little_work(threads: int) -> None:
    with few_threads(torch.empty(1000), 1000):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads


def test_all_threads_for_much_work(threads: int) -> None:
    with few_threads(torch.empty(1000), MANY):
        assert torch.get_num_threads() == threads


def test_threads_come_back_after_an_error(threads: int) -> None:
    with pytest.raises(ZeroDivisionError), few_threads(torch.empty(10)):
        raise ZeroDivisionError
    assert torch.get_num_threads() == threads


def test_results_are_in_order_and_jobs_have_one_thread(threads: int) -> None:
    def job(number: int) -> tuple[int, int, str]:
        return number, torch.get_num_threads(), threading.current_thread().name

    found = side_by_side([partial(job, i) for i in range(7)], torch.empty(10))
    assert [number for number, _, _ in found] == list(range(7))
    assert {count for _, count, _ in found} == {1}
    assert torch.get_num_threads() == threads
    # A pool has as many as it needs at most.
    assert len({name for *_, name in found}) <= threads


def test_much_work_is_done_by_all_threads_one_job_after_the_other(threads: int) -> None:
    def job() -> tuple[int, str]:
        return torch.get_num_threads(), threading.current_thread().name

    assert side_by_side([job] * 3, MANY) == [(threads, "MainThread")] * 3
    assert at_once(3, MANY) == 1
    assert at_once(3, 10) == threads
    assert at_once(2, 10) == min(2, threads)


@pytest.mark.parametrize("grad", [False, True])
def test_jobs_have_the_gradient_mode_of_who_asks(threads: int, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        assert side_by_side([torch.is_grad_enabled] * 4, 10) == [grad] * 4


def test_an_error_of_a_job_is_raised(threads: int) -> None:
    def fail() -> None:
        raise KeyError("what went wrong")

    with pytest.raises(KeyError, match="what went wrong"):
        side_by_side([lambda: None, fail, lambda: None], 10)


def test_jobs_inside_jobs_have_one_thread(threads: int) -> None:
    def outer() -> list[int]:
        return side_by_side([torch.get_num_threads] * 2, 10)

    assert side_by_side([outer] * 2, 10) == [[1, 1], [1, 1]]


def test_no_jobs_give_no_results() -> None:
    assert side_by_side([], 10) == []


def test_half_of_the_threads_are_spare(threads: int) -> None:
    assert spare_threads() == threads // 2


def test_jobs_beside_are_done_in_order_by_one_thread() -> None:
    order: list[tuple[int, int, bool]] = []

    def job(number: int) -> threading.Thread:
        order.append((number, torch.get_num_threads(), torch.is_grad_enabled()))
        return threading.current_thread()

    with torch.no_grad():
        beside = Beside(1)
        begun = [beside.begin(partial(job, i)) for i in range(5)]
        last = beside.do(partial(job, 5))
    assert order == [(i, 1, False) for i in range(6)]
    assert {one.result() for one in begun} == {last}
    assert last is not threading.current_thread()
    del beside
    last.join(20)
    assert not last.is_alive()


def test_a_job_beside_may_ask_for_another() -> None:
    beside = Beside(1)
    assert not beside.is_here
    assert beside.do(lambda: (beside.is_here, beside.do(lambda: 7))) == (True, 7)


def test_an_error_beside_is_raised_where_the_result_is_asked_for() -> None:
    def fail() -> None:
        raise KeyError("what went wrong")

    beside = Beside(1)
    begun = beside.begin(fail)
    assert beside.do(lambda: 3) == 3
    with pytest.raises(KeyError, match="what went wrong"):
        begun.result()


def _attended() -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(3, heads, 300, 16, generator=draw) for heads in (4, 2, 2))
    return attend(q, k, v, None, 0.25, True)


def _codebook() -> tuple[torch.Tensor, ...]:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    codebook, index = fit_codebook(weight, 3, 64, bias=True, lines=64, seed=1)
    return codebook.lines, codebook.scales, index


def test_attention_does_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(_attended())
    torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_codebooks_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(_codebook())
    torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
