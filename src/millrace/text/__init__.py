"""Text on both sides of the engine: prompts to token ids, token ids back to text.

Used alike by the HTTP server and the Python API. It knows no socket, no scheduler and no tensor.
"""
