"""Methods as pure functions: thresholds, acceptance, calibration of both."""
