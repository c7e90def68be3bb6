"""What is learned before guidance: targets of prompts, a fit for a pair of models, weights of several rewards."""

from stars_fast.calibration.fitting import fit
from stars_fast.calibration.satisficing import Satisficing, satisfice
from stars_fast.calibration.targets import Calibration, Report, calibrate

__all__ = ["Calibration", "Report", "Satisficing", "calibrate", "fit", "satisfice"]
