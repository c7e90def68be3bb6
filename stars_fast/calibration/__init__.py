"""What is learned before guidance: targets for certain prompts, or a fit for a pair of models."""

from stars_fast.calibration.fitting import fit
from stars_fast.calibration.targets import Calibration, Report, calibrate

__all__ = ["Calibration", "Report", "calibrate", "fit"]
