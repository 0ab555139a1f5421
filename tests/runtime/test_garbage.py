"""The collector is seldom asked once an engine stands, and what somebody else has set stays."""

import gc

import pytest

from runtime import garbage


@pytest.fixture(autouse=True)
def as_before():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_what_is_alive_is_frozen_and_collections_become_rare():
    gc.set_threshold(700, 10, 10)
    garbage.settle()
    assert gc.get_freeze_count() > 1000
    assert gc.get_threshold()[0] >= 10_000


@pytest.mark.parametrize("thresholds", [(0, 10, 10), (1_000_000, 50, 200)])
def test_higher_thresholds_and_a_collector_that_is_off_stay(thresholds):
    gc.set_threshold(*thresholds)
    expected = gc.get_threshold()  # some versions of Python ignore the last
    garbage.settle()
    assert gc.get_threshold() == expected
