"""The worker of one rank: it owns the device, the model and the memory; plans in, results out.

It loads, sizes and allocates once; afterwards it only launches steps. On a GPU a launch returns
while the step runs, and the result is copied to the host on another stream. On a CPU a launch runs
the step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from millrace.config import EngineConfig
from millrace.errors import ConfigError
from millrace.kernels.batch import Caches
from millrace.kernels.cpu import build as native
from millrace.kernels.gpu.device import is_unified
from millrace.kernels.gpu.device import memory as device_memory
from millrace.model.build import build_model
from millrace.model.cache_spec import CacheOptions, CacheSpec
from millrace.model.causal_lm import CausalLM
from millrace.model.config import ModelConfig
from millrace.model.drafters.source import DraftSource
from millrace.model.formats.fp8_block import FORMAT as FP8
from millrace.model.formats.plain import PlainLinear
from millrace.model.layers.attention import Attention
from millrace.model.layers.moe import Experts, count_loads
from millrace.model.parallel import TensorParallel
from millrace.model.vocabulary import Fp8DraftHead
from millrace.model.w4.format import W4Linear
from millrace.model.weight_format import Linear
from millrace.model.weights import load, random_weights
from millrace.model.work import Layout, weight_bytes
from millrace.model.work.fit import formats_in_memory, problem, rank_needs
from millrace.protocol import FoundFile, Limits, Masks, StepPlan, StopRanks, TransferEnd
from millrace.runtime import accounting
from millrace.runtime.memory import Costs, MemoryPlan, enough_memory, plan_memory
from millrace.runtime.profile_run import (
    declared_warmup,
    row_counts,
    token_counts,
    workspace_bytes,
)
from millrace.runtime.ranks.allreduce import AllReduce, Timing
from millrace.runtime.ranks.plan_codec import (
    CommonRecords,
    FinishedFiles,
    MeasureAllReduce,
    Message,
)
from millrace.runtime.ranks.ranks import Ranks
from millrace.runtime.step.caches import DTYPES, allocate_caches
from millrace.runtime.step.results import PendingStep
from millrace.runtime.step.runner import Runner
from millrace.runtime.step.slots import Slots, tape_length
from millrace.runtime.step.snapshots import Snapshots
from millrace.runtime.tiers.disk_cache import DiskCache, cache_folder
from millrace.runtime.tiers.host_cache import HostCache
from millrace.runtime.tiers.tiers import Tiers
from millrace.runtime.transfer.identity import Identity
from millrace.runtime.transfer.peer import Address, Peer, Place, new_engine
from millrace.runtime.transfer.record_form import RecordForm

logger = logging.getLogger(__name__)

# A CPU engine without a memory limit gets what max_num_seqs sequences of max_model_len tokens need,
# but at most this share of the free memory, and CPU_MOST.
CPU_SHARE = 0.4
CPU_MOST = 4 << 30
CPU_LEAST = 256 << 20  # so that a few short sequences have a useful prefix cache
LONGEST_MEASURED = 1024  # most rows of an all-reduce message that is measured


class Worker:
    """Runs plans on this rank. Rank 0 sends each plan to the other ranks first."""

    def __init__(
        self, config: EngineConfig, model_config: ModelConfig, directory: Path, ranks: Ranks
    ) -> None:
        self.config = config
        self.ranks = ranks
        self._device = torch.device(config.device)
        self.model_config = model_config
        self._directory = directory
        self.tiers: Tiers | None = None
        if config.args.batch_invariant:
            settle_ops(config, model_config)
        self.cache_spec = model_config.cache_spec(CacheOptions.of(config))
        drafter = DraftSource.of(config, model_config, directory)
        if drafter is not None:
            self.cache_spec = drafter.extended(self.cache_spec)
        self.all_reduce = AllReduce.build(
            ranks, model_config.hidden_size, DTYPES[config.dtype], self._device
        )
        self.all_reduce.choose(_message_rows(config))
        whole = has_whole_experts(config, model_config, ranks.size)
        parallel = replace(self.all_reduce.parallel(), whole_experts=whole)
        self.expert_ranks = ranks.size if whole else 1
        if config.device == "cuda":
            check_fit(config, model_config, self.cache_spec, Layout(ranks.size, whole))
        self.accounted = accounting.accounted(
            config, model_config, Layout(ranks.size, whole), drafter
        )
        self.model = build_empty_model(config, model_config, parallel)
        longest = tape_length(config.max_model_len, config.drafts)
        self._loads = count_loads(self.model) if config.args.report_expert_load else {}
        with ExitStack() as self._background:  # may use GPU memory until it is measured
            with _timed("weights"):
                compile_in_background(config, self.model, self._background)
                log_backends(config, model_config, self.model)
                load_model(config, self.model, directory, ranks.check)
                if drafter is not None:
                    drafter.attach(self.model, longest, DTYPES[config.dtype])
                    dummy = config.args.load_format == "dummy"
                    drafter.load(self.model, dummy, config.args.seed, ranks.check)
                warm_experts(config, self.model)
            with _timed("memory"):
                self.memory = self.divide_memory()
        pages, snapshots = self.memory.num_pages, self.memory.num_snapshots
        logger.info(
            "states and KV cache take %.2f GiB: %d sequences, %d tokens, %d snapshots",
            self.memory.bytes / 2**30, config.max_num_seqs, (pages - 1) * config.page_size,
            snapshots,
        )  # fmt: skip
        if unused := unused_options(config, self.cache_spec):
            logger.warning(
                "%s: no effect, because this model has no recurrent state; its prompts resume at "
                "any page",
                ", ".join(unused),
            )
        self.runner = self.build_runner(config, pages, snapshots)
        if declared_warmup(config).snapshots:
            self.runner.try_snapshots()
        if config.device == "cuda" and not config.args.enforce_eager:
            with _timed("graphs"):
                self._capture()
            if config.args.prefill_graphs and not self.runner.has_prefill_graphs:
                logger.warning("steps with prompts run eagerly, since ranks share the model")
        for counts in self._loads.values():
            counts.zero_()  # of what ran to measure memory, and to capture

    def limits(self) -> Limits:
        """The limits that the scheduler works within."""
        config = self.config
        return Limits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            mixed_prefill_tokens=config.mixed_prefill_tokens,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            max_num_partial_prefills=config.max_num_partial_prefills,
            max_long_partial_prefills=config.max_long_partial_prefills,
            max_model_len=config.max_model_len,
            page_size=config.page_size,
            num_pages=self.memory.num_pages,
            num_snapshots=self.memory.num_snapshots,
            drafts=config.drafts,
            methods=config.speculation.methods,
            depths=list(config.speculation.depths),
            depth_schedule=list(config.speculation.schedule),
            prefix_caching=config.args.enable_prefix_caching,
            page_cost=self._page_cost(),
            host_cache=self.host_bytes(),
            disk_cache=config.disk_cache // self.ranks.size,
            page_bytes=self.cache_spec.page_bytes(self.ranks.size),
            snapshot_bytes=self.cache_spec.snapshot_bytes(self.ranks.size),
            transfers=self.address is not None,
            lease=config.args.kv_lease,
            recompute=config.args.kv_load_failure_policy == "recompute",
            cache_policy="snapshot" if self.cache_spec.needs_snapshots else "page",
            snapshot_interval=config.snapshot_interval,
            snapshot_distance=config.snapshot_distance,
            eos_ids=frozenset(self.model_config.eos_ids),
            seed=config.args.seed,
            vocab_size=self.model_config.vocab_size,
            priorities=config.args.scheduling_policy == "priority",
        )

    def devices(self) -> tuple[str, list[str]]:
        """The name of this rank's device, and the UUIDs of the GPUs of all ranks of this host."""
        return accounting.devices(self._device, self.ranks.size)

    def launch(self, plan: StepPlan, masks: Callable[[], Masks] | None = None) -> PendingStep:
        """Start a step. masks: builds the masks of rows with a grammar; only rank 0 needs it."""
        self.ranks.send(plan)
        output = self.runner.run(plan, masks)
        return PendingStep(plan, output, self._device.type == "cuda", self.ranks.wait)

    def follow(self) -> None:
        """A rank other than 0: run rank 0's plans until it stops the ranks."""
        while not isinstance(message := self.ranks.receive(), StopRanks):
            if isinstance(message, MeasureAllReduce):
                self.all_reduce.measure(message.rows)
            elif isinstance(message, StepPlan):
                self.runner.run(message)
            self._follow_tiers(message)
        self.runner.release()

    def _follow_tiers(self, message: Message) -> None:
        if self.tiers is None:
            return
        if isinstance(message, FinishedFiles):
            self.tiers.finished_files()
        elif isinstance(message, CommonRecords):
            self.tiers.common(self.tiers.found(), message.keys)
        else:
            self.tiers.finished()  # nobody asks this rank

    def measure_all_reduce(self, rows: list[int]) -> list[Timing]:
        """Measure every all-reduce algorithm at messages of so many rows."""
        self.ranks.send(MeasureAllReduce(rows))
        return self.all_reduce.measure(rows)

    def finished(self) -> list[TransferEnd]:
        """Rank 0: transfers that have ended since the last call."""
        if self.tiers is None:
            return []
        ended = self.tiers.finished()
        if self.tiers.has_finished_files:
            self.ranks.send(FinishedFiles())
            ended += self.tiers.finished_files()
        return ended

    def expert_load(self) -> dict[str, list[int]]:
        """How many tokens each expert has got, by layer, since the start; empty if they are not
        counted. Waits for the device."""
        if self._device.type == "cuda" and self._loads:
            self.ranks.wait_for_device()
        return {layer: counts.tolist() for layer, counts in self._loads.items()}

    def found_files(self) -> dict[str, FoundFile]:
        """Rank 0: the records that an earlier process left in files, of all ranks."""
        if self.tiers is None or self.tiers.files is None:
            return {}
        found = self.tiers.found()
        self.ranks.send(CommonRecords(list(found)))
        return self.tiers.common(found, list(found))

    def close(self) -> None:
        self.ranks.send(StopRanks())
        self.runner.release()  # first: NCCL waits for graphs with its collectives
        self.ranks.leave()

    # --- memory -----------------------------------------------------------------------------

    def divide_memory(self) -> MemoryPlan:
        """The plan of the memory, the same on all ranks."""
        config, args = self.config, self.config.args
        return plan_memory(
            self.ranks.min_over_ranks(self.memory_budget()),
            self._costs(),
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            page_size=config.page_size,
            pages_per_request=config.max_pages_per_request,
            num_snapshots=args.num_snapshots,
            prefix_caching=args.enable_prefix_caching,
        )

    def host_bytes(self) -> int:
        """Bytes of the host's memory for prefixes, on one rank. Files are read and written through
        it, so with a disk cache there is enough for a few of the longest ones."""
        config, ranks, spec = self.config, self.ranks.size, self.cache_spec
        if not config.args.enable_prefix_caching:
            return 0
        longest = config.max_pages_per_request * spec.page_bytes(ranks)
        least = 2 * (longest + spec.snapshot_bytes(ranks)) if config.disk_cache else 0
        return max(config.host_cache // ranks, least)

    def _page_cost(self) -> float:
        """Memory of a page as a share of a snapshot's."""
        snapshot = self.cache_spec.snapshot_bytes(self.ranks.size)
        return self.cache_spec.page_bytes(self.ranks.size) / snapshot if snapshot else 0.0

    def _costs(self) -> Costs:
        config, ranks = self.config, self.ranks.size
        row = Slots.row_bytes(config.max_model_len, config.drafts)
        return Costs(
            page=self.cache_spec.page_bytes(ranks),
            slot=self.cache_spec.slot_bytes(ranks) + row,
            snapshot=self.cache_spec.snapshot_bytes(ranks),
        )

    def memory_budget(self) -> int:
        """Bytes available for states, pages and snapshots."""
        args = self.config.args
        if args.kv_cache_memory_bytes is not None:
            return args.kv_cache_memory_bytes
        if self._device.type == "cuda":
            # Records that other processes map, and all of the host's where memory is the same one.
            shared = args.kv_transport == "cuda_ipc" or is_unified()
            records = self.host_bytes() if shared else 0
            return -records + gpu_memory_budget(
                args.gpu_memory_utilization, self._workspace, self._background.close
            )
        enough = enough_memory(
            self._costs(),
            max_num_seqs=self.config.max_num_seqs,
            pages_per_request=self.config.max_pages_per_request,
            num_snapshots=args.num_snapshots,
        )
        enough = max(enough, CPU_LEAST)
        return min(enough, int(_available_memory() * CPU_SHARE) // self.ranks.size, CPU_MOST)

    def _workspace(self) -> int:
        """Bytes that the largest steps and graphs need, measured."""
        return workspace_bytes(
            self.config, lambda config: self.build_runner(config, 1, 0), self.ranks.wait_for_device
        )

    def _capture(self) -> None:
        free, _ = torch.cuda.mem_get_info()
        count = self.runner.capture(self.config)
        torch.cuda.empty_cache()  # of what ran before it was captured
        taken = free - torch.cuda.mem_get_info()[0]
        logger.info("%d graphs of steps take %.0f MiB", count, taken / 2**20)

    # --- allocation -------------------------------------------------------------------------

    def build_runner(self, config: EngineConfig, pages: int, snapshots: int) -> Runner:
        """A runner with slots for config.max_num_seqs requests."""
        spec, ranks, device = self.cache_spec, self.ranks.size, self._device
        rows = config.max_num_seqs + 1
        caches = allocate_caches(spec, slots=rows, pages=pages, ranks=ranks, device=device)
        slots = Slots.allocate(config.max_num_seqs, config.max_model_len, config.drafts, device)
        pool = Snapshots.allocate(spec, snapshots, ranks, device)
        if snapshots or (pages > 1 and not spec.needs_snapshots):
            self.tiers = self._build_tiers(caches, pool)
        runner = Runner(config, self.model, caches, slots, pool, self.ranks)
        runner.tiers = self.tiers
        return runner

    def _build_tiers(self, caches: Caches, pool: Snapshots) -> Tiers | None:
        if not (size := self.host_bytes()):
            return None
        on_device = self.config.args.kv_transport == "cuda_ipc" and self._device.type == "cuda"
        if not on_device and size > (free := _available_memory()):
            raise ConfigError(
                f"host_cache_gb {self.config.host_cache / 2**30:g}: this rank needs "
                f"{size / 2**30:.1f} GiB of the host's memory for it, and {free / 2**30:.1f} are "
                "free; give less"
            )
        shared = self.config.args.role is not None
        host, files = HostCache(size, caches, pool, shared, on_device), None
        where = "GPU" if on_device else "host"
        logger.info("cached prefixes may take %.2f GiB of the %s's memory", size / 2**30, where)
        if self.config.disk_cache:
            rank, size = self.ranks.rank, self.ranks.size
            folder = cache_folder(self.config, self.cache_spec, self._directory, rank, size)
            files = DiskCache(folder, host.memory)
            logger.info("and %.2f GiB in %s", self.config.disk_cache / size / 2**30, files.folder)
        peer = self._build_peer(host) if shared else None
        ranks = self.ranks
        return Tiers(host, files, peer, ranks.mins_over_ranks, ranks.size, ranks.wait)

    def _build_peer(self, host: HostCache) -> Peer:
        """All ranks call it together."""
        args, ranks = self.config.args, self.ranks
        identity = Identity.of(self.config, self.cache_spec, self._directory, ranks.size)
        port = args.kv_transfer_port + (ranks.rank if args.kv_transfer_port else 0)
        engine = torch.frombuffer(bytearray(new_engine().encode()), dtype=torch.uint8)
        if ranks.size > 1:
            ranks.broadcast_bytes(engine)
        place = Place(ranks.rank, engine.numpy().tobytes().decode(), RecordForm.of(self.cache_spec))
        peer = Peer(
            identity, host.layout, host.memory, host.descriptor, args.kv_transport,
            args.kv_transfer_host, port, place,
        )  # fmt: skip
        mine = [peer.address.port * (rank == ranks.rank) for rank in range(ranks.size)]
        peer.set_ports(tuple(int(one) for one in ranks.max_over_ranks([*map(float, mine)])))
        return peer

    @property
    def address(self) -> Address | None:
        """By which other engines take this one's records; None: they cannot."""
        peer = None if self.tiers is None else self.tiers.peer
        return None if peer is None else peer.address


def settle_ops(config: EngineConfig, model_config: ModelConfig) -> None:
    """Wait for native code that is being compiled: a request must not see both it and the
    references, whose sums have another order. Raises ConfigError where ops are not invariant."""
    if config.device == "cuda":
        if model_config.experts is not None:
            raise ConfigError(
                "batch_invariant: not yet for mixtures of experts on a GPU; use device cpu, or "
                "leave it out"
            )
        return
    found = native.library()
    native.wait_until_built()
    kind = "native code" if found or native.library() else "references, in torch"
    logger.info("batch invariant ops: %s; engines that run the other answer differently", kind)


def gpu_memory_budget(
    utilization: float, workspace: Callable[[], int], stop_compilers: Callable[[], None]
) -> int:
    """Bytes of the GPU for states, pages and snapshots.

    utilization: the share of all memory that the engine may use. workspace: measures what steps and
    graphs need. stop_compilers: called before free memory is read, because compilers use some.
    """
    taken = workspace()
    stop_compilers()
    free, total = device_memory()
    logger.info("steps and graphs take %.2f GiB of workspace", taken / 2**30)
    return int(free - taken - (1.0 - utilization) * total)


@contextmanager
def _timed(part: str) -> Iterator[None]:
    """Log how long a part of the start took."""
    began = time.perf_counter()
    yield
    logger.info("%s: %.1f s", part, time.perf_counter() - began)


def unused_options(config: EngineConfig, spec: CacheSpec) -> list[str]:
    """Options about states and snapshots that were given for a model without them."""
    names = ("num_snapshots", "snapshot_interval", "snapshot_distance")
    given = [name for name in names if getattr(config.args, name)]
    if config.args.mamba_ssm_cache_dtype != "auto":
        given.append("mamba_ssm_cache_dtype")
    return [] if spec.needs_snapshots else given


def check_fit(
    config: EngineConfig, model_config: ModelConfig, spec: CacheSpec, layout: Layout
) -> None:
    """Raise ConfigError, with numbers of ranks that fit, if the weights do not fit into this GPU.
    Weights in a format of unknown size are not checked."""
    kept = model_config.quantization.format.is_fast_on(torch.device(config.device))
    try:
        formats = formats_in_memory(model_config, config.dtype, kept)
    except ConfigError:
        return
    drafts, free = bool(config.speculation.head), device_memory()[0]
    weights = weight_bytes(model_config, formats, layout, drafts=drafts)
    needs = rank_needs(model_config, formats, spec, config.max_model_len, drafts=drafts)
    if found := problem(needs, layout, weights, free):
        raise ConfigError(found)


def has_whole_experts(config: EngineConfig, model_config: ModelConfig, ranks: int) -> bool:
    """Whether ranks have whole experts, as asked; logs why not, if they were asked for."""
    if not config.args.enable_expert_parallel:
        return False
    reason = "one rank has all experts" if ranks == 1 else ""
    if model_config.experts is None:
        reason = "this model has no experts"
    if reason:
        logger.warning("enable_expert_parallel: no effect, because %s", reason)
    return not reason


def _message_rows(config: EngineConfig) -> list[int]:
    """Rows of the all-reduce messages to measure: of decode steps, small to large, and of chunks.

    Longer messages are bound by the link, whichever algorithm is used.
    """
    width = config.drafts + 1
    rows = {n * width for n in (1, 8, 32, config.max_num_seqs)} | {config.max_num_batched_tokens}
    return [n for n in sorted(rows) if n <= LONGEST_MEASURED]


def build_empty_model(
    config: EngineConfig, model_config: ModelConfig, parallel: TensorParallel
) -> CausalLM:
    """The model without weights. Quantized weights stay so if the device has GEMMs for them."""
    fp8 = FP8.is_fast_on(torch.device(config.device))
    head = config.speculation.head == "mtp"
    if config.device == "cuda" and head and config.draft_fp8 and not fp8:
        raise ConfigError(
            'speculative_config.quantization "fp8": this GPU has no FP8 GEMM; use "none"'
        )
    return build_model(
        model_config,
        dtype=DTYPES[config.dtype],
        device=config.device,
        tp=parallel,
        max_len=tape_length(config.max_model_len, config.drafts),
        mtp=head,
        keep_quantized=None,
        draft_fp8=config.draft_fp8,
    )


def compile_in_background(config: EngineConfig, model: CausalLM, background: ExitStack) -> None:
    """Compile the model's FP8 GEMMs in other processes, until `background` is closed."""
    if config.device != "cuda" or config.dtype != "bfloat16":
        return
    from millrace.kernels.gpu.gemm.prebuild import compiling  # needs packages for GPUs

    grouped = _grouped_sizes(config, model)
    background.enter_context(compiling(_fp8_sizes(config, model), grouped))


def log_backends(config: EngineConfig, model_config: ModelConfig, model: CausalLM) -> None:
    """Log the backend of each op on a GPU, and what becomes of quantized weights."""
    _log_weights(config, model_config, model)
    if config.device != "cuda":
        return
    from millrace.kernels.gpu.gdn import decode  # needs packages for GPUs
    from millrace.runtime import kernel_report  # needs packages for GPUs

    shapes = {(outputs, inputs) for outputs, inputs, _ in _fp8_sizes(config, model)}
    bf16, state = config.dtype == "bfloat16", config.state_dtype
    shape = decode.Shape(
        N=config.drafts + 1, W=config.window, DK=model_config.key_dim, DV=model_config.value_dim,
        RATIO=model_config.value_heads // max(model_config.key_heads, 1), RAW=True, CONV=True,
        QKV_BF16=bf16, STATE_BF16=state == "bfloat16", KEY_BF16=bf16, GATE_BF16=bf16,
        STATE_FP16=state == "float16",
    )  # fmt: skip
    gdn = shape if model_config.num_gdn_layers else None
    experts = None if model_config.experts is None else _fp8_experts(model)
    w4 = any(isinstance(module, W4Linear) for module in model.modules())
    found = kernel_report.backends(DTYPES[config.dtype], shapes, gdn, experts, w4)
    kernel_report.log_backends(found)


def _log_weights(config: EngineConfig, model_config: ModelConfig, model: CausalLM) -> None:
    """Log whether quantized weights are dequantized at load, and the bytes that they take."""
    found = model_config.quantization
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    plain = [module for module in linears if isinstance(module, PlainLinear)]
    if found.method == "none":
        return
    form, dtype = found.format.name, config.dtype
    if len(plain) == len(linears):
        device = torch.cuda.get_device_name() if config.device == "cuda" else "a CPU"
        level = logging.WARNING if config.device == "cuda" else logging.INFO
        logger.log(level, "%s weights become %s: %s has no %s GEMM", form, dtype, device, form)
        return
    if any(isinstance(module, W4Linear) for module in linears):
        layers = [m for m in model.modules() if isinstance(m, PlainLinear | W4Linear | Experts)]
        kept = [m for m in layers if isinstance(m, W4Linear) or getattr(m, "is_w4", False)]
        logger.info(
            "%s weights stay 4 bits, %.2f GiB, and are dequantized where they are multiplied; "
            "other linear layers and experts are %s, %.2f GiB",
            form, _bytes(kept) / 2**30, dtype, (_bytes(layers) - _bytes(kept)) / 2**30,
        )  # fmt: skip


def _bytes(modules: Iterable[nn.Module]) -> int:
    return sum(param.nbytes for module in modules for param in module.parameters())


def _fp8_sizes(config: EngineConfig, model: CausalLM) -> set[tuple[int, int, int]]:
    """(outputs, inputs, tokens) of the GEMMs with e4m3 weights."""
    shapes = set()
    for module in model.modules():
        if isinstance(module, Linear) and module.takes_fp8:
            shapes.add((module.outputs, module.inputs))
        if isinstance(module, Attention) and module.qkv_proj.takes_fp8:
            # For tokens that are not sampled, the draft head computes keys and values only.
            shapes.add((sum(module.widths[2:]), module.qkv_proj.inputs))
    sizes = {(*shape, tokens) for shape in shapes for tokens in token_counts(config)}
    if isinstance(model.draft_output, Fp8DraftHead):
        outputs, inputs = model.draft_output.weight.shape
        sizes |= {(outputs, inputs, rows) for rows in row_counts(config)}
    return sizes


def _fp8_experts(model: CausalLM) -> dict[tuple[int, int, int], int]:
    """Shapes of experts with e4m3 weights: their number, hidden channels, and their own; and how
    many a token goes to."""
    found = {}
    for module in model.modules():
        if isinstance(module, Experts) and module.takes_fp8:
            count, hidden, width = module.gemm_shape
            found[count, hidden, width] = module.top_k
    return found


def _grouped_sizes(config: EngineConfig, model: CausalLM) -> set[tuple[int, int, int, int, int]]:
    """(outputs, inputs, rows, experts, tile) of DeepGEMM's GEMMs with the weights of experts."""
    from millrace.kernels.gpu.moe import deep_gemm_rows, deep_gemm_tile  # needs packages for GPUs

    sizes = set()
    for (count, hidden, width), top_k in _fp8_experts(model).items():
        for tokens in token_counts(config):
            if rows := deep_gemm_rows(tokens, top_k, (count, hidden, width)):
                tile = deep_gemm_tile(tokens * top_k, count)
                sizes |= {(2 * width, hidden, rows, count, tile)}
                sizes |= {(hidden, width, rows, count, tile)}
    return sizes


def warm_experts(config: EngineConfig, model: CausalLM) -> None:
    """On a GPU, run the experts for numbers of tokens with kernels of their own, so that a step in
    no graph waits for no compiler. Those of DeepGEMM are compiled in the background."""
    if config.device != "cuda" or model.config.experts is None:
        return
    from millrace.kernels.gpu.moe import deep_gemm_rows  # needs packages for GPUs

    modules = [module for module in model.modules() if isinstance(module, Experts)]
    for module in {module.gemm_shape: module for module in modules}.values():
        tokens = 1
        while tokens < 9 / 8 * config.max_num_batched_tokens:
            if not deep_gemm_rows(tokens, module.top_k, module.gemm_shape):
                module.multiply(min(tokens, config.max_num_batched_tokens))
            tokens = max(tokens + 1, tokens * 9 // 8)


def load_model(
    config: EngineConfig, model: CausalLM, directory: Path, check: Callable[[], None]
) -> None:
    """Load the weights. check: called meanwhile; raises if loading is pointless."""
    if config.args.load_format == "dummy":
        random_weights(model, config.args.seed, check)
    else:
        load(model, directory, check)
    taken = model.quantize_draft_head()
    if taken:
        logger.info("the FP8 copy of the output head, for drafts, takes %.0f MiB", taken / 2**20)


def _available_memory() -> int:
    """Bytes that this process can allocate without swapping, within its control group."""
    available = 8 << 30
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup") / name
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            available = min(available, int(text))
    return available
