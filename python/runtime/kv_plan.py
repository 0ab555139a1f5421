"""Which KV groups a model has, how their pages look, and how many pages fit in memory."""

from __future__ import annotations

from dataclasses import dataclass

from runtime import _native


@dataclass(frozen=True, slots=True)
class KvLayer:
    """Where one layer's K and V lie."""

    group: int
    layer_in_group: int
    layout: object  # _native.KvGroupLayout of the group


@dataclass(frozen=True, slots=True)
class KvPlan:
    """Pages for a model on this machine."""

    groups: tuple  # _native.KvGroupLayout
    layers: tuple[KvLayer, ...]
    page_size: int  # tokens
    page_bytes: int  # of the arena: the widest group's page
    num_pages: int
    max_model_len: int  # tokens

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    @property
    def arena_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def max_cached_tokens(self) -> int:
        """Tokens of one request after another that the pool holds at once."""
        return self.num_pages // self.num_groups * self.page_size

    def describe(self) -> str:
        codecs = {f"{group.k_codec}:{group.v_codec}" for group in self.groups}
        return (
            f"{self.num_pages} pages of {self.page_size} tokens, {', '.join(sorted(codecs))}, "
            f"{self.arena_bytes / 2**20:.0f} MiB for {self.max_cached_tokens} tokens"
        )


def available_memory_bytes() -> int:
    """Memory this process may still take: MemAvailable, and what the cgroup leaves."""
    available = 1 << 62
    try:
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    available = int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            text = limit.read().strip()
            if text != "max":
                available = min(available, int(text) - int(current.read()))
    except (OSError, ValueError):
        pass
    return max(available, 0)


def kv_groups(config, k_codec: str, v_codec: str, page_size: int) -> tuple[tuple, tuple[KvLayer, ...]]:
    """Layers of equal attention kind form a group: full layers in one, sliding-window layers in another."""
    windows = [config.sliding_window if kind == "sliding" else 0 for kind in config.layer_types]
    order = list(dict.fromkeys(windows))
    layouts = tuple(
        _native.KvGroupLayout(
            num_layers=windows.count(window), num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            page_size=page_size, kv_dtype=f"{k_codec}:{v_codec}", window=window or 0,
        )
        for window in order
    )  # fmt: skip
    layers, filled = [], [0] * len(order)
    for window in windows:
        group = order.index(window)
        layers.append(KvLayer(group, filled[group], layouts[group]))
        filled[group] += 1
    return layouts, tuple(layers)


# When no size is given: room for one whole context, or for every request at an ordinary length where that is more, but
# for the latter never more than the model's own weights or 256 MiB. A page costs memory once it is written, and the
# prefix cache writes all of them in time, so this is what a server will hold: for a model of 100 MB twice its weights
# are well spent on 45 requests of 256 tokens, and beyond that nobody asked for it.
_DEFAULT_MEMORY_SHARE = 0.5
_DEFAULT_REQUEST_TOKENS = 256
_DEFAULT_POOL_BYTES = 256 << 20


def plan_kv(
    config, *, k_codec: str, v_codec: str, page_size: int, kv_memory: int | float | None, max_model_len: int | None,
    max_num_seqs: int, weight_bytes: int = 0, available_bytes: int | None = None, share: float | None = None,
) -> KvPlan:  # fmt: skip
    """Pages that fit. Raises ValueError with what would fit when the wanted context does not.

    kv_memory: bytes, or a share (float) of the memory free now; None: enough for one whole context, or for
    ``max_num_seqs`` requests of 256 tokens as far as ``weight_bytes`` (or 256 MiB, whichever is more) holds them;
    within half of the free memory. ``share``: what to take of it instead, all of that share, as is the rule on a GPU,
    whose memory is there for nothing else. ``available_bytes``: the free memory, where it is not the host's.
    """
    layouts, layers = kv_groups(config, k_codec, v_codec, page_size)
    page_bytes = max((layout.page_bytes() + 63) // 64 * 64 for layout in layouts)
    available = available_memory_bytes() if available_bytes is None else available_bytes
    if kv_memory is None:
        budget = int(available * (_DEFAULT_MEMORY_SHARE if share is None else share))
    elif isinstance(kv_memory, float):
        budget = int(available * kv_memory)
    else:
        budget = kv_memory
        if budget > available:
            raise ValueError(
                f"kv_memory: got {budget / 2**30:.2f} GiB, only {available / 2**30:.2f} GiB of memory is free"
            )

    def pages_for(tokens: int) -> int:
        return (tokens + page_size - 1) // page_size * len(layouts)

    most_pages = budget // page_bytes
    model_len = config.max_position_embeddings
    fitting_len = most_pages // len(layouts) * page_size
    if fitting_len < page_size:
        raise ValueError(
            f"kv_memory: got {budget} bytes, one page of {page_size} tokens takes {page_bytes * len(layouts)}"
        )
    if max_model_len is None:
        max_model_len = min(model_len, fitting_len)
    elif max_model_len > model_len:
        raise ValueError(f"max_model_len: got {max_model_len}, the model was made for at most {model_len} tokens")
    elif max_model_len > fitting_len:
        needed = pages_for(max_model_len) * page_bytes
        raise ValueError(
            f"max_model_len: {max_model_len} tokens of KV take {needed / 2**20:.0f} MiB and {budget / 2**20:.0f} MiB "
            f"are granted: {fitting_len} tokens would fit; or raise --kv-memory, or choose a smaller --kv-dtype"
        )
    num_pages = min(most_pages, max_num_seqs * pages_for(max_model_len))
    if kv_memory is None and share is None:
        ordinary_pages = pages_for(max_num_seqs * _DEFAULT_REQUEST_TOKENS)
        ordinary_pages = min(ordinary_pages, max(_DEFAULT_POOL_BYTES, weight_bytes) // page_bytes)
        num_pages = min(num_pages, max(pages_for(max_model_len), ordinary_pages))
    return KvPlan(layouts, layers, page_size, page_bytes, num_pages, max_model_len)
