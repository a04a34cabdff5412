"""Decides what each step computes: requests, scheduler, KV manager, prefix cache. No torch."""
