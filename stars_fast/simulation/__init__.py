"""The engine's scheduler without models: acceptances drawn or recorded, costs on paper, requests by the thousand."""

from stars_fast.simulation.acceptance import Course, rates, recorded, synthetic
from stars_fast.simulation.machine import LinearMachine, Machine, RooflineMachine
from stars_fast.simulation.run import Outcome, Work, simulate

__all__ = [
    "Course",
    "LinearMachine",
    "Machine",
    "Outcome",
    "RooflineMachine",
    "Work",
    "rates",
    "recorded",
    "simulate",
    "synthetic",
]
