"""The load generator: workloads, arrivals, the client, formulas, reports.

It knows a server only by its HTTP API, and imports nothing of the engine.
"""
