"""The simulator: virtual time by hand, determinism, lanes that share, numbers that mean what they say."""

from __future__ import annotations

import json

import pytest

from scheduler import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.machine import ClassRates, Machine
from scheduler.model_spec import ModelSpec
from scheduler.simulator import ModelCosts, Report, Simulation, setup
from scheduler.simulator.capacity import find_max_rate
from scheduler.simulator.costs import Costs, FixedCost
from scheduler.simulator.lanes import VirtualLanes
from scheduler.simulator.report import percentile
from scheduler.simulator.simulation import ServiceTargets
from scheduler.simulator.step_log import StepLog
from scheduler.simulator.traces import TraceRequest
from scheduler.step import LanePlan
from scheduler.step_shape import StepShape
from tests.scheduler.checked_scheduler import CheckedScheduler

SPEC = ModelSpec("small", 256, 4, 4, 2, 64, 512, 1000)
MACHINE = Machine("m", "test", 5e10, {"default": ClassRates(((1, 1e11), (64, 1e12)), 5e10, 1e-6)})


def config(**fields) -> SchedulerConfig:
    values = {"num_pages": 2000, "page_size": 16, "max_num_seqs": 16, "max_num_batched_tokens": 256}
    return SchedulerConfig(**{**values, "max_model_len": 4096, **fields})


class OneSecond(Costs):
    """Every step takes a second, its result arrives a quarter later."""

    def step_cost(self, plan):
        return FixedCost(1.0)

    def result_delay_ns(self, plan):
        return 250_000_000


def test_virtual_time_by_hand():
    # Plans are made two ahead: the second decode step is queued while the prefill runs.
    requests = [TraceRequest(0.0, 20, 3), TraceRequest(0.5, 20, 1), TraceRequest(90.0, 300, 2)]
    result = Simulation(config(), OneSecond(), requests, targets=ServiceTargets(2.5, 1.1)).run()
    first, second, third = (result.records[f"r{i}"] for i in range(3))
    assert (first.first_token_ns, first.last_token_ns) == (1_250_000_000, 3_250_000_000)
    # It came while two plans were in flight: in the third step, which is queued at 1.25 and runs from 2 to 3.
    assert second.first_token_ns == 3_250_000_000
    # 256 tokens, then 44 and its first token, then one more; the two chunks and nothing else ran then.
    assert (third.first_token_ns, third.last_token_ns) == (92_250_000_000, 93_250_000_000)
    assert list(result.inter_token_s) == [1.0, 1.0, 1.0]
    assert result.busy_ns == [6_000_000_000] and result.num_steps == 6
    report = Report(result).to_json()
    assert report["ttft_s_p50"] == pytest.approx(2.25)
    assert report["ttft_attainment"] == pytest.approx(2 / 3) and report["tpot_attainment"] == 1.0
    assert report["token_goodput"] == pytest.approx(5 / 93.25)
    assert report["utilisation"]["lane_0"] == pytest.approx(6 / 93.25)


@pytest.mark.parametrize("ends_by_stop", [False, True])
def test_the_same_seed_gives_the_same_run_and_another_does_not(ends_by_stop):
    requests = [TraceRequest(0.01 * i, 30 + 7 * i % 90, 1 + i % 9) for i in range(80)]

    def run(seed: int):
        costs = ModelCosts(CostModel(SPEC, MACHINE), error=0.1, seed=seed)
        return Simulation(config(), costs, requests, keep_plans=True, ends_by_stop=ends_by_stop).run()

    one, again, other = run(1), run(1), run(2)
    assert one.plans == again.plans and one.records == again.records and one.inter_token_s == again.inter_token_s
    assert one.end_ns != other.end_ns
    for index, request in enumerate(requests):
        record = one.records[f"r{index}"]
        assert record.num_tokens == request.num_output_tokens
        assert record.finish_reason == ("stop" if ends_by_stop else "length")


def test_pages_and_rows_come_back_under_preemption_and_shared_prefixes():
    requests = [
        TraceRequest(0.0005 * i, 40 + i % 50, 10 + i % 60, hash_ids=(i % 3, 10 + i % 7, 100 + i), block_tokens=32)
        for i in range(120)
    ]
    simulation = Simulation(config(num_pages=30), ModelCosts(CostModel(SPEC, MACHINE)), requests)
    result = simulation.run()
    simulation.scheduler.check_integrity()
    assert simulation.scheduler.is_idle and result.stats.num_live_pages == 0
    assert result.stats.num_preemptions > 0 and result.kv_usage_peak <= 1.0
    assert Report(result).to_json()["prefix_hit_share"] > 0.1
    assert all(record.finish_reason == "length" for record in result.records.values())


def test_simulated_plans_pass_every_check_of_the_fake_runner():
    """The same decisions, when something looks at every slot: the simulator changes nothing about the scheduler."""
    checked = CheckedScheduler(config(page_size=4, num_pages=200, max_num_batched_tokens=16))
    requests = [TraceRequest(0.0, 5 + i, 4) for i in range(6)]
    simulation = Simulation(checked.config, OneSecond(), requests, keep_plans=True)
    arrivals = [request for _, request in simulation._arrivals]
    result = simulation.run()
    for request in arrivals:
        fresh = type(request)(
            request.request_id, list(range(request.num_prompt_tokens)), request.max_tokens,
            namespace=request.request_id,
        )  # fmt: skip
        checked.arrive(fresh)
    checked.run_until_idle()
    checked.check_answers()
    assert sum(plan.num_tokens for plan in result.plans) == sum(plan.num_tokens for plan in checked.plans)


def plan(plan_id: int, lane: int, share: float) -> LanePlan:
    return LanePlan(plan_id, lane, share, "step", None, ())


class Hungry(FixedCost):
    """Wants 10 bytes/s of 10: beside another it takes twice as long."""

    @property
    def demand_bytes_per_s(self) -> float:
        return 10.0

    def duration_s(self, other_demand: float = 0.0) -> float:
        return self.alone_s * (10.0 + other_demand) / 10.0


class TableCosts(Costs):
    def __init__(self, seconds: dict[int, float], cost_type=Hungry) -> None:
        self.seconds, self.cost_type = seconds, cost_type

    def step_cost(self, plan):
        return self.cost_type(self.seconds[plan.plan_id])


def ends_of(lanes: VirtualLanes) -> dict[int, float]:
    ends = {}
    while (now := lanes.next_end_ns()) is not None:
        for step in lanes.finish(now):
            ends[step.plan.plan_id] = now / 1e9
    return ends


def test_lanes_slow_each_other_only_while_both_run():
    lanes = VirtualLanes(2, TableCosts({1: 4.0, 2: 1.0}))
    lanes.submit(plan(1, 0, 0.5), 0)
    lanes.submit(plan(2, 1, 0.5), 1_000_000_000)
    # Both run at half pace from 1 to 3; then the first has 2 of its 4 seconds left.
    assert ends_of(lanes) == {2: pytest.approx(3.0), 1: pytest.approx(5.0)}
    assert lanes.busy_ns == [pytest.approx(5e9), pytest.approx(2e9)]


def test_shares_of_more_than_the_machine_are_time_shared():
    lanes = VirtualLanes(2, TableCosts({1: 2.0, 2: 2.0}, FixedCost))
    lanes.submit(plan(1, 0, 1.0), 0)
    lanes.submit(plan(2, 1, 1.0), 1_000_000_000)
    # Alone for a second, together at half pace for two, the second alone for its last one.
    assert ends_of(lanes) == {1: pytest.approx(3.0), 2: pytest.approx(4.0)}


def test_steps_of_a_lane_run_in_order_without_a_gap():
    lanes = VirtualLanes(1, TableCosts({1: 1.0, 2: 2.0, 3: 0.5}))
    for plan_id in (1, 2, 3):
        lanes.submit(plan(plan_id, 0, 1.0), 0)
    assert ends_of(lanes) == {1: 1.0, 2: 3.0, 3: 3.5}


def test_two_lanes_serve_everybody_and_bandwidth_limits_them():
    requests = [TraceRequest(0.0, 64, 40) for _ in range(14)]
    together = Simulation(config(lane_shares=(0.5, 0.5)), ModelCosts(CostModel(SPEC, MACHINE)), requests).run()
    assert all(busy > 0 for busy in together.busy_ns)
    assert together.num_bytes / together.duration_s <= 1.01 * MACHINE.shared_bytes_per_s
    assert {record.num_tokens for record in together.records.values()} == {40}


def test_a_request_that_cannot_fit_is_refused_and_counts_as_missed():
    requests = [TraceRequest(0.0, 5000, 10), TraceRequest(0.0, 50, 10)]
    result = Simulation(config(), OneSecond(), requests, targets=ServiceTargets(ttft_s=10.0)).run()
    report = Report(result)
    assert result.records["r0"].finish_reason == "error"
    assert (report.num_refused, report.attainment) == (1, 0.5)
    assert report.target_attainment == {"ttft": 0.5}


def test_percentiles_are_numpys():
    numpy = pytest.importorskip("numpy")
    values = sorted(((i * 7919) % 1000) / 7 for i in range(333))
    for percent in (0, 1, 37.5, 50, 99, 100):
        assert percentile(values, percent) == pytest.approx(float(numpy.percentile(values, percent)))
    assert percentile([], 50) == 0.0


class FakeReport:
    def __init__(self, attainment: float) -> None:
        self.attainment = attainment


@pytest.mark.parametrize("limit", [0.013, 0.9, 1.0, 37.0, 900.0])
def test_capacity_is_found_from_either_side(limit):
    capacity = find_max_rate(lambda rate: FakeReport(1.0 if rate <= limit else 0.3), precision=0.02)
    assert limit / 1.02 <= capacity.rate <= limit
    assert len(capacity.tried) < 25
    assert find_max_rate(lambda rate: FakeReport(0.0)).rate == 0.0


def test_more_load_waits_longer_and_capacity_lies_where_targets_break():
    from scheduler.simulator.arrivals import renewal
    from scheduler.simulator.traces import at_rate

    base = renewal(100.0, 300, lengths=[(100, 20), (300, 5)], seed=4)

    def run(rate: float) -> Report:
        costs = ModelCosts(CostModel(SPEC, MACHINE))
        return Report(Simulation(config(), costs, at_rate(base, rate), targets=ServiceTargets(0.05, 0.01)).run())

    slow, fast = run(50.0), run(2000.0)
    assert fast.series["ttft"][150] > slow.series["ttft"][150]
    assert slow.attainment > fast.attainment
    capacity = find_max_rate(run, attainment=0.9, first_rate=200.0)
    assert capacity.report.attainment >= 0.9 > run(capacity.rate * 1.2).attainment


def test_a_step_log_is_the_engines_trace_format(tmp_path):
    model = CostModel(SPEC, MACHINE)
    log = StepLog(model, 0.0, 0.05)
    Simulation(config(), ModelCosts(model), [TraceRequest(0.0, 300, 20)], observe=log.add).run()
    log.write(str(tmp_path / "t.json"))
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    steps = [event for event in events if event["cat"] == "step"]
    assert [step["args"]["requests"] for step in steps[:2]] == [[["r0", 0, 256]], [["r0", 256, 44]]]
    names = [node.name for node in SPEC.nodes()]
    for step in steps:
        nodes = [e for e in events if e["cat"] == "node" and e["args"]["plan"] == step["args"]["plan"]]
        shown = [names.index(node["name"]) for node in nodes]
        assert shown == sorted(shown) and shown[0] == 1  # nothing was copied
        assert sum(node["dur"] for node in nodes) == pytest.approx(step["dur"])
        assert set(step) == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"}


def node_by_node(model: CostModel, shapes, shares) -> list[float]:
    """When each of two steps ends, if every node contends with what the other lane runs at that very moment."""
    shared = model.machine.shared_bytes_per_s
    queues = []
    for shape, share in zip(shapes, shares, strict=True):
        nodes = []
        for index in range(len(model.spec.nodes())):
            cost = model.step_cost(shape, share, (index, index + 1))
            nodes += [[1.0, segment] for segment in cost.segments]
        queues.append(nodes)
    now, ends = 0.0, [0.0, 0.0]
    while any(queues):
        heads = [queue[0] if queue else None for queue in queues]
        demand = [head[1].num_bytes / head[1].duration_s if head else 0.0 for head in heads]
        pace = []
        for head in heads:
            if head is not None:
                excess = max(0.0, sum(demand) / shared - 1.0) if all(demand) else 0.0
                segment = head[1]
                busy_s = max(segment.compute_s, segment.memory_s * (1.0 + excess))
                pace.append(1.0 / (segment.overhead_s + busy_s))
            else:
                pace.append(0.0)
        step_s = min(head[0] / pace[lane] for lane, head in enumerate(heads) if head)
        now += step_s
        for lane, head in enumerate(heads):
            if head is None:
                continue
            head[0] -= pace[lane] * step_s
            if head[0] <= 1e-9:
                queues[lane].pop(0)
                if not queues[lane]:
                    ends[lane] = now
    return ends


@pytest.mark.parametrize(
    ("num_decodes", "context", "prompt"), [(64, 500, 512), (16, 4000, 2048), (128, 200, 256), (8, 100, 4096)]
)
def test_average_demand_stands_for_what_happens_node_by_node(num_decodes, context, prompt):
    """Lanes take each other's demand as an average over a step; in truth one node meets one node, peaks and all."""
    model = CostModel(setup.load_model("llama-3-8b"), Machine.load("h100-sxm"))
    nothing = StepShape(0, 0, 0)
    decode = StepShape(num_decodes, num_decodes, num_decodes, num_decodes, num_decodes * context)
    decode = decode._replace(window_decode_kv_tokens=decode.decode_kv_tokens)
    shapes, shares = (decode, nothing.plus_chunk(0, prompt)), (0.5, 0.5)
    true_ends = node_by_node(model, shapes, shares)
    costs = {
        index: model.step_cost(shape, share) for index, (shape, share) in enumerate(zip(shapes, shares, strict=True))
    }

    class ByPlan(Costs):
        def step_cost(self, plan):
            return costs[plan.plan_id]

    lanes = VirtualLanes(2, ByPlan())
    for index, share in enumerate(shares):
        lanes.submit(plan(index, index, share), 0)
    ends = ends_of(lanes)
    overhead_s = model.machine.step_overhead_s
    for index in range(2):
        assert ends[index] - overhead_s == pytest.approx(true_ends[index], rel=0.05)
    # And there is something to agree about: beside the prompt the decode step is slower than alone.
    assert true_ends[0] > 1.02 * (costs[0].alone_s - overhead_s)
