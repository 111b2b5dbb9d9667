"""Who takes the next step together, by the rules alone."""

import math
from collections import Counter

import pytest

from worker.engines.diffusion.batcher import Batcher, Entry, Limits, Pass

SMALL, LARGE = (256, 256), (512, 512)
LIMITS = Limits(max_rows=8, native_pixels=256 * 256)


def batcher_of(*entries: Entry, limits: Limits = LIMITS) -> Batcher:
    batcher = Batcher(limits)
    for entry in entries:
        batcher.add(entry)
    return batcher


def picked(batcher: Batcher, now: float = 0.0) -> Pass:
    batch = batcher.pick(now)
    assert batch is not None
    return batch


def test_nobody_there_nothing_to_do():
    assert Batcher(LIMITS).pick(0.0) is None


def test_jobs_of_one_size_go_together_whatever_rows_they_take():
    entries = [Entry(SMALL, 2, 20), Entry(SMALL, 1, 3), Entry(SMALL, 2, 7)]

    assert set(picked(batcher_of(*entries)).entries) == set(entries)


def test_a_pass_has_no_more_rows_than_its_size_allows():
    batcher = batcher_of(*(Entry(SMALL, 2, 20) for _ in range(6)), *(Entry(LARGE, 2, 20) for _ in range(6)))

    rows = {}
    for _ in range(2):
        batch = picked(batcher)
        rows[batch.size] = sum(entry.rows for entry in batch.entries)
        batcher.took(batch, 1.0)

    assert rows == {SMALL: 8, LARGE: LIMITS.fixed_rows}


def test_the_most_pressed_go_first_and_equals_in_the_order_they_came():
    early, late = Entry(SMALL, 2, 5, deadline=10.0), Entry(SMALL, 2, 5, deadline=99.0)
    first, second = Entry(SMALL, 2, 5), Entry(SMALL, 2, 5)
    batcher = batcher_of(first, second, late, early, limits=Limits(4, 256 * 256))

    assert picked(batcher).entries == (early, late)
    batcher.remove(early)
    batcher.remove(late)
    assert picked(batcher).entries == (first, second)


def test_a_narrow_job_fills_the_row_that_a_wide_one_leaves():
    wide = [Entry(SMALL, 2, 5, 1.0), Entry(SMALL, 2, 5, 2.0)]
    narrow = Entry(SMALL, 1, 5, 3.0)

    assert picked(batcher_of(*wide, narrow, limits=Limits(3, 256 * 256, fixed_rows=2))).entries == (wide[0], narrow)


@pytest.mark.parametrize("costs", [(1.0, 1.0), (1.0, 4.0), (0.3, 7.0)])
def test_sizes_get_equal_time(costs):
    """By measured seconds, whatever a pass of each takes."""
    cost = dict(zip((SMALL, LARGE), costs, strict=True))
    batcher = batcher_of(Entry(SMALL, 2, 10_000), Entry(LARGE, 2, 10_000))
    spent: Counter[tuple[int, int]] = Counter()

    for _ in range(1000):
        batch = picked(batcher)
        batcher.took(batch, cost[batch.size])
        spent[batch.size] += cost[batch.size]

    assert spent[SMALL] == pytest.approx(spent[LARGE], rel=0.05)


def test_a_small_size_waits_for_one_pass_of_a_large_one_at_most():
    batcher = batcher_of(Entry(LARGE, 2, 1000))
    for _ in range(50):
        batcher.took(picked(batcher), 5.0)
    small = Entry(SMALL, 2, 20)
    batcher.add(small)

    sizes = []
    for _ in range(2):
        batch = picked(batcher)
        sizes.append(batch.size)
        batcher.took(batch, 5.0 if batch.size == LARGE else 1.0)

    assert SMALL in sizes


def test_a_pass_that_compiled_something_is_not_held_against_its_size():
    batcher = batcher_of(Entry(SMALL, 2, 1000), Entry(LARGE, 2, 1000))
    sizes = []
    for number in range(40):
        batch = picked(batcher)
        batcher.took(batch, 300.0 if number == 0 else 1.0)
        sizes.append(batch.size)

    assert Counter(sizes[20:]).most_common()[-1][1] >= 5


def test_who_would_miss_its_deadline_by_waiting_goes_before_other_sizes():
    batcher = batcher_of(Entry(LARGE, 2, 1000), Entry(SMALL, 2, 1000))
    for _ in range(20):
        batch = picked(batcher)
        batcher.took(batch, 4.0 if batch.size == LARGE else 1.0)
    pressed = Entry(SMALL, 2, 10, deadline=12.0)
    batcher.add(pressed)

    now = 0.0
    for _ in range(10):
        batch = picked(batcher, now)
        assert pressed in batch.entries
        batcher.took(batch, 1.0)
        now += 1.0


def test_who_cannot_meet_its_deadline_any_more_takes_its_turn():
    batcher = batcher_of(Entry(LARGE, 2, 1000), Entry(SMALL, 2, 1000, deadline=-1.0))
    sizes = set()
    for _ in range(8):
        batch = picked(batcher)
        batcher.took(batch, 1.0)
        sizes.add(batch.size)

    assert sizes == {SMALL, LARGE}


def test_reproducible_jobs_have_passes_of_a_fixed_number_of_rows():
    alone = Entry(SMALL, 2, 5, reproducible=True)

    assert picked(batcher_of(alone)) == Pass(SMALL, (alone,), LIMITS.fixed_rows)


@pytest.mark.parametrize("any_place", [None, LARGE, SMALL])
def test_reproducible_jobs_share_a_pass_where_a_rows_place_does_not_count(any_place):
    """At a size where that is known. Else each has the first rows of a pass of its own, and others come after it."""
    first, second = (Entry(SMALL, 2, 5, reproducible=True) for _ in range(2))
    other = Entry(SMALL, 2, 5)
    batcher = batcher_of(other, first, second, limits=LIMITS._replace(any_place=any_place))

    batches = [picked(batcher)]
    batcher.took(batches[0], 1.0)
    batches.append(picked(batcher))
    reproducible = next(batch for batch in batches if first in batch.entries)

    assert reproducible.entries == ((first, second) if any_place == SMALL else (first, other))


def test_others_of_the_size_may_fill_up_a_reproducible_pass_but_not_widen_it():
    reproducible = Entry(SMALL, 2, 5, reproducible=True)
    others = [Entry(SMALL, 2, 5) for _ in range(3)]
    batcher = batcher_of(*others, reproducible)

    batches = []
    for _ in range(2):
        batches.append(picked(batcher))
        batcher.took(batches[-1], 1.0)

    mixed = next(batch for batch in batches if reproducible in batch.entries)
    assert mixed.rows == LIMITS.fixed_rows
    assert sum(entry.rows for entry in mixed.entries) == LIMITS.fixed_rows
    usual = next(batch for batch in batches if reproducible not in batch.entries)
    assert set(usual.entries) == set(others)


@pytest.mark.parametrize(("jobs", "rows"), [(1, 2), (2, 4), (3, 8), (4, 8)])
def test_a_prepared_device_gets_passes_of_prepared_sizes(jobs, rows):
    batcher = batcher_of(*(Entry(SMALL, 2, 5) for _ in range(jobs)), limits=Limits(8, 256 * 256, padded=True))

    assert picked(batcher).rows == rows


@pytest.mark.parametrize("rows", [1, 2])
def test_a_pass_that_did_not_fit_into_memory_is_halved_until_one_is_left(rows):
    batcher = batcher_of(*(Entry(SMALL, rows, 5) for _ in range(4)))

    sizes = []
    batch = picked(batcher)
    while batcher.shrink(batch):
        batch = picked(batcher)
        sizes.append(len(batch.entries))

    assert sizes == [2, 1]


def test_a_guided_job_goes_alone_where_memory_suffices_for_one_row_only():
    """It may fail then, but in its turn: narrow jobs that come all the time do not pass it by."""
    narrow = [Entry(SMALL, 1, 5) for _ in range(2)]
    batcher = batcher_of(*narrow)
    assert batcher.shrink(picked(batcher))
    wide, later = Entry(SMALL, 2, 5), Entry(SMALL, 1, 5)
    for entry in (wide, later):
        batcher.add(entry)
    for entry in narrow:
        assert picked(batcher).entries == (entry,)
        batcher.remove(entry)

    assert picked(batcher).entries == (wide,)


def test_steps_left_are_counted():
    entry = Entry(SMALL, 2, 3, math.inf)
    batcher = batcher_of(entry)
    batcher.took(picked(batcher), 1.0)

    assert entry.left == 2


def test_an_emptied_batcher_is_empty():
    entry = Entry(SMALL, 2, 3)
    batcher = batcher_of(entry)
    batcher.remove(entry)

    assert len(batcher) == 0
    assert batcher.pick(0.0) is None
