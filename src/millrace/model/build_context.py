"""What layers are built from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from millrace.model.config import ModelConfig
from millrace.model.parallel import TensorParallel
from millrace.model.weight_format import WeightFormat


@dataclass(frozen=True, slots=True)
class BuildContext:
    """One rank's part of a model, on one device.

    dtype: float32 or bfloat16. keep_quantized: whether weights stay in the formats of the
    checkpoint, or become `dtype` when they are loaded; None: they stay in those for which the
    device has a GEMM.
    """

    config: ModelConfig
    tp: TensorParallel
    dtype: torch.dtype
    device: torch.device
    keep_quantized: bool | None = False

    def keeps_experts(self, form: WeightFormat) -> bool:
        """As `keeps`, of the weights of experts."""
        if self.keep_quantized is None:
            return form.has_experts_on(self.device, self.dtype)
        return self.keep_quantized

    def keeps(self, form: WeightFormat) -> bool:
        """Whether weights in this format stay in it, if they can be cut for this rank."""
        if self.keep_quantized is None:
            return form.is_fast_on(self.device)
        return self.keep_quantized
