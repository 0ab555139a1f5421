"""The page tables of requests: the one place where requests, the page pool and the prefix cache meet.

The scheduler asks (`num_available_pages`, `match`, `pages_to_reach`) while it composes a plan, and acts (`take_match`,
`extend`, `publish`, `release`) when it commits one. Who owns which positions: the table on top of prefix_cache.py.

Windowed KV groups. Every group's page table has the same number of entries. With prefix caching off, a windowed
group gives a page back as soon as no position that is still to be computed can see it; the entry stays in the table
and is not read. With prefix caching on it keeps all pages, because a later hit must find the last window of every
group at the end of its prefix, wherever that lies; the price is that windows then save no memory, which the
start-up plan must count on.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable

from scheduler.config import SchedulerConfig
from scheduler.page_pool import PagePool
from scheduler.prefix_cache import PrefixCache, PrefixMatch, PrefixNode
from scheduler.request import Request
from scheduler.step import PageCopy

NEVER = sys.maxsize  # a publish_at that is not reached


class RequestPages:
    def __init__(self, config: SchedulerConfig) -> None:
        self.page_size = config.page_size
        self.num_kv_groups = config.num_kv_groups
        self._max_model_len = config.max_model_len
        self._pool = PagePool(config.num_pages)
        self._cache: PrefixCache | None = None
        if config.enable_prefix_caching:
            self._cache = PrefixCache(self._pool, config.page_size, config.num_kv_groups, config.min_copy_tokens)
        # Windows that give pages back early; with prefix caching none does.
        early = config.kv_group_windows if self._cache is None else ()
        self._windows = tuple((group, window) for group, window in enumerate(early) if window > 0)
        self.frees_windows = bool(self._windows)
        self.no_pages: tuple[tuple[int, ...], ...] = ((),) * self.num_kv_groups
        self._held_sources: Counter[PrefixNode] = Counter()

    # Questions

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def num_free_pages(self) -> int:
        return self._pool.num_free

    @property
    def num_evictable_pages(self) -> int:
        return self._cache.num_evictable_pages if self._cache is not None else 0

    @property
    def num_available_pages(self) -> int:
        """Free now, or after evicting what no request stands on."""
        cache = self._cache
        return self._pool.num_free + (cache.num_evictable_pages if cache is not None else 0)

    def pages_to_reach(self, num_tokens: int) -> int:
        """Pages of one group's table that hold num_tokens positions."""
        return -(-num_tokens // self.page_size)

    def pages_alone(self, num_tokens: int) -> int:
        """Pages, all groups, without which a request of num_tokens positions cannot end even if it runs alone."""
        num_full = self.pages_to_reach(num_tokens)
        total = num_full * self.num_kv_groups
        for _, window in self._windows:
            # The positions [computed - window + 1, computed] touch at most this many pages.
            total -= num_full - min(num_full, (window - 1) // self.page_size + 2)
        return total

    def match(self, request: Request) -> PrefixMatch | None:
        return self._cache.match(request) if self._cache is not None else None

    def without_copy(self, match: PrefixMatch) -> PrefixMatch:
        return self._cache.without_copy(match)

    # Acts

    def take_match(self, request: Request, match: PrefixMatch | None) -> None:
        """Locks what was found and makes it the head of the request's page table.

        All matches of a plan are taken before any page is allocated: allocation evicts.
        """
        request.pages = [[] for _ in range(self.num_kv_groups)]
        request.num_window_released = [0] * self.num_kv_groups
        request.num_published_pages = 0
        request.publish_at = NEVER
        num_computed = 0
        if match is not None:
            self._cache.lock(match.node)
            for node in match.path():
                self._pool.retain(node.pages)
                for table, page_id in zip(request.pages, node.pages, strict=True):
                    table.append(page_id)
            request.cache_node = match.node
            request.num_published_pages = match.num_pages
            request.publish_at = (match.num_pages + 1) * self.page_size
            if match.copy_node is not None:
                self._hold_source(match.copy_node)
            num_computed = match.num_pages * self.page_size + match.num_copied_tokens
        request.page_capacity = len(request.pages[0]) * self.page_size
        request.num_computed_tokens = request.next_start = num_computed

    def copy_matched_part(self, request: Request, source: PrefixNode) -> list[PageCopy]:
        """A page of the request's own for each group, to be filled with the source's bytes before the plan runs."""
        targets = self.extend(request, request.page_capacity + 1)
        return [PageCopy(page_id, target[0]) for page_id, target in zip(source.pages, targets, strict=True)]

    def extend(self, request: Request, num_tokens: int) -> tuple[tuple[int, ...], ...]:
        """Appends pages until the table holds num_tokens positions; returns them, per KV group."""
        num_new = self.pages_to_reach(num_tokens) - len(request.pages[0])
        if num_new <= 0:
            return self.no_pages
        missing = num_new * self.num_kv_groups - self._pool.num_free
        if missing > 0 and self._cache is not None:
            self._cache.evict(missing)
        new_pages = []
        for table in request.pages:
            page_ids = self._pool.allocate(num_new)
            table.extend(page_ids)
            new_pages.append(tuple(page_ids))
        request.page_capacity += num_new * self.page_size
        return tuple(new_pages)

    def publish(self, request: Request) -> None:
        """Puts the request's pages that have become full and final into the tree, and stands on the last of them."""
        node = start_node = request.cache_node
        if not node.is_alive:  # the cache was cleared under the request: its pages hold what must be forgotten
            request.publish_at = NEVER
            return
        page_idx, is_blocked = request.num_published_pages, False
        num_full = request.num_computed_tokens // self.page_size
        while page_idx < num_full:
            pages = tuple([table[page_idx] for table in request.pages])
            child = self._cache.insert(node, request, page_idx, pages)
            if child is None:
                is_blocked = True
                break
            node = child
            page_idx += 1
        self._cache.lock(node)
        self._cache.unlock(start_node)
        request.cache_node = node
        request.num_published_pages = page_idx
        request.publish_at = NEVER if is_blocked else (page_idx + 1) * self.page_size

    def release_outside_windows(self, request: Request) -> None:
        """Gives back pages that no position from num_computed_tokens on sees; plans in flight start there or later."""
        for group, window in self._windows:
            first_needed = max(0, request.num_computed_tokens - window + 1) // self.page_size
            num_released = request.num_window_released[group]
            if first_needed > num_released:
                self._pool.release(request.pages[group][num_released:first_needed])
                request.num_window_released[group] = first_needed

    def release(self, request: Request) -> None:
        """Lets go of everything. Only when no plan in flight names the request."""
        for table, num_released in zip(request.pages, request.num_window_released, strict=True):
            # Last page first, so that the free stack hands the first ones out first.
            self._pool.release(reversed(table[num_released:] if num_released else table))
        if request.cache_node is not None:
            self._cache.unlock(request.cache_node)
            request.cache_node = None
        request.pages = []
        request.page_capacity = request.num_published_pages = 0

    def _hold_source(self, node: PrefixNode) -> None:
        self._cache.lock(node)
        self._pool.retain(node.pages)
        self._held_sources[node] += 1

    def release_source(self, node: PrefixNode) -> None:
        """The plan that copied from this page has ended."""
        self._cache.unlock(node)
        self._pool.release(node.pages)
        self._held_sources[node] -= 1
        if not self._held_sources[node]:
            del self._held_sources[node]

    def clear_cache(self) -> None:
        if self._cache is not None:
            self._cache.clear()

    # Inspection

    def check_integrity(self, holders: Iterable[Request]) -> None:
        """free + cached + live == total, and no page has an owner that nobody knows. Raises AssertionError.

        holders: every request that has a page table (running, or finished or preempted with a plan in flight).
        """
        expected: Counter[int] = Counter()
        standing: Counter[PrefixNode] = Counter()
        private: dict[int, str] = {}  # page -> the one request that may write to it
        for request in holders:
            for table, num_released in zip(request.pages, request.num_window_released, strict=True):
                expected.update(table[num_released:])
                for page_id in table[max(num_released, request.num_published_pages) :]:
                    if page_id in private:
                        raise AssertionError(f"page {page_id}: owned by {private[page_id]} and {request.request_id}")
                    private[page_id] = request.request_id
            if request.cache_node is not None and request.cache_node.is_alive:
                standing[request.cache_node] += 1
        cached: set[int] = set()
        if self._cache is not None:
            for node, count in self._held_sources.items():
                expected.update(dict.fromkeys(node.pages, count))
                if node.is_alive:
                    standing[node] += count
            for node in self._cache.nodes():
                if cached.intersection(node.pages):
                    raise AssertionError(f"prefix node {node.serial}: a page of {node.pages} is in the tree twice")
                cached.update(node.pages)
            expected.update(cached)
            self._cache.check_integrity(standing)
            if cached.intersection(private):
                raise AssertionError(f"pages {sorted(cached.intersection(private))} are cached and still being written")
        self._pool.check_integrity(expected)
        num_live = len(expected) - self.num_evictable_pages
        total = self.num_free_pages + self.num_evictable_pages + num_live
        if total != self.num_pages:
            raise AssertionError(
                f"{self.num_free_pages} free + {self.num_evictable_pages} cached + {num_live} live != {self.num_pages}"
            )
