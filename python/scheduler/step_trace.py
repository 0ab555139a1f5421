"""What really ran: one JSON file that Perfetto and chrome://tracing open; the simulator writes the same."""

from __future__ import annotations

import json
import threading
from collections import deque


class StepTrace:
    """Collects steps and their nodes; ``write`` may be called at any time and again."""

    has_nodes = True  # lanes are to say when each node ran

    # A long-lived server keeps the last so many events.
    MAX_EVENTS = 2_000_000

    def __init__(self, node_names: list[str], path: str | None = None):
        """``path``: where ``close`` writes; None: nowhere."""
        self._node_names = node_names
        self._path = path
        self._events: deque[dict] = deque(maxlen=self.MAX_EVENTS)
        self._lock = threading.Lock()

    def add(self, completion: dict, plan) -> None:
        """``completion``: what CompletionQueue.wait_any returned for it; ``plan``: its LanePlan."""
        lane = plan.lane  # the role: which part of the chip it had, its share says
        start_us, end_us = completion["start_ns"] / 1e3, completion["end_ns"] / 1e3
        events = [
            {
                "name": f"step {plan.plan_id}", "cat": "step", "ph": "X", "ts": start_us, "dur": end_us - start_us,
                "pid": 0, "tid": lane,
                "args": {
                    "plan": plan.plan_id,
                    "run": plan.run_id,
                    "share": plan.share,
                    "program": plan.program,
                    "nodes": [completion["first_node"], completion["cursor"]],
                    "stopped": completion["was_stopped"],
                    "requests": [[s.request_id, s.start, s.num_tokens] for s in plan.requests],
                },
            }
        ]  # fmt: skip
        for node, node_start_ns, node_end_ns in completion["spans"]:
            events.append(
                {
                    "name": self._node_names[node], "cat": "node", "ph": "X", "ts": node_start_ns / 1e3,
                    "dur": (node_end_ns - node_start_ns) / 1e3, "pid": 0, "tid": lane, "args": {"plan": plan.plan_id},
                }
            )  # fmt: skip
        for node, node_start_ns, node_end_ns, nano_lane, nano in completion.get("nano_spans", ()):
            events.append(
                {
                    "name": self._node_names[node], "cat": "node", "ph": "X", "ts": node_start_ns / 1e3,
                    "dur": (node_end_ns - node_start_ns) / 1e3, "pid": 0, "tid": nano_lane,
                    "args": {"plan": plan.plan_id, "nano_batch": nano},
                }
            )  # fmt: skip
        with self._lock:
            self._events.extend(events)

    def events(self) -> list[dict]:
        with self._lock:
            return list(self._events)

    def close(self) -> None:
        if self._path is not None:
            self.write(self._path)

    def write(self, path: str) -> None:
        with open(path, "w") as file:
            json.dump({"traceEvents": self.events(), "displayTimeUnit": "ms"}, file)
