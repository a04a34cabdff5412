"""The gateway: one port in front of several replicas, picked once a request, bytes relayed."""
