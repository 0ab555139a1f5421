"""A machine as the cost model knows it: rates per node class, in a small JSON file.

A file is measured (`partita calibrate` wrote it) or derived from public numbers; `source` says which. Rates are those of
the whole machine (share 1.0); how a smaller share slows them is said once, in Saturation.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import log2
from pathlib import Path
from typing import Any

from scheduler.lane_speeds import LaneSpeeds

MACHINE_FOLDER = Path(__file__).parent / "simulator" / "machines"

# What has a rate of its own: node kinds, with attention's two ways of working apart.
NODE_CLASSES = (
    "linear", "attention_decode", "attention_chunk", "embedding", "norm_add", "gather_logit_rows", "soft_cap",
    "sampling", "copy_pages",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Saturation:
    """What a share of the machine yields, relative to all of it (Nexus, arXiv 2507.06608): in proportion to the share up
    to `compute_share`, and from there on `decay` times as much as before."""

    compute_share: float = 1.0  # (0, 1]
    decay: float = 0.0  # 0 .. 1 / compute_share
    memory_share: float = 1.0  # the share that can draw the whole bandwidth

    def compute(self, share: float) -> float:
        """Compute rate at `share`, 1.0 at the whole machine."""
        return self._gain(share) / self._gain(1.0)

    def memory(self, share: float) -> float:
        return min(1.0, share / self.memory_share)

    def _gain(self, share: float) -> float:
        knee = self.compute_share
        return share if share <= knee else knee * (1.0 + self.decay * (share - knee))


@dataclass(frozen=True, slots=True)
class ClassRates:
    """One node class on the whole machine."""

    operations_per_s: tuple[tuple[float, float], ...]  # (rows, rate), rows ascending: few rows do not fill the machine
    bytes_per_s: float
    overhead_s: float = 0.0  # per node: launch, barriers
    row_s: float = 0.0  # per row of a node: what is done once per row, such as rotating and appending K
    saturation: Saturation | None = None  # None: the machine's

    def __post_init__(self) -> None:
        rows = [knot[0] for knot in self.operations_per_s]
        if not rows or rows != sorted(set(rows)) or rows[0] < 1 or min(k[1] for k in self.operations_per_s) <= 0:
            raise ValueError(
                f"ClassRates.operations_per_s: got {self.operations_per_s}, wanted (rows, rate) by rising rows"
            )
        if self.bytes_per_s <= 0 or min(self.overhead_s, self.row_s) < 0:
            raise ValueError(
                f"ClassRates: got bytes_per_s {self.bytes_per_s}, overhead_s {self.overhead_s}, row_s {self.row_s}, "
                "wanted above 0, and 0 or more"
            )

    def rate_at(self, rows: float) -> float:
        """Operations per second with that many rows: straight between the knots over log2(rows)."""
        knots = self.operations_per_s
        i = bisect_right(knots, rows, key=_knot_rows)
        if i == 0:
            return knots[0][1]
        if i == len(knots):
            return knots[-1][1]
        (low, low_rate), (high, high_rate) = knots[i - 1], knots[i]
        return low_rate + (high_rate - low_rate) * log2(rows / low) / log2(high / low)


def _knot_rows(knot: tuple[float, float]) -> float:
    return knot[0]


@dataclass(frozen=True, slots=True)
class Machine:
    """Raises ValueError for a rate or share out of range."""

    name: str
    source: str  # "measured ..." or "public numbers: ..."
    shared_bytes_per_s: float  # what all lanes together can draw from memory
    classes: Mapping[str, ClassRates]  # of NODE_CLASSES; "default" stands for those not named
    memory_bytes: float = 0.0  # for weights and KV; 0: not known
    step_overhead_s: float = 0.0  # between a step's nodes and the next step's, when plans are queued ahead
    # Within a step, beside its nodes: what the engine's thread takes from the cores that the step's lane wants.
    host_s_per_step: float = 0.0
    host_s_per_request: float = 0.0
    result_delay_s: float = 0.0  # from the end of a step to its result at the scheduler
    saturation: Saturation = field(default_factory=Saturation)
    contention: float = 1.0  # how much of the predicted slow-down by other lanes' traffic is felt
    overlap_gain: float = 0.0  # what lanes that all have the whole machine yield at once, above one after the other
    launch_ahead_nodes: int = 1  # that a lane has begun or queued when it is asked to stop; it stops behind them
    rungs: tuple[float, ...] = (1.0,)  # shares that a lane can be given
    lane_speeds: tuple[LaneSpeeds, ...] = ()  # what two lanes achieve at once, per cut; (): never measured
    model: str = ""  # the rates were fitted on this model; "": any
    held_out_error: float = 0.0  # median relative error of step times at calibration; 0: not measured

    def __post_init__(self) -> None:
        unknown = set(self.classes) - {*NODE_CLASSES, "default"}
        missing = set(NODE_CLASSES) - set(self.classes) if "default" not in self.classes else set()
        if unknown or missing:
            raise ValueError(f"Machine.classes: unknown {sorted(unknown)}, missing {sorted(missing)} and no default")
        if self.shared_bytes_per_s <= 0 or not all(0 < rung <= 1 for rung in self.rungs):
            raise ValueError(f"Machine: got {self.shared_bytes_per_s} bytes/s, rungs {self.rungs}")
        if min(self.step_overhead_s, self.host_s_per_step, self.host_s_per_request, self.result_delay_s) < 0:
            raise ValueError("Machine: got an overhead, host time or delay below 0")
        if self.launch_ahead_nodes < 1 or self.overlap_gain < 0:
            raise ValueError(
                f"Machine: got launch_ahead_nodes {self.launch_ahead_nodes}, overlap_gain {self.overlap_gain}, wanted at "
                "least 1, and 0 or more"
            )
        cuts = [speeds.shares for speeds in self.lane_speeds]
        if len(cuts) != len(set(cuts)):
            raise ValueError(f"Machine.lane_speeds: got the shares {cuts}, wanted each pair once")

    def rates(self, node_class: str) -> ClassRates:
        return self.classes.get(node_class) or self.classes["default"]

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        if not self.lane_speeds:  # a file without the field says that nobody measured
            del fields["lane_speeds"]
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], file: str = "machine file") -> Machine:
        try:
            values = dict(fields)
            values["saturation"] = Saturation(**values.get("saturation") or {})
            values["rungs"] = tuple(values.get("rungs", (1.0,)))
            values["lane_speeds"] = tuple(LaneSpeeds.from_json(each) for each in values.get("lane_speeds", ()))
            values["classes"] = {name: _class_rates(rates) for name, rates in values["classes"].items()}
            return cls(**values)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file}: not a machine: {error}") from None

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, name_or_path: str | Path) -> Machine:
        """A file, or the name of one that ships with the scheduler (h100-sxm, a100-sxm-80gb, cpu-2-cores)."""
        path = Path(name_or_path)
        if not path.is_file():
            path = MACHINE_FOLDER / f"{name_or_path}.json"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in MACHINE_FOLDER.glob("*.json")))
            raise ValueError(f"machine: got {str(name_or_path)!r}, wanted a file or one of {known}")
        return cls.from_json(json.loads(path.read_text(encoding="utf-8")), str(path))


def _class_rates(fields: Mapping[str, Any]) -> ClassRates:
    values = dict(fields)
    values["operations_per_s"] = tuple((rows, rate) for rows, rate in values["operations_per_s"])
    if values.get("saturation") is not None:
        values["saturation"] = Saturation(**values["saturation"])
    return ClassRates(**values)
