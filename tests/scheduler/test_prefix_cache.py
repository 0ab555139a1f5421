import pytest

from scheduler import Request
from scheduler.page_pool import PagePool
from scheduler.prefix_cache import PrefixCache

PAGE_SIZE = 4


def make_cache(num_pages=16, num_kv_groups=1, min_copy_tokens=2):
    pool = PagePool(num_pages)
    return pool, PrefixCache(pool, PAGE_SIZE, num_kv_groups, min_copy_tokens)


def request_of(tokens, **fields):
    return Request("r", tuple(tokens), 1, **fields)


def publish(pool, cache, request, num_groups=1):
    """Publishes all full pages of the prompt as a request would, then lets go of them. Returns the node it stood on."""
    node = cache.match(request_of([0])).node  # the root
    cache.lock(node)
    for page_idx in range(request.num_prompt_tokens // PAGE_SIZE):
        pages = tuple(pool.allocate(num_groups))
        child = cache.insert(node, request, page_idx, pages)
        cache.lock(child)
        cache.unlock(node)
        node = child
        pool.release(pages)  # if another published first, this frees the twin
    cache.unlock(node)
    return node


def test_the_longest_prefix_of_full_pages_is_found():
    pool, cache = make_cache()
    publish(pool, cache, request_of(range(12)))
    match = cache.match(request_of([*range(8), 50, 51, 52, 53, 54]))
    assert match.num_pages == 2
    assert match.copy_node is None
    assert [node.tokens for node in match.path()] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert cache.match(request_of([9, *range(11)])).num_pages == 0


def test_the_last_token_of_a_prompt_is_never_matched():
    pool, cache = make_cache(min_copy_tokens=3)
    publish(pool, cache, request_of(range(8)))
    match = cache.match(request_of(range(8)))
    assert (match.num_pages, match.num_copied_tokens) == (1, 3)  # 7 of 8 tokens, the last three by a copied page
    match = cache.match(request_of(range(9)))
    assert (match.num_pages, match.num_copied_tokens) == (2, 0)


def test_a_shared_part_of_a_page_is_offered_for_a_copy_when_long_enough():
    pool, cache = make_cache(min_copy_tokens=2)
    publish(pool, cache, request_of(range(8)))
    match = cache.match(request_of([0, 1, 2, 3, 4, 5, 99, 99, 99]))
    assert (match.num_pages, match.num_copied_tokens) == (1, 2)
    assert match.copy_node.tokens == (4, 5, 6, 7)
    assert cache.match(request_of([0, 1, 2, 3, 4, 99, 99, 99, 99])).copy_node is None


def test_namespaces_share_nothing():
    pool, cache = make_cache()
    publish(pool, cache, request_of(range(8), namespace="a"))
    assert cache.match(request_of(range(9), namespace="a")).num_pages == 2
    other = cache.match(request_of(range(9), namespace="b"))
    assert other.num_pages == 0
    assert other.copy_node is None


def test_supplied_keys_stand_for_pages_but_tokens_are_compared_too():
    pool, cache = make_cache()
    publish(pool, cache, request_of(range(8), page_keys=(70, 71)))
    assert cache.match(request_of(range(9), page_keys=(70, 71))).num_pages == 2
    assert cache.match(request_of(range(9), page_keys=(70, 72))).num_pages == 1
    assert cache.match(request_of([*range(4), 9, 9, 9, 9, 9], page_keys=(70, 71))).num_pages == 1  # a hash collision
    assert cache.match(request_of(range(9))).num_pages == 0  # token keys and supplied keys do not meet


def test_a_colliding_supplied_key_is_not_inserted():
    pool, cache = make_cache()
    publish(pool, cache, request_of(range(4), page_keys=(70,)))
    root = cache.match(request_of([0])).node
    pages = tuple(pool.allocate(1))
    assert cache.insert(root, request_of([9, 9, 9, 9], page_keys=(70,)), 0, pages) is None


def test_the_least_recently_used_leaf_is_evicted_first_and_parents_after_children():
    pool, cache = make_cache()
    publish(pool, cache, request_of([1, 1, 1, 1, 2, 2, 2, 2]))
    publish(pool, cache, request_of([1, 1, 1, 1, 3, 3, 3, 3]))
    publish(pool, cache, request_of([4, 4, 4, 4]))
    refreshed = cache.match(request_of([1, 1, 1, 1, 2, 2, 2, 2, 0])).node
    cache.lock(refreshed)
    cache.unlock(refreshed)

    def cached():
        return sorted(node.tokens[0] for node in cache.nodes())

    assert cached() == [1, 2, 3, 4]
    cache.evict(1)
    assert cached() == [1, 2, 4]
    cache.evict(1)
    assert cached() == [1, 2]
    cache.evict(1)
    assert cached() == [1]
    cache.evict(1)
    assert cached() == []
    assert pool.num_free == 16
    with pytest.raises(ValueError, match="wanted at most 0"):
        cache.evict(1)


def test_a_lock_keeps_the_whole_path_and_nothing_else():
    pool, cache = make_cache(num_kv_groups=2)
    publish(pool, cache, request_of(range(12)), num_groups=2)
    node = cache.match(request_of(range(9))).node  # two of three pages
    assert cache.num_evictable_pages == 6
    cache.lock(node)
    assert cache.num_evictable_pages == 2
    cache.evict(2)
    assert cache.num_pages == 4
    assert cache.num_evictable_pages == 0
    cache.check_integrity({node: 1})
    cache.unlock(node)
    cache.check_integrity({})
    assert cache.num_evictable_pages == 4


def test_the_second_to_publish_a_page_keeps_its_twin_and_stands_on_the_first():
    pool, cache = make_cache()
    publish(pool, cache, request_of(range(4)))
    num_free = pool.num_free
    root = cache.match(request_of([0])).node
    twin = tuple(pool.allocate(1))
    node = cache.insert(root, request_of(range(4)), 0, twin)
    assert node.pages != twin
    assert cache.num_pages == 1
    pool.release(twin)
    assert pool.num_free == num_free


def test_a_cleared_cache_matches_nothing_and_keeps_the_pages_of_those_who_hold_them():
    pool, cache = make_cache()
    publish(pool, cache, request_of(range(8)))
    node = cache.match(request_of(range(9))).node
    cache.lock(node)
    pool.retain(node.pages)
    cache.clear()
    assert cache.match(request_of(range(9))).num_pages == 0
    assert pool.num_free == 15
    assert cache.num_pages == 0
    cache.unlock(node)  # on a node that is gone: nothing happens
    cache.check_integrity({})


def test_entries_that_are_out_of_date_do_not_pile_up():
    pool, cache = make_cache()
    node = publish(pool, cache, request_of(range(4)))
    for _ in range(1000):
        cache.lock(node)
        cache.unlock(node)
    assert len(cache._leaves) < 100
    cache.check_integrity({})
