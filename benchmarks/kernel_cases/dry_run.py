"""Small float32 cases of the newer variants, for Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import torch

from kernel_cases import gdn_prefill
from kernel_cases.case import relative
from kernel_cases.gdn_inputs import prefill_rows
from kernel_cases.shapes import SMALL
from millrace.kernels import gdn, norm
from millrace.kernels.batch import GDNState
from millrace.kernels.gpu import quantize as gpu_quantize
from millrace.kernels.gpu.gdn import conv as gpu_conv
from millrace.kernels.gpu.gdn import prefill as gpu_prefill


def dry_run() -> int:
    """The newer variants at small sizes in Triton's interpreter; the exit status."""
    wrong = 0
    error = gdn_prefill.check(lambda q, *x: gpu_prefill.gdn_prefill(q.float(), *x), SMALL)
    print(f"gdn_prefill: error {error:.1e}")
    wrong += not error < 1e-4
    counts, width = (1, 40, 3, 64), SMALL.channels
    rows, offset = prefill_rows(counts), torch.tensor([0, 1, 0, 1, 0]).int()
    x, weight = torch.randn(sum(counts), width + 8)[:, :width], torch.randn(width, 4)
    buffer = torch.randn(5, 4, width)
    own, twin = (GDNState(*[x] * 4, buffer.clone()) for _ in range(2))
    got = gpu_conv.conv_prefill(x, own, weight, rows, offset)
    want = gdn.conv_prefill.__wrapped__(x, twin, weight, rows, offset)
    error = max(relative(got, want), relative(own.conv, twin.conv))
    print(f"conv_prefill: error {error:.1e}")
    wrong += not error < 1e-5
    y, r, w = torch.randn(5, SMALL.hidden), torch.randn(5, SMALL.hidden), torch.randn(SMALL.hidden)
    truth = norm.add_rms_norm.__wrapped__(y, r, w, 1e-6)[0]
    error = relative(gpu_quantize.norm(y, r, w, 1e-6)[0], truth)
    print(f"norm: error {error:.1e}")
    wrong += not error < 1e-5
    return int(wrong > 0)
