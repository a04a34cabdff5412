"""Measures an engine in this process, without a server, as `vllm bench throughput` does."""
