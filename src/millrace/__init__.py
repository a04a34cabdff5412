"""Millrace: an inference engine and fleet for Qwen3.5-class hybrid language models.

`LLM` and `SamplingParams` are loaded on first use, so that commands which need no engine
(the gateway, the benchmark) never import PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millrace.llm import LLM as LLM
    from millrace.protocol import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from millrace.llm import LLM

        return LLM
    if name == "SamplingParams":
        from millrace.protocol import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'millrace' has no attribute {name!r}")
