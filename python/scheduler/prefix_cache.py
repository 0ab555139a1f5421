"""Prefix cache: a radix tree of full, final pages that later requests may read.

One node is one page's worth of tokens: one page id per KV group (all groups together, so a hit is a hit for every
layer). A node's key is its page's token ids (Python hashes them and compares them), or a key that the request
supplies, and then the token ids are compared as well; a first-level key carries the namespace. The path from the
root is the whole prefix.

Who owns what of a request's positions (page_size S; half-open intervals):

    [0, published)            published = num_published_pages * S. On the request's path in the tree. The cache is one
                              holder of the node's pages; the request holds the pages of its own table: the same ones,
                              or its own twins where another request published the same tokens first.
    [published, computed)     final but not a full page: the request alone holds it.
    [computed, next_start)    in flight: the request alone; never in the tree.
    [next_start, capacity)    pages taken ahead: the request alone.
    a copy's source page      the cache and the plan that carries the copy, until that plan's result.

Locks: a node's num_locks counts the requests (and copies) that stand on it plus its children that are locked, so an
unlocked node has only unlocked descendants and every unlocked node can be evicted, leaves first. Invariants, with their
addresses: docs/scheduler.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import NamedTuple

from scheduler.page_pool import PagePool
from scheduler.request import Request


class PrefixNode:
    __slots__ = (
        "parent", "key", "tokens", "pages", "children", "copy_children", "num_locks", "last_used", "serial", "is_alive",
    )  # fmt: skip

    def __init__(
        self, parent: PrefixNode | None, key: Hashable, tokens: tuple[int, ...], pages: tuple[int, ...], serial: int
    ):
        self.parent = parent
        self.key = key
        self.tokens = tokens  # [page_size]
        self.pages = pages  # [num_kv_groups]
        self.children: dict[Hashable, PrefixNode] = {}
        self.copy_children: dict[Hashable, PrefixNode] = {}  # first min_copy_tokens tokens -> the latest such child
        self.num_locks = 0
        self.last_used = 0  # the cache's clock when it was last unlocked
        self.serial = serial
        self.is_alive = True  # in the tree


class PrefixMatch(NamedTuple):
    """What the cache holds of a request's known tokens. Nothing is locked yet; valid until the cache changes."""

    node: PrefixNode
    num_pages: int  # full pages, per KV group
    num_unlocked_pages: int  # pages, all groups, that stop being evictable when the match is taken
    copy_node: PrefixNode | None = None  # its page begins with the next tokens of the request
    num_copied_tokens: int = 0

    def path(self) -> list[PrefixNode]:
        nodes = []
        node = self.node
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes


class PrefixCache:
    def __init__(self, pool: PagePool, page_size: int, num_kv_groups: int, min_copy_tokens: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._num_kv_groups = num_kv_groups
        self._min_copy_tokens = min_copy_tokens
        self._root = PrefixNode(None, None, (), (), 0)
        self._num_nodes = 0
        self._num_unlocked_nodes = 0
        self._clock = 0  # counts unlocks: LRU order without wall time, so a replay evicts the same pages
        self._serial = 0
        # (last_used, serial, node) of every unlocked leaf; entries that are out of date are skipped when met.
        self._leaves: list[tuple[int, int, PrefixNode]] = []

    @property
    def num_pages(self) -> int:
        return self._num_nodes * self._num_kv_groups

    @property
    def num_evictable_pages(self) -> int:
        return self._num_unlocked_nodes * self._num_kv_groups

    # Matching

    def match(self, request: Request) -> PrefixMatch:
        """The longest cached prefix of the known tokens, short of the last one, which is left to sample from."""
        page_size = self._page_size
        max_tokens = request.num_known_tokens - 1
        node, num_pages, num_unlocked = self._root, 0, 0
        while (num_pages + 1) * page_size <= max_tokens:
            child = self._find_child(node, request, num_pages)
            if child is None:
                break
            node = child
            num_pages += 1
            num_unlocked += child.num_locks == 0

        copy_node, num_copied = self._match_part_of_page(node, request, num_pages * page_size, max_tokens)
        if copy_node is not None:
            num_unlocked += copy_node.num_locks == 0
        return PrefixMatch(node, num_pages, num_unlocked * self._num_kv_groups, copy_node, num_copied)

    def without_copy(self, match: PrefixMatch) -> PrefixMatch:
        if match.copy_node is None:
            return match
        num_unlocked = match.num_unlocked_pages - self._num_kv_groups * (match.copy_node.num_locks == 0)
        return PrefixMatch(match.node, match.num_pages, num_unlocked)

    def _key(self, request: Request, page_idx: int, tokens: tuple[int, ...]) -> Hashable:
        supplied = request.page_keys
        # Supplied keys and token tuples never meet under one key: the former are wrapped.
        key = tokens if supplied is None or page_idx >= len(supplied) else ("supplied", supplied[page_idx])
        return key if page_idx else (request.namespace, key)

    def _find_child(self, node: PrefixNode, request: Request, page_idx: int) -> PrefixNode | None:
        start = page_idx * self._page_size
        tokens = request.token_slice(start, start + self._page_size)
        child = node.children.get(self._key(request, page_idx, tokens))
        return child if child is not None and child.tokens == tokens else None

    def _match_part_of_page(
        self, node: PrefixNode, request: Request, start: int, max_tokens: int
    ) -> tuple[PrefixNode | None, int]:
        # Under supplied keys the token values may be made up (a simulation), so only whole pages are compared.
        if not node.copy_children or request.page_keys is not None or max_tokens - start < self._min_copy_tokens:
            return None, 0
        tokens = request.token_slice(start, min(max_tokens, start + self._page_size))
        child = node.copy_children.get(self._copy_key(request, start, tokens))
        if child is None:
            return None, 0
        num_equal = 0
        for own, cached in zip(tokens, child.tokens, strict=False):
            if own != cached:
                break
            num_equal += 1
        return (child, num_equal) if num_equal >= self._min_copy_tokens else (None, 0)

    def _copy_key(self, request: Request, start: int, tokens: tuple[int, ...]) -> Hashable:
        first_tokens = tokens[: self._min_copy_tokens]
        return first_tokens if start else (request.namespace, first_tokens)

    # Growing

    def insert(self, node: PrefixNode, request: Request, page_idx: int, pages: tuple[int, ...]) -> PrefixNode | None:
        """The child of `node` for a page of the request that is full and final; made, with the cache as one more holder
        of `pages`, unless another request came first. The caller locks it. None: a supplied key has other tokens.
        """
        start = page_idx * self._page_size
        tokens = request.token_slice(start, start + self._page_size)
        key = self._key(request, page_idx, tokens)
        child = node.children.get(key)
        if child is not None:
            return child if child.tokens == tokens else None
        self._serial += 1
        child = PrefixNode(node, key, tokens, pages, self._serial)
        self._pool.retain(pages)
        node.children[key] = child
        if request.page_keys is None and self._min_copy_tokens <= self._page_size:
            node.copy_children[self._copy_key(request, start, tokens)] = child
        self._num_nodes += 1
        self._num_unlocked_nodes += 1
        return child

    # Locking

    def lock(self, node: PrefixNode) -> None:
        while node.is_alive:
            node.num_locks += 1
            if node.num_locks > 1 or node.parent is None:
                return
            self._num_unlocked_nodes -= 1
            node = node.parent

    def unlock(self, node: PrefixNode) -> None:
        self._clock += 1
        while node.is_alive:
            node.num_locks -= 1
            if node.num_locks > 0 or node.parent is None:
                return
            self._num_unlocked_nodes += 1
            node.last_used = self._clock
            if not node.children:
                self._push_leaf(node)
            node = node.parent

    # Eviction

    def evict(self, num_pages: int) -> None:
        """Frees num_pages pages or more, least recently used leaves first. Raises ValueError if there are too few."""
        if num_pages > self.num_evictable_pages:
            raise ValueError(f"PrefixCache.evict: got {num_pages} pages, wanted at most {self.num_evictable_pages}")
        num_evicted = 0
        while num_evicted < num_pages:
            last_used, _, node = heapq.heappop(self._leaves)
            if not self._is_evictable_leaf(node, last_used):
                continue
            self._remove_leaf(node)
            num_evicted += self._num_kv_groups

    def _is_evictable_leaf(self, node: PrefixNode, last_used: int) -> bool:
        return node.is_alive and node.num_locks == 0 and not node.children and node.last_used == last_used

    def _remove_leaf(self, node: PrefixNode) -> None:
        parent = node.parent
        del parent.children[node.key]
        first_tokens = node.tokens[: self._min_copy_tokens]
        copy_key = first_tokens if parent.parent is not None else (node.key[0], first_tokens)
        if parent.copy_children.get(copy_key) is node:
            del parent.copy_children[copy_key]
        node.is_alive = False
        self._pool.release(node.pages)
        self._num_nodes -= 1
        self._num_unlocked_nodes -= 1
        if parent.parent is not None and parent.num_locks == 0 and not parent.children:
            self._push_leaf(parent)

    def _push_leaf(self, node: PrefixNode) -> None:
        # A node that is locked and unlocked often leaves entries behind; drop them before they outnumber the nodes.
        if len(self._leaves) > 2 * self._num_nodes + 64:
            self._leaves = [
                (used, serial, leaf) for used, serial, leaf in self._leaves if self._is_evictable_leaf(leaf, used)
            ]
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (node.last_used, node.serial, node))

    def clear(self) -> None:
        """Forgets every page, locked ones too: those stay with the requests that hold them, which publish no more."""
        for node in self.nodes():
            node.is_alive = False
            self._pool.release(node.pages)
        self._root.is_alive = False
        self._root = PrefixNode(None, None, (), (), 0)
        self._num_nodes = self._num_unlocked_nodes = 0
        self._leaves.clear()

    # Inspection

    def nodes(self) -> Iterator[PrefixNode]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def check_integrity(self, standing: dict[PrefixNode, int]) -> None:
        """`standing`: how many requests and copies stand on each node. Raises AssertionError."""
        num_nodes = num_unlocked = 0
        current_leaves = {node for used, _, node in self._leaves if self._is_evictable_leaf(node, used)}
        for node in (self._root, *self.nodes()):
            locked_children = sum(child.num_locks > 0 for child in node.children.values())
            wanted = standing.get(node, 0) + locked_children
            if node.num_locks != wanted:
                raise AssertionError(f"prefix node {node.serial}: num_locks {node.num_locks}, wanted {wanted}")
            if node is self._root:
                continue
            num_nodes += 1
            num_unlocked += node.num_locks == 0
            if node.num_locks == 0 and not node.children and node not in current_leaves:
                raise AssertionError(f"prefix node {node.serial} is an unlocked leaf that eviction cannot find")
            if node.num_locks == 0 and any(self._pool.num_holders(page_id) != 1 for page_id in node.pages):
                raise AssertionError(
                    f"prefix node {node.serial} is unlocked but its pages {node.pages} have other holders"
                )
        if (num_nodes, num_unlocked) != (self._num_nodes, self._num_unlocked_nodes):
            counted = (self._num_nodes, self._num_unlocked_nodes)
            raise AssertionError(
                f"prefix cache: counted (nodes, unlocked) {counted}, found {(num_nodes, num_unlocked)}"
            )
