"""The API server of one replica: OpenAI's API over an engine in a process of its own.

The server knows HTTP, text and requests; it knows no model and no device.
"""
