"""The published systems that are controllers and orders, as presets by name."""

from __future__ import annotations

from scheduler.controllers.arbitration import Arbitration
from scheduler.controllers.goodput_order import GoodputOrder
from scheduler.controllers.nanoflow import steps_of_one_size
from scheduler.controllers.nexus import Nexus, shortest_then_aged
from scheduler.controllers.semi_pd import SemiPd
from scheduler.controllers.slack_order import SlackOrder
from scheduler.controllers.slo_batching import slo_aware_run_budget
from scheduler.peak_admission import PeakAdmission
from scheduler.policy import Policy, register_policy

register_policy(Policy("layered", prefill="layer"))
register_policy(Policy("flowprefill", prefill="operator", order=SlackOrder, run_budget=slo_aware_run_budget))
register_policy(Policy("semi-pd", lanes="auto", controller=SemiPd))
register_policy(Policy("nexus", lanes="auto", rank=shortest_then_aged, controller=Nexus))
register_policy(Policy("nanoflow", nano_batches="auto", peak=PeakAdmission, controller=steps_of_one_size))
register_policy(Policy("two-lanes", lanes="100:100"))  # un-partitioned: both lanes have the whole chip
register_policy(
    Policy("arbitrate", lanes="auto", order=GoodputOrder, run_budget=slo_aware_run_budget, controller=Arbitration)
)
