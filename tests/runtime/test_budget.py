"""One device, many pipelines: whose turn it is, what each may hold, and who makes room."""

from __future__ import annotations

import threading

import pytest
from tightfit.runtime.budget import DeviceBudget
from tightfit.runtime.errors import TightfitError


class Tenant:
    def __init__(self, room_bytes: int, held_bytes: int = 0) -> None:
        self.room_bytes, self.held_bytes = room_bytes, held_bytes

    def held(self) -> int:
        return self.held_bytes

    def free(self) -> None:
        self.held_bytes = 0


@pytest.fixture
def budget():
    return DeviceBudget()


def test_one_budget_for_each_device():
    assert DeviceBudget.of("made-up") is DeviceBudget.of("made-up") is not DeviceBudget.of("made-up too")


def test_alone_a_tenant_gets_all_that_it_wants(budget):
    alone = Tenant(100, 90)
    assert [budget.share(alone, wanted, 50) for wanted in (70, 100, 200)] == [70, 100, 200]
    assert alone.held_bytes == 90


def test_what_idle_ones_hold_is_left_out(budget):
    """The second was detected before the first held anything, the third after."""
    first, second, third = Tenant(100), Tenant(100), Tenant(70)
    assert budget.share(first, 100, 60) == 100
    first.held_bytes = 30
    assert budget.share(second, 100, 70) == 70
    assert budget.share(third, 70, 70) == 70
    assert budget.share(third, 20, 20) == 20
    assert first.held_bytes == 30


def test_the_longest_idle_makes_room_first(budget):
    tenants = [Tenant(100) for _ in range(3)]
    for tenant in tenants:
        budget.share(tenant, 100, 10)
        tenant.held_bytes = 30
    budget.share(tenants[0], 100, 10)  # now the second is the longest idle
    newest = Tenant(100, 5)
    assert budget.share(newest, 100, 40) == 40
    assert [tenant.held_bytes for tenant in tenants] == [30, 0, 30]
    assert newest.held_bytes == 0  # what others hold is read anew
    assert budget.share(newest, 100, 100) == 100
    assert [tenant.held_bytes for tenant in tenants] == [0, 0, 0]


def test_the_room_of_one_that_holds_nothing_is_no_room(budget):
    """A pipeline that was closed, detected when more was free, and not collected yet."""
    closed, idle, newest = Tenant(500), Tenant(100), Tenant(100)
    budget.share(closed, 500, 10)
    budget.share(idle, 100, 90)
    idle.held_bytes = 90
    assert budget.share(newest, 100, 60) == 100
    assert idle.held_bytes == 0


def test_a_tenant_that_is_gone_holds_nothing(budget):
    gone = Tenant(500)
    budget.share(gone, 100, 10)
    gone.held_bytes = 90
    del gone
    assert budget.share(Tenant(100), 100, 50) == 100


def test_a_second_turn_in_one_thread_is_refused(budget):
    one, other = Tenant(1), Tenant(1)
    with budget.claim(one):
        assert (budget.busy(one), budget.busy(other)) == (False, True)
        with pytest.raises(TightfitError, match=r"^this pipeline is painting already"):
            budget.claim(one)
        with pytest.raises(TightfitError, match=r"^another pipeline of this thread is painting already"):
            budget.claim(other)
    assert not budget.busy(other)
    with budget.claim(other):
        pass


def test_a_turn_in_another_thread_waits(budget):
    taken = threading.Event()
    turn = budget.claim(Tenant(1))

    def wait() -> None:
        with budget.claim(Tenant(1)):
            taken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not taken.wait(0.05)
    turn.release()
    assert taken.wait(60)
    thread.join()
    with budget.claim(Tenant(1)) as later:
        turn.release()  # it has ended, and ends no other
        assert budget.busy(Tenant(1))
    assert later is not turn
