"""The HTTP front of one replica: OpenAI's API over an engine in a process of its own.

It never imports PyTorch; what runs on a device lies beyond two sockets.
"""
