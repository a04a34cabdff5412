"""Observation of fleets: rules and dashboards for Prometheus and Grafana, and samples that are kept.

It knows replicas, gateways and exporters by their pages alone, and GPUs by their drivers.
"""
