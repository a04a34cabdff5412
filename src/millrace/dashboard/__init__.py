"""The live page of servers and gateways: its figures, its last hour, and its files."""
