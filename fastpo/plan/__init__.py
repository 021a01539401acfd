"""What a run will cost, before anything runs: `fastpo plan CONFIG`."""

from fastpo.plan.planner import make_plan
from fastpo.plan.schema import Plan
from fastpo.plan.table import print_plan

__all__ = ["Plan", "make_plan", "print_plan"]
