"""Fits the parameters of step models to what was measured, and says how well that goes."""
