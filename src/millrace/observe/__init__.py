"""Observation of fleets: rules for Prometheus, dashboards for Grafana, samples that are kept.

It knows replicas, gateways and exporters by their pages alone, and GPUs by their drivers.
"""
