"""The engine's scheduler without models: acceptances drawn or recorded, costs on paper, requests by the thousand."""

from benchmarks.simulation.acceptance import Course, rates, recorded, synthetic
from benchmarks.simulation.machine import LinearMachine, Machine, RooflineMachine
from benchmarks.simulation.run import Outcome, Work, simulate

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
