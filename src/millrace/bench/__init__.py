"""The benchmark: workloads, the load generator, formulas, reports.

A server is known by its HTTP API alone; nothing of the engine is imported.
"""
