import pytest

from scheduler.page_pool import PagePool


def test_pages_are_handed_out_once_and_come_back():
    pool = PagePool(5)
    first, second = pool.allocate(3), pool.allocate(2)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    pool.release(first)
    assert pool.num_free == 3
    assert sorted(pool.allocate(3)) == sorted(first)


def test_a_page_is_free_when_its_last_holder_lets_go():
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.retain(pages)
    pool.release(pages)
    assert not pool.is_free(pages[0])
    assert pool.num_holders(pages[0]) == 1
    pool.release(pages)
    assert pool.is_free(pages[0])
    assert pool.num_free == 2


def test_misuse_is_refused_and_says_what_was_wrong():
    pool = PagePool(2)
    with pytest.raises(ValueError, match="got num_pages 3, wanted at most 2"):
        pool.allocate(3)
    with pytest.raises(ValueError, match="page 0 is free already"):
        pool.release([0])
    with pytest.raises(ValueError, match="page 1 is free"):
        pool.retain([1])
    with pytest.raises(ValueError, match="num_pages: got 0"):
        PagePool(0)


def test_integrity_names_a_page_with_a_wrong_number_of_holders():
    pool = PagePool(3)
    (page_id,) = pool.allocate(1)
    pool.check_integrity({page_id: 1})
    with pytest.raises(AssertionError, match=f"page {page_id}: 1 holders counted, 2 found"):
        pool.check_integrity({page_id: 2})
    with pytest.raises(AssertionError, match=f"page {page_id}: 1 holders counted, 0 found"):
        pool.check_integrity({})
