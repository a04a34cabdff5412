"""Builds one replica from its parts: scheduler, worker and ranks.

The only module of this package that imports the runtime, and so torch; it does so when an engine is
built, not when it is imported.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from millrace.common.safe_log import exit_at_once
from millrace.config import EngineArgs, EngineConfig, ModelFacts, resolve
from millrace.engine.engine import Engine
from millrace.engine.grammar import Grammars
from millrace.engine.scheduler import Scheduler
from millrace.engine.worker_protocol import Account
from millrace.errors import CheckpointError, ConfigError, RankError, UserError
from millrace.model_lookup import find_model
from millrace.protocol import AddRequest, Delta, SamplingParams
from millrace.replica.hang_guard import RANK_FAILED, HangGuard, limit_exit
from millrace.replica.rank_fingerprint import facts
from millrace.replica.rank_launcher import STARTED_HERE, LocalRanks, require_devices, threads

if TYPE_CHECKING:
    from millrace.model.config import ModelConfig
    from millrace.runtime.ranks.process_groups import RankInfo
    from millrace.runtime.ranks.ranks import Ranks
    from millrace.runtime.worker import Worker

log = logging.getLogger("millrace.engine")

RANK_STOP_LIMIT = 10.0


def _wait_passively() -> None:
    """Make OpenMP threads sleep while they wait, unless the user set a policy.

    Call it before torch is loaded. Threads that spin take cores from the threads they wait for and
    from the server process: with more threads than free cores a step takes ten times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def build_engine(args: EngineArgs, on_failure: Callable[[str], None] | None = None) -> Replica:
    """Load the model, plan the memory and complete one request. Raises UserError, or what failed.

    With tensor_parallel_size > 1 the other ranks are started here, unless torchrun has done so.
    on_failure: called once, on another thread, with the reason if the ranks have failed. The engine
    raises RankError for the same reason as soon as the running call returns. Without on_failure a
    process that hangs in a GPU call, and so cannot raise, is ended with that line.
    """
    _wait_passively()
    from millrace.runtime.ranks.process_groups import launched_by_torchrun, torchrun_rank_info

    config, model = _resolve(args)
    if launched_by_torchrun():
        rank_info, children, store = (
            torchrun_rank_info(args.tensor_parallel_size),
            LocalRanks(),
            None,
        )
    else:
        rank_info, children, store = _start_here(args, config)
    guard = HangGuard()
    report_failure = on_failure or guard.failed
    try:
        joined = _join(
            config,
            rank_info,
            store=store,
            exit_reason=children.exit_reason,
            on_failure=report_failure,
        )
        try:
            with guard:
                replica = _assemble(config, model, joined, children)
            replica.guard = guard
            return replica
        except BaseException as error:
            joined.fail(f"rank 0 could not start: {error}")
            if isinstance(error, RankError):
                limit_exit()
            children.stop(limit=0.0)  # first, so that no collective waits for these
            joined.leave()
            raise
    except BaseException:
        children.stop(limit=0.0)
        raise


def run_rank(args: EngineArgs) -> int:
    """Run a rank other than 0 (RANK and WORLD_SIZE are set) until rank 0 stops it. Exit status."""
    _wait_passively()
    from millrace.runtime.ranks.process_groups import torchrun_rank_info

    rank_info = torchrun_rank_info(args.tensor_parallel_size)
    ours = logging.getLogger("millrace")
    ours.setLevel(max(logging.WARNING, ours.level))  # rank 0 logs the rest
    joined = None
    try:
        config, model = _resolve(args)
        joined = _join(config, rank_info, on_failure=lambda why: _end_rank(rank_info.rank, why))
        worker = _worker(config, model, joined)
        worker.follow()
    except BaseException as error:
        _give_up(rank_info.rank, joined, error)
    joined.leave()
    return 0


def _give_up(rank: int, joined: Ranks | None, error: BaseException) -> NoReturn:
    """Tell all ranks the reason, and end at once, without waiting for collectives that hang."""
    if isinstance(error, (UserError, RankError)):
        log.error("rank %d ends: %s", rank, error)
    else:
        log.exception("rank %d ends", rank)
    if joined is not None:
        joined.fail(f"rank {rank} (pid {os.getpid()}) ends: {error or type(error).__name__}")
    exit_at_once(2 if isinstance(error, UserError) else RANK_FAILED)


def _end_rank(rank: int, why: str) -> None:
    """End this rank at once: the group has failed."""
    log.error("rank %d ends: %s", rank, why)
    exit_at_once(RANK_FAILED)


def _start_here(args: EngineArgs, config: EngineConfig) -> tuple[RankInfo, LocalRanks, Any]:
    """(rank 0, the other ranks, which are started here, the store to find them)."""
    import torch

    from millrace.runtime.ranks.process_groups import RankInfo, open_store

    size = args.tensor_parallel_size
    if size == 1:
        return RankInfo(), LocalRanks(), None
    require_devices(size, config.device, torch.cuda.device_count())
    store = open_store()
    children = LocalRanks.start(args, size, store.port, config.device)
    if share := threads(size, config.device):
        torch.set_num_threads(int(share["OMP_NUM_THREADS"]))
    return RankInfo(0, size, 0), children, store


def _join(config: EngineConfig, rank_info: RankInfo, **options: Any) -> Ranks:
    """Join the other ranks, and take this rank's GPU."""
    import torch

    from millrace.runtime.ranks.ranks import Ranks

    device: str = config.device
    if device == "cuda" and rank_info.size > 1:
        torch.cuda.set_device(rank_info.local)
        device = torch.cuda.get_device_name()
    one_install = options.get("store") is not None or STARTED_HERE in os.environ
    model = _directory(config.args)
    known = facts(config.args, model, device, one_install) if rank_info.size > 1 else {}
    return Ranks.join(rank_info, "nccl" if config.device == "cuda" else "gloo", known, **options)


def _resolve(args: EngineArgs) -> tuple[EngineConfig, ModelConfig]:
    import torch

    from millrace.model.config import read_config

    model = read_config(_directory(args), args.hf_overrides)
    _check_quantization(args, model)
    facts = ModelFacts(
        max_position_embeddings=model.max_positions,
        checkpoint_dtype=model.dtype,
        mtp_layers=model.mtp_layers,
    )
    return resolve(args, facts, cuda=torch.cuda.is_available()), model


def _directory(args: EngineArgs) -> Path:
    return find_model(args.model, args.revision, args.download_dir)


def _check_quantization(args: EngineArgs, model: ModelConfig) -> None:
    """Raise ConfigError unless the checkpoint is quantized as the options say."""
    method = model.quantization.method
    if args.quantization not in (None, "none", method):
        found = model.dtype if method == "none" else method
        raise ConfigError(
            f"quantization {args.quantization}: the weights of {args.model} are {found}, and "
            "weights are not quantized when they are loaded; leave it out, or give a checkpoint "
            "that is"
        )
    if args.quantization == "none" and model.quantization.method != "none":
        raise ConfigError(
            f"quantization none: the weights of {args.model} are {model.quantization.format.name}; "
            "leave it out, or give a checkpoint that is not quantized"
        )


def _worker(config: EngineConfig, model: ModelConfig, ranks: Ranks) -> Worker:
    from millrace.runtime.worker import Worker

    return Worker(config, model, _directory(config.args), ranks)


class Replica(Engine):
    """An engine with its ranks; children: those that were started here."""

    ranks: Ranks
    children: LocalRanks
    worker: Worker
    guard: HangGuard

    def step(self) -> list[Delta]:
        with self.guard:
            return super().step()

    def check(self) -> None:
        """Raise RankError if a rank has failed; an idle engine would not notice otherwise."""
        self.ranks.check()

    def expert_load(self) -> dict[str, list[int]]:
        """How many tokens each expert has got, by layer; empty if they are not counted."""
        return self.worker.expert_load()

    def close(self) -> None:
        try:
            super().close()
            self.children.stop(RANK_STOP_LIMIT)
        except RankError:
            self.children.stop(0.0)  # first, so that no collective waits for these
            self.ranks.leave()


def _assemble(
    config: EngineConfig, model: ModelConfig, ranks: Ranks, children: LocalRanks
) -> Replica:
    worker = _worker(config, model, ranks)
    depth = 1 if config.async_scheduling else 0
    limits = worker.limits()
    without_tiers = msgspec.structs.replace(limits, host_cache=0)
    _warm_up(Engine(Scheduler(without_tiers), worker, depth=depth), config)
    engine = Replica(
        Scheduler(limits),
        worker,
        depth=depth,
        plan_log=Path(config.args.plan_log) if config.args.plan_log else None,
        check=config.args.debug,
        config=config,
        grammars=_grammars(config, model),
        account=_account(worker),
    )
    engine.scheduler.restore(worker.found_files())
    engine.ranks, engine.children = ranks, children
    gc.collect()
    gc.freeze()
    return engine


def _account(worker: Worker) -> Account | None:
    from millrace.model.work import WorkAccount

    if worker.accounted is None:
        log.warning("FLOPs and bytes of steps are not counted: the weights' format has no size")
        return None
    return WorkAccount(worker.accounted)


def _warm_up(engine: Engine, config: EngineConfig) -> None:
    """Complete one request, so that an engine that reports ready has run. Raises CheckpointError
    for a model that computes NaN."""
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine.add(AddRequest(id="warm-up", prompt=[0], params=params))
    while engine.has_work():
        for delta in engine.step():
            if delta.model_failed:
                raise CheckpointError(
                    f"{config.args.model}: the first step, in {config.dtype}, computed logits that "
                    "are NaN or infinite; the weights are damaged, or need another --dtype"
                )


def _grammars(config: EngineConfig, model: ModelConfig) -> Grammars:
    args = config.args
    directory = find_model(args.tokenizer) if args.tokenizer else _directory(args)
    tokenizer = None if args.skip_tokenizer_init else directory / "tokenizer.json"
    return Grammars(tokenizer, model.vocab_size, model.eos_ids, config.drafts + 1)
