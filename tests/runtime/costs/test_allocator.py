"""What is reserved follows from the allocator's rules, worked out by hand, and its books stay in order."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tightfit.runtime.costs.allocator import CachingAllocator, ExactAllocator, OnnxArena, allocator

KIB, MIB = 2**10, 2**20


def reserved(*sizes: float) -> float:
    """MiB reserved once tensors of these MiB are alive together."""
    return filled(*sizes).peak / MIB


def filled(*sizes: float) -> CachingAllocator:
    """With tensors 0, 1, … of these MiB."""
    memory = CachingAllocator()
    for name, size in enumerate(sizes):
        memory.allocate(name, int(size * MIB))
    return memory


@pytest.mark.parametrize(
    ("count", "mib"),
    [
        (1, 2),
        (1000, 2),
        (MIB, 2),
        (MIB + 1, 20),
        (MIB + 512, 20),
        (10 * MIB - 512, 20),
        (10 * MIB - 511, 10),  # rounds to 10 MiB
        (10 * MIB, 10),
        (10 * MIB + 1, 12),
        (12 * MIB, 12),
        (25 * MIB + 1, 26),
        (26 * MIB, 26),
        (26 * MIB + 1, 28),
    ],
)
def test_one_tensor(count, mib):
    memory = CachingAllocator()
    memory.allocate(0, count)
    assert memory.peak == mib * MIB


@pytest.mark.parametrize(
    ("count", "how_many"),
    [
        (1, 4096),  # 512 bytes each, 2 MiB
        (512, 4096),
        (513, 2048),
        (MIB, 2),
        (700 * KIB, 2),  # 648 KiB are left
        (2 * MIB, 10),  # 20 MiB
        (3 * MIB, 6),  # 2 MiB are left
        (6 * MIB, 3),
        (9 * MIB, 2),
        (9.5 * MIB, 2),
    ],
)
def test_how_many_share_a_segment(count, how_many):
    memory = CachingAllocator()
    for name in range(how_many):
        memory.allocate(name, int(count))
    one = 2 * MIB if count <= MIB else 20 * MIB
    assert memory.peak == one
    memory.allocate(how_many, int(count))
    assert memory.peak == 2 * one


@pytest.mark.parametrize(
    ("sizes", "mib"),
    [
        ((9, 9, 1.5), 20),  # after both 2 MiB are left: more than 1, so split
        ((9.5, 9.5, 1.5), 40),  # 1 MiB is left: not more, so the second tensor keeps it
        ((9.5, 9, 1.5), 20),
        ((9.5, 9.25, 1.125), 20),
        ((18.5,), 20),
        ((18.5, 1.5), 20),  # a segment made for one tensor is split like any other
        ((19, 1.5), 40),
    ],
)
def test_what_a_large_tensor_leaves_is_split_off_above_one_mib(sizes, mib):
    assert reserved(*sizes) == mib


def test_what_a_small_tensor_leaves_is_split_off_from_512_bytes():
    assert reserved(1, 1 - 512 / MIB, 512 / MIB) == 2


def test_small_and_large_do_not_share():
    assert reserved(0.5, 1.5) == 22
    memory = filled(1.5, 0.5)
    memory.free(0)
    memory.allocate(2, MIB)  # 1.5 MiB are left of the small segment
    assert memory.peak == 22 * MIB
    memory.allocate(3, MIB)  # 0.5 MiB are; the large segment is all free
    assert memory.peak == 24 * MIB


def test_nothing_takes_nothing():
    memory = CachingAllocator()
    memory.allocate(0, 0)
    memory.free(0)
    assert memory.peak == 0


@pytest.mark.parametrize("size", [0.25, 1, 1.5, 9, 10, 64.5])
def test_what_is_freed_is_used_again(size):
    memory = filled(size)
    first = memory.peak
    for name in range(1, 50):
        memory.free(name - 1)
        memory.allocate(name, int(size * MIB))
    assert memory.peak == first


def test_a_segment_that_is_free_serves_smaller_tensors():
    memory = filled(30)
    memory.free(0)
    for name, size in enumerate((5, 12, 11, 2), start=1):  # 30 in all
        memory.allocate(name, size * MIB)
    assert memory.peak == 30 * MIB
    memory.allocate(5, 2 * MIB)
    assert memory.peak == 50 * MIB


def test_a_segment_that_is_too_small_serves_nothing_larger():
    memory = filled(12)
    memory.free(0)
    memory.allocate(1, 12 * MIB + 1)
    assert memory.peak == (12 + 14) * MIB


def test_segments_are_not_joined():
    memory = filled(10, 10)
    memory.free(0)
    memory.free(1)
    memory.allocate(2, 20 * MIB)
    assert memory.peak == 40 * MIB


@pytest.mark.parametrize("order", list(permutations((1, 2, 3))), ids=str)
def test_free_neighbours_are_joined(order):
    memory = filled(4, 4, 4, 4, 4)
    for name in order:
        memory.free(name)
    memory.allocate(5, 9 * MIB)  # 3 MiB are left of 12
    memory.allocate(6, 3 * MIB)
    assert memory.peak == 20 * MIB


def test_free_blocks_apart_are_not_joined():
    memory = filled(4, 4, 4, 4, 4)
    memory.free(1)
    memory.free(3)
    memory.allocate(5, 8 * MIB)
    assert memory.peak == 40 * MIB


def test_the_smallest_block_that_fits_is_taken():
    memory = filled(8, 2, 3, 7)
    memory.free(0)
    memory.free(2)
    memory.allocate(4, 2 * MIB)  # from the 3 MiB, keeping the rest: 1 MiB is not split off
    memory.allocate(5, 8 * MIB)
    assert memory.peak == 20 * MIB


def test_the_mib_that_a_tensor_keeps_is_not_its_neighbours():
    memory = filled(3, 9, 8)
    memory.free(0)
    memory.allocate(3, 2 * MIB)  # in the 3 MiB
    memory.free(1)
    memory.allocate(4, int(9.5 * MIB))
    assert memory.peak == 40 * MIB


def test_the_peak_does_not_fall():
    memory = filled(30, 10)
    memory.free(0)
    memory.free(1)
    assert memory.peak == 40 * MIB


@pytest.mark.parametrize(
    ("device", "kind"),
    [("cuda", CachingAllocator), ("xpu", CachingAllocator), ("mps", ExactAllocator), ("cpu", ExactAllocator)],
)
def test_each_device_has_its_kind(device, kind):
    assert type(allocator(device)) is kind


# A size to allocate, or which of those alive to free.
sizes = (
    st.integers(1, 2000)
    | st.integers(1, 40).map(lambda n: n * 64 * KIB)
    | st.integers(1, 96).map(lambda n: n * 512 * KIB)
    | st.integers(1, 40 * MIB)
)
steps = st.lists(
    st.tuples(st.just("allocate"), sizes) | st.tuples(st.just("free"), st.integers(0, 1000)), max_size=60
)


def walk(memory: CachingAllocator):
    """The segments, each a list of its blocks in their order."""
    blocks = {*memory._blocks.values(), *(block for pool in memory._free.values() for *_, block in pool)}
    segments = []
    for first in (block for block in blocks if block.before is None):
        segment = [first]
        while following := segment[-1].after:
            assert following.before is segment[-1]
            segment.append(following)
        segments.append(segment)
    assert sorted(map(id, blocks)) == sorted(id(block) for segment in segments for block in segment)
    return segments


def check(memory: CachingAllocator, alive: dict[int, int], before: int) -> None:
    segments = walk(memory)
    used = {name: block.size for name, block in memory._blocks.items()}
    assert used.keys() == alive.keys()
    assert all(alive[name] <= size for name, size in used.items())
    assert sum(block.size for segment in segments for block in segment) == memory.peak
    assert memory.peak >= max(before, sum(-(-size // 512) * 512 for size in alive.values()))
    for segment in segments:
        size = sum(block.size for block in segment)
        small = segment[0].small
        assert all(block.small == small and block.size % 512 == 0 and block.size > 0 for block in segment)
        assert size == 2 * MIB if small else size >= 10 * MIB and size % (2 * MIB) == 0
        assert not any(one.used is other.used is False for one, other in pairwise(segment))
    for small, pool in memory._free.items():
        assert all(not block.used and block.small == small and block.size == size for size, _, block in pool)
        assert [size for size, *_ in pool] == sorted(size for size, *_ in pool)
    assert all(block.used for block in memory._blocks.values())


def played(memory, steps):
    """The names and sizes that are alive after each of the steps; a step to free takes one of those."""
    alive: dict[int, int] = {}
    for name, (step, number) in enumerate(steps):
        if step == "allocate":
            memory.allocate(name, number)
            alive[name] = number
        elif alive:
            gone = sorted(alive)[number % len(alive)]
            memory.free(gone)
            del alive[gone]
        yield alive


@settings(deadline=None, max_examples=150)
@given(steps)
def test_the_books_stay_in_order(steps):
    memory, alive, before = CachingAllocator(), {}, 0
    for alive in played(memory, steps):
        check(memory, alive, before)
        before = memory.peak
    for name in alive:
        memory.free(name)
    assert all(len(segment) == 1 for segment in walk(memory))


@given(steps)
def test_exact_is_a_running_sum(steps):
    memory, most = ExactAllocator(), 0
    for alive in played(memory, steps):
        most = max(most, sum(alive.values()))
        assert memory.peak == most


def test_onnx_runtimes_arena():
    """Regions of 1, 2, 4 … MiB, each large enough; freed neighbours join; only what was touched counts."""
    arena = OnnxArena()
    for name, count, touched in (
        (1, 3 * MIB, 3 * MIB),  # of a region of 4, all of which it is given
        (2, MIB, 4 * MIB),  # of another
        (3, 5 * MIB, 9 * MIB),  # of the next, which has 8
    ):
        arena.allocate(name, count)
        assert arena.peak == touched
    arena.free(1)
    arena.free(2)
    arena.allocate(4, 4 * MIB)  # where the first was, whose last MiB had not been touched
    assert arena.peak == 10 * MIB
    arena.allocate(5, 4 * MIB)  # where the second was, joined with what was free beside it
    assert arena.peak == 13 * MIB
    arena.free(4)
    arena.allocate(6, 100)
    assert arena.peak == 13 * MIB


def test_onnx_runtimes_arena_keeps_large_rests_and_gives_away_small_ones():
    """On a GPU: regions of what is asked for."""
    arena = OnnxArena(exact=True)
    arena.allocate(1, 1024 * MIB)
    arena.free(1)
    arena.allocate(2, 600 * MIB)  # less than half is left, but more than 128 MiB
    arena.allocate(3, 400 * MIB)
    assert arena.peak == 1024 * MIB
    arena = OnnxArena(exact=True)
    arena.allocate(1, MIB)
    arena.free(1)
    arena.allocate(2, MIB * 3 // 4)  # all of it is taken
    arena.allocate(3, MIB // 4)
    assert arena.peak == MIB + MIB // 4


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30 * MIB)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_a_moment_is_an_allocation_that_is_freed_at_once(steps):
    """Name 0 to 9: of a moment; others come, and go where they are there."""
    for make in (ExactAllocator, CachingAllocator, OnnxArena):
        one, other, alive = make(), make(), set()
        for name, count in steps:
            if name < 10:
                one.moment(count)
                other.allocate(-1, count)
                other.free(-1)
            elif name in alive:
                alive.remove(name)
                one.free(name)
                other.free(name)
            else:
                alive.add(name)
                one.allocate(name, count)
                other.allocate(name, count)
            assert one.peak == other.peak
