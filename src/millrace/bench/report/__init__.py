"""Figures as tables, files, charts and comparisons."""
