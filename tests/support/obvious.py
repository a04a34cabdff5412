"""Weights of 4 bits, dequantized the obvious way: one number after the other, by the definition.

Written from the definitions of the formats, with nothing of Millrace: what loaders must agree with.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that is in nibble 0, 1, .. of a word
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nibble(word: int, i: int) -> int:
    return (int(word) & 0xFFFFFFFF) >> 4 * i & 15


def gptq(t: dict[str, Tensor], m: str, *, v1: bool = True, group: int = 0) -> Tensor:
    """(q - zero) * scale, with the zero and the scale of the column's g_idx."""
    words, scales = t[f"{m}.qweight"].numpy(), t[f"{m}.scales"].float().numpy()
    zeros = t[f"{m}.qzeros"].numpy()
    inputs, outputs = words.shape[0] * 8, words.shape[1]
    group_of = t[f"{m}.g_idx"].numpy() if f"{m}.g_idx" in t else np.arange(inputs) // group
    weight = np.empty((outputs, inputs), np.float32)
    for k in range(inputs):
        g = group_of[k]
        for n in range(outputs):
            zero = nibble(zeros[g, n // 8], n % 8) + (1 if v1 else 0)
            weight[n, k] = (nibble(words[k // 8, n], k % 8) - zero) * scales[g, n]
    return torch.from_numpy(weight)


def awq(t: dict[str, Tensor], m: str, group: int) -> Tensor:
    words, scales = t[f"{m}.qweight"].numpy(), t[f"{m}.scales"].float().numpy()
    zeros = t[f"{m}.qzeros"].numpy()
    inputs, outputs = words.shape[0], words.shape[1] * 8
    weight = np.empty((outputs, inputs), np.float32)
    for k in range(inputs):
        for c in range(outputs // 8):
            for i in range(8):
                n = 8 * c + AWQ_ORDER[i]
                q, zero = nibble(words[k, c], i), nibble(zeros[k // group, c], i)
                weight[n, k] = (q - zero) * scales[k // group, n]
    return torch.from_numpy(weight)


def pack_quantized(t: dict[str, Tensor], m: str, group: int) -> Tensor:
    """Values and zeros are stored + 8."""
    words, scales = t[f"{m}.weight_packed"].numpy(), t[f"{m}.weight_scale"].float().numpy()
    outputs, inputs = words.shape[0], words.shape[1] * 8
    zeros = t[f"{m}.weight_zero_point"].numpy() if f"{m}.weight_zero_point" in t else None
    group_of = np.arange(inputs) // group
    if f"{m}.weight_g_idx" in t:
        group_of = t[f"{m}.weight_g_idx"].numpy()
    weight = np.empty((outputs, inputs), np.float32)
    for n in range(outputs):
        for k in range(inputs):
            g = group_of[k]
            zero = 0 if zeros is None else nibble(zeros[n // 8, g], n % 8) - 8
            weight[n, k] = (nibble(words[n, k // 8], k % 8) - 8 - zero) * scales[n, g]
    return torch.from_numpy(weight)


def e2m1(t: dict[str, Tensor], m: str, kind: str) -> Tensor:
    """kind: "compressed" divides by the global scale, "modelopt" multiplies, "mx" has neither."""
    codes = t[f"{m}.weight" if kind == "modelopt" else f"{m}.weight_packed"].numpy()
    stored = t[f"{m}.weight_scale"].float().numpy()
    outputs, inputs = codes.shape[0], codes.shape[1] * 2
    weight = np.empty((outputs, inputs), np.float64)
    for n in range(outputs):
        for k in range(inputs):
            code = codes[n, k // 2] >> (4 if k % 2 else 0) & 15
            value = -E2M1[code & 7] if code & 8 else E2M1[code]
            if kind == "mx":
                scale = 2.0 ** (int(stored[n, k // 32]) - 127)
            else:
                scale = float(stored[n, k // 16])
            weight[n, k] = value * scale
    if kind == "compressed":
        weight /= float(t[f"{m}.weight_global_scale"])
    if kind == "modelopt":
        weight *= float(t[f"{m}.weight_scale_2"])
    return torch.from_numpy(weight).float()
