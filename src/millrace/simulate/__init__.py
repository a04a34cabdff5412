"""Fleets on a virtual clock: the engine's scheduler and the gateway's policies, without models."""
