"""Page ids of the one arena: which are free, and how many hold each of the others.

The only owner of page ids. A page is taken with one holder; requests and the prefix cache are holders, and the last one
to let go makes it free. Every operation is O(1) per page. The bytes are the runtime's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class PagePool:
    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"PagePool.num_pages: got {num_pages}, wanted at least 1")
        self.num_pages = num_pages
        # A stack: the page freed last is taken first, while its bytes may still be in a processor cache.
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_holders(self, page_id: int) -> int:
        return self._num_holders[page_id]

    def allocate(self, num_pages: int) -> list[int]:
        """Takes free pages, each with one holder. Raises ValueError when there are too few."""
        free = self._free
        if num_pages > len(free):
            raise ValueError(
                f"PagePool.allocate: got num_pages {num_pages}, wanted at most {len(free)} (the free ones)"
            )
        page_ids = []
        for _ in range(num_pages):
            page_id = free.pop()
            self._num_holders[page_id] = 1
            page_ids.append(page_id)
        return page_ids

    def retain(self, page_ids: Iterable[int]) -> None:
        """One more holder for each page. Raises ValueError for a page that is free."""
        num_holders = self._num_holders
        for page_id in page_ids:
            if num_holders[page_id] == 0:
                raise ValueError(f"PagePool.retain: page {page_id} is free, wanted one that is held")
            num_holders[page_id] += 1

    def release(self, page_ids: Iterable[int]) -> None:
        """One holder fewer for each page; a page without holders is free. Raises ValueError for a page that is free."""
        num_holders = self._num_holders
        for page_id in page_ids:
            left = num_holders[page_id] - 1
            if left < 0:
                raise ValueError(f"PagePool.release: page {page_id} is free already")
            num_holders[page_id] = left
            if left == 0:
                self._free.append(page_id)

    def is_free(self, page_id: int) -> bool:
        return self._num_holders[page_id] == 0

    def check_integrity(self, expected_holders: Mapping[int, int]) -> None:
        """Every page is free, or held by exactly the expected number. Raises AssertionError naming the page."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a page is twice in the free list")
        for page_id, num_holders in enumerate(self._num_holders):
            if (num_holders == 0) != (page_id in free):
                raise AssertionError(f"page {page_id}: {num_holders} holders, in the free list: {page_id in free}")
            if num_holders != expected_holders.get(page_id, 0):
                wanted = expected_holders.get(page_id, 0)
                raise AssertionError(f"page {page_id}: {num_holders} holders counted, {wanted} found")
