"""The real scheduler against a virtual clock: a policy is judged on a trace in seconds, before it meets hardware.

    requests = read_trace(Path("azure_llm_2023_conv.csv.gz"))[:1000]
    model = CostModel(spec, Machine.load("h100-sxm"))
    result = Simulation(config, ModelCosts(model), requests).run()
    print(Report(result).table())

`partita simulate` is the command (command.py). Who owns what: simulation.py the event loop, lanes.py what runs where,
costs.py for how long, traces.py and arrivals.py requests, report.py numbers, capacity.py questions of how much, plots.py
charts, recording.py a real run to replay.
"""

from scheduler.simulator.costs import ModelCosts, RecordedCosts
from scheduler.simulator.report import Report
from scheduler.simulator.simulation import Simulation, SimulationResult
from scheduler.simulator.traces import TraceRequest, read_trace

__all__ = [
    "ModelCosts",
    "RecordedCosts",
    "Report",
    "Simulation",
    "SimulationResult",
    "TraceRequest",
    "read_trace",
]
