"""Who waits and who runs, each in the policy's order (Request.rank, smaller first)."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from scheduler.request import Request

_rank = attrgetter("rank")


class WaitingQueue:
    """A heap. Removal is lazy: a request that left is skipped when it comes to the top, or when most have left."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple, Request]] = []  # ranks are unique, so requests are never compared
        self._waiting: dict[str, Request] = {}
        self.num_tokens = 0  # known tokens of all that wait: what there is to compute, as far as no cache helps

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.rank, request))
        self._waiting[request.request_id] = request
        self.num_tokens += request.num_known_tokens

    def peek(self) -> Request | None:
        while self._heap and not self._is_waiting(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        request = self.peek()
        if request is None:
            raise IndexError("WaitingQueue.pop: the queue is empty")
        heapq.heappop(self._heap)
        del self._waiting[request.request_id]
        self.num_tokens -= request.num_known_tokens
        return request

    def remove(self, request: Request) -> None:
        del self._waiting[request.request_id]
        self.num_tokens -= request.num_known_tokens
        if len(self._heap) > 2 * len(self._waiting) + 64:
            self._heap = [entry for entry in self._heap if self._is_waiting(entry)]
            heapq.heapify(self._heap)

    def rerank(self, request: Request, rank: tuple) -> None:
        """A waiting request gets another place."""
        request.rank = rank
        heapq.heappush(self._heap, (rank, request))  # the entry with its old rank counts no more

    def first(self, limit: int) -> list[Request]:
        """The first `limit` in order, without taking them: O(limit log limit), not of the queue."""
        heap, found = self._heap, []
        places = [(heap[0][0], 0)] if heap else []
        while places and len(found) < limit:
            _, place = heapq.heappop(places)
            if self._is_waiting(heap[place]):
                found.append(heap[place][1])
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(heap):
                    heapq.heappush(places, (heap[child][0], child))
        return found

    def __contains__(self, request: Request) -> bool:
        return self._waiting.get(request.request_id) is request

    def _is_waiting(self, entry: tuple[tuple, Request]) -> bool:
        rank, request = entry
        return request.rank is rank and self._waiting.get(request.request_id) is request


class RunningList:
    """Requests that hold a row and may be scheduled, sorted by rank."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def snapshot(self) -> list[Request]:
        """A copy to walk over while requests leave."""
        return self._requests.copy()

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=_rank)

    def remove(self, request: Request) -> None:
        del self._requests[self._position(request)]

    def rerank(self, request: Request, rank: tuple) -> None:
        """A running request gets another place."""
        self.remove(request)
        request.rank = rank
        self.add(request)

    def ranked_below(self, request: Request) -> list[Request]:
        return self._requests[self._position(request) + 1 :]

    def _position(self, request: Request) -> int:
        position = bisect_left(self._requests, request.rank, key=_rank)
        if position == len(self._requests) or self._requests[position] is not request:
            raise ValueError(f"RunningList: {request.request_id!r} is not running")
        return position
