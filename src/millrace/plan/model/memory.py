"""What fits into a GPU's memory: weights, workspace, slots, pages and snapshots.

Millrace's own engine splits memory by `runtime.memory`, and so does this; of other engines only the
sequences that fit are known. Workspace is what steps and CUDA graphs take beside all that.
"""

from __future__ import annotations

from dataclasses import dataclass

from millrace.errors import ConfigError
from millrace.hardware.gpus import Gpu
from millrace.hardware.gpus import gpu as find_gpu
from millrace.model.cache_spec import CacheOptions, CacheSpec
from millrace.model.config import ModelConfig
from millrace.model.work import Formats, weight_bytes
from millrace.plan.facts.models import model_config
from millrace.plan.model.step_model import Description

GIB = 1 << 30
NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}
# Bytes beside weights and caches: measured 4.24 GiB of Millrace (27B, 16,384 tokens a step) and
# some 8 GiB of vLLM; the part that grows with a step's tokens is for a hidden size of 5,120.
WORKSPACE = {"millrace": 1.2 * GIB, "vllm": 4.0 * GIB, "sglang": 4.0 * GIB}
WORKSPACE_TOKEN = 190_000.0
SPREAD = 0.06  # relative standard deviation of what is left for caches
DANGER = 0.95  # shares of the memory above which engines were seen to fail under load


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """Bytes on one GPU, and what fits. sequences: that fit with the mean length of a request;
    longest: with max_model_len each. page_cost: tokens' worth of work of a snapshot, for
    `protocol.Limits`. num_pages .. num_snapshots: as Millrace would allocate them."""

    weights: float
    workspace: float
    caches: float
    sequence_bytes: float
    longest_bytes: float
    sequences: int
    longest: int
    max_num_seqs: int
    page_size: int
    num_pages: int
    num_snapshots: int
    page_cost: int
    warnings: tuple[str, ...] = ()


def cache_spec(config: ModelConfig, d: Description, page_size: int) -> CacheSpec:
    """The memory of the layers, for the formats of a description."""
    pages = -(-(d.max_model_len + d.drafts + 1) // page_size)
    return config.cache_spec(
        CacheOptions(
            dtype="bfloat16",
            kv_dtype=NAMES[d.kv],
            state_dtype=NAMES[d.state],
            page_size=page_size,
            max_pages=pages,
            drafts=d.drafts,
            window=max(16, 3 * (d.drafts + 1)),
            draft_head=d.drafts > 0 and config.mtp_layers > 0,
        )
    )


def sequence_bytes(config: ModelConfig, d: Description, tokens: float) -> float:
    """Memory of one sequence of so many tokens on one rank. Engines without the window form keep a
    state for every draft beside one, and their pages of keys are as large as states, so that a
    sequence has a whole one."""
    spec = cache_spec(config, d, 64)
    token = spec.page_bytes(d.tensor) / 64
    if d.window:
        return spec.slot_bytes(d.tensor) + token * (tokens + 32)
    states = spec.snapshot_bytes(d.tensor)
    if not (states and config.num_attention_layers):
        return token * (tokens + 8)
    page = states * config.num_attention_layers / config.num_gdn_layers
    return (1 + d.drafts) * states + page * max(1.0, token * tokens / page)


def fit(
    description: Description,
    *,
    mean_tokens: float | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int = 8192,
    utilization: float = 0.92,
    page_size: int = 64,
    prefix_caching: bool = True,
    slack: float = 1.0,
) -> MemoryFit:
    """What fits. mean_tokens: of a running request; None: max_model_len. max_num_seqs: None: what
    fits, at most 1,024. slack: factor of the memory for caches, to see what an error does.

    Raises ConfigError with what would work if the weights or one longest sequence do not fit.
    """
    d, config, gpu = description, model_config(description.model), find_gpu(description.gpu)
    budget = gpu.memory * utilization
    weights = weight_bytes(config, d.formats, d.layout, drafts=d.drafts > 0)
    workspace = WORKSPACE.get(d.engine, 4.0 * GIB)
    workspace += WORKSPACE_TOKEN * max_num_batched_tokens * config.hidden_size / 5120 / d.tensor
    if gpu.cpu:
        workspace /= 10
    caches = (budget - weights - workspace) * slack
    longest = sequence_bytes(config, d, d.max_model_len + d.drafts + 1)
    if caches < longest:
        raise ConfigError(_refusal(config, d, gpu, budget, weights, workspace, longest))
    mean = sequence_bytes(config, d, mean_tokens or d.max_model_len)
    seqs = min(max_num_seqs or 1024, max(1, int(caches / mean)))
    pages, snapshots, cost = _pages(config, d, caches, seqs, page_size, prefix_caching)
    return MemoryFit(
        weights=weights,
        workspace=workspace,
        caches=caches,
        sequence_bytes=mean,
        longest_bytes=longest,
        sequences=int(caches / mean),
        longest=int(caches / longest),
        max_num_seqs=seqs,
        page_size=page_size,
        num_pages=pages,
        num_snapshots=snapshots,
        page_cost=cost,
        warnings=tuple(_warnings(d, gpu, utilization, seqs, int(caches / longest))),
    )


def _pages(
    config: ModelConfig,
    d: Description,
    caches: float,
    seqs: int,
    page_size: int,
    prefix_caching: bool,
) -> tuple[int, int, int]:
    """(pages, snapshots, page cost) of Millrace's own split; fewer slots if those do not fit."""
    from millrace.runtime.memory import Costs, plan_memory

    spec = cache_spec(config, d, page_size)
    costs = Costs(
        spec.page_bytes(d.tensor), spec.slot_bytes(d.tensor), spec.snapshot_bytes(d.tensor)
    )
    pages = -(-(d.max_model_len + d.drafts + 1) // page_size)
    room = int(caches - (pages + 1) * costs.page) // costs.slot - 1 if costs.slot else seqs
    if room < 1:
        return 0, 0, 0
    plan = plan_memory(
        int(caches),
        costs,
        max_num_seqs=min(seqs, room),
        max_model_len=d.max_model_len,
        page_size=page_size,
        pages_per_request=pages,
        num_snapshots=None,
        prefix_caching=prefix_caching,
    )
    return plan.num_pages, plan.num_snapshots, round(costs.snapshot / max(1, costs.page))


def _warnings(d: Description, gpu: Gpu, share: float, seqs: int, longest: int) -> list[str]:
    found = []
    if share > DANGER or (share >= DANGER and d.engine != "millrace"):
        found.append(
            f"memory share {share:g}: starts, and fails under load where it was tried (0.95: 908 "
            "failed requests); 0.92 worked"
        )
    if d.engine == "vllm" and d.drafts >= 5:
        found.append(f"{d.drafts} drafts: vLLM ended with an illegal address; 1 or 2 worked")
    if seqs > longest:
        found.append(
            f"{seqs} sequences of full length would need more than there is ({longest} fit): "
            "requests are preempted if lengths grow"
        )
    if gpu.shared_memory:
        found.append("the memory is shared with the host: what its programs take is missing here")
    return found


def _refusal(
    config: ModelConfig,
    d: Description,
    gpu: Gpu,
    budget: float,
    weights: float,
    workspace: float,
    longest: float,
) -> str:
    """One line: what does not fit, and what would."""
    what = f"{d.model} in {d.weights} on {d.tensor} x {gpu.name}"
    room = budget - workspace - weights
    if room > 0:
        base = sequence_bytes(config, d, 0)
        token = (longest - base) / max(1, d.max_model_len + d.drafts + 1)
        most = int((room - base) / token) - d.drafts - 1
        if most > 0:
            return (
                f"{what}: a context of {d.max_model_len} needs {longest / GIB:.1f} GiB and "
                f"{room / GIB:.1f} GiB are left; --max-model-len {most} fits"
            )
    need = f"{what}: weights of {weights / GIB:.1f} GiB a GPU and {workspace / GIB:.1f} GiB of "
    need += f"workspace do not fit into {budget / GIB:.1f} GiB; "
    for ranks in (2, 4, 8, 16):
        total = weights * d.tensor / ranks + workspace + longest
        if ranks > d.tensor and total < budget:
            return need + f"--tensor-parallel-size {ranks} does"
    return need + "weights in fewer bits or another GPU would"


def formats_for(gpu: Gpu, weights: str) -> Formats:
    """Formats that suit a GPU: FP8 caches where it has such a unit."""
    return Formats(weights=weights, kv="fp8" if gpu.fp8 else "bf16")
