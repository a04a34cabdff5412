"""Millrace: an inference engine and fleet for Qwen3.5-class hybrid language models.

The engine plane (engine, replica, runtime, model, kernels, text, server) runs one replica. The
fleet plane (gateway, fleet, bench) runs many, and knows a replica by HTTP alone.

`LLM`, `SamplingParams` and `StructuredOutputs` are loaded on first use, so that commands which need
no engine (the gateway, the benchmark) never import PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from millrace.version import __version__

if TYPE_CHECKING:
    from millrace.llm import LLM as LLM
    from millrace.protocol import SamplingParams as SamplingParams
    from millrace.protocol import StructuredOutputs as StructuredOutputs

__all__ = ["LLM", "SamplingParams", "StructuredOutputs", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from millrace.llm import LLM

        return LLM
    if name in ("SamplingParams", "StructuredOutputs"):
        from millrace import protocol

        return getattr(protocol, name)
    raise AttributeError(f"module 'millrace' has no attribute {name!r}")
