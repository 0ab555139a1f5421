"""The step trace lives with the scheduler, because the simulator writes it too."""

from scheduler.step_trace import StepTrace

__all__ = ["StepTrace"]
