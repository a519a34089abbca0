"""Figures and pages: what a run, a measurement or an analysis shows."""
