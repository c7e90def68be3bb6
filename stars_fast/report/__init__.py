"""Figures of what was measured: matplotlib, which the extra ``report`` brings, drawn to files without a display."""
