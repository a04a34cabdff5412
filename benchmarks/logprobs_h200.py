"""The engine compared with transformers on one device: log-probabilities of the sampled tokens.

    python benchmarks/logprobs_h200.py [--layers 8] [--out benchmarks/results/logprobs_h200.json]
    python benchmarks/logprobs_h200.py --kv-cache-dtype fp8_e4m3 --no-prefill-graphs
    python benchmarks/logprobs_h200.py --serve-only    # without transformers
    python benchmarks/logprobs_h200.py --tiny          # a tiny model, on any machine

27B shapes with seeded random weights, none of them zero. The engine serves more requests than it
has slots, so that prompts and decoding rows share steps, with MTP-1 whose drafts are really
verified (and, from random weights, mostly rejected), CUDA graphs on, and temperature 1. Each
request is then given to transformers as one sequence (teacher forcing), with the same weights
dequantised and, where the engine multiplies FP8, the inputs of those GEMMs rounded in the same way.

The reference is transformers in float32. The difference of transformers in bfloat16 from it is the
noise of the number format. The engine may differ by at most `LIMIT` times that (else exit status
1).
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_runs import closed_run, commit
from launches import WAYS, choose_launches
from model_shapes import write_config

from millrace.config import engine_args
from millrace.engine.engine import Engine
from millrace.kernels.gemm import dequantize
from millrace.kernels.quantize import quantize
from millrace.model.build import build_model
from millrace.model.config import read_config
from millrace.model.parameter import parameters_with_pieces
from millrace.model.tiny import TinyShape, config_json
from millrace.model.weights import random_weights
from millrace.protocol import AddRequest, SamplingParams, StepPlan
from millrace.replica.build import build_engine
from millrace.runtime.step.cuda_graphs import StepGraphs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = 0
LIMIT = 1.5  # times the noise, at the median and at the 99th percentile
Drawn = dict[str, tuple[list[int], list[int], list[float]]]  # prompt, tokens, log-probabilities


# --- the engine --------------------------------------------------------------------------------


def served(options: argparse.Namespace, directory: Path) -> tuple[Drawn, dict[str, Any]]:
    """What the engine drew, and how it ran."""
    launched = counted_launches()
    choose_launches(options.launches)
    engine = build_engine(
        engine_args(
            model=str(directory),
            load_format="dummy",
            seed=SEED,
            dtype="bfloat16",
            kv_cache_dtype=options.kv_cache_dtype,
            mamba_ssm_cache_dtype=options.state_dtype,
            max_model_len=512,
            max_num_seqs=options.rows,
            max_num_batched_tokens=options.chunk,
            gpu_memory_utilization=0.45,
            enable_prefix_caching=False,
            prefill_graphs=not options.no_prefill_graphs,
            speculative_config={"num_speculative_tokens": 1},
            **({} if DEVICE == "cuda" else {"kv_cache_memory_bytes": 1 << 28}),
        )
    )
    vocab = read_config(directory).vocab_size
    todo = drawn_requests(options.requests, vocab, options.tiny)
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[float]] = {}
    step = engine.step

    def noted() -> Any:
        deltas = step()
        for delta in deltas:
            tokens.setdefault(delta.id, []).extend(delta.token_ids)
            found = [position.logprobs[0] for position in delta.logprobs or []]
            logprobs.setdefault(delta.id, []).extend(found)
        return deltas

    engine.step = noted  # type: ignore[method-assign]
    try:
        trace = closed_run(engine, todo, options.rows)
        stats = engine.stats()
        largest = largest_state(engine)
    finally:
        engine.close()
    drawn = {r.id: (list(r.prompt), tokens[r.id], logprobs[r.id]) for r in todo}
    accepted = sum(stats.accepted_per_position)
    return drawn, {
        "drafts": stats.drafts,
        "accepted": accepted,
        "rows_not_finite": stats.rows_not_finite,
        **largest,
        "forwards": launched,
        "by_kind": trace.summary()["by_kind"],
    }


def largest_state(engine: Engine) -> dict[str, float]:
    """Of all states at the end of a run: the largest number, and how many are as large as a
    float16 can be, which is what larger ones become."""
    worker: Any = engine.worker
    worker = getattr(worker, "_worker", worker)  # behind what watches a run
    stacks = worker.runner._caches.stacks
    if "state" not in stacks:
        return {}
    states = stacks["state"]
    sizes = [layer.float().abs().nan_to_num(0.0) for layer in states]
    clamped = sum(int((size >= 65504).sum()) for size in sizes)
    return {"largest_state": float(max(size.max() for size in sizes)), "clamped_states": clamped}


def counted_launches() -> dict[str, int]:
    """How many steps with prompts run in graphs and how many do not, from now on."""
    found, forward = {"graph": 0, "eager": 0}, StepGraphs.forward

    def counted(self: StepGraphs, plan: StepPlan) -> bool:
        done = forward(self, plan)
        if plan.chunks:
            found["graph" if done else "eager"] += 1
        return done

    StepGraphs.forward = counted  # type: ignore[method-assign]
    return found


def drawn_requests(count: int, vocab: int, tiny: bool) -> list[AddRequest]:
    rng, found = random.Random(SEED), []
    longest = 48 if tiny else 320
    for number in range(count):
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, longest))]
        params = SamplingParams(
            temperature=1.0, max_tokens=rng.randint(8, 64), ignore_eos=True, seed=number, logprobs=0
        )
        found.append(AddRequest(f"r{number}", prompt, params))
    return found


# --- transformers ------------------------------------------------------------------------------


def published(directory: Path, fp8: bool) -> tuple[dict[str, Tensor], set[str]]:
    """The engine's weights by their published names, dequantised, and which of them were FP8."""
    model = build_model(
        read_config(directory), dtype=torch.bfloat16, device=DEVICE, max_len=8, mtp=True,
        keep_quantized=fp8,
    )  # fmt: skip
    random_weights(model, SEED)
    found: dict[str, Tensor] = {}
    for param, pieces in parameters_with_pieces(model):
        at = 0
        for piece in pieces:
            whole = found.get(piece.name)
            if whole is None:
                whole = torch.zeros(piece.shape, dtype=param.dtype, device=DEVICE)
                found[piece.name] = whole
            for start, stop in piece.rows:
                part = param[at : at + stop - start]
                if piece.offset:  # norms hold what multiplies
                    part = part - piece.offset
                whole[start:stop] = part.reshape(stop - start, *piece.shape[1:])
                at += stop - start
    found = {name: tensor for name, tensor in found.items() if not name.startswith("mtp.")}
    quantized = {name for name in found if f"{name}_scale_inv" in found}
    for name in quantized:
        found[name] = dequantize(found[name], found.pop(f"{name}_scale_inv"))
    return found, quantized


class Rounded(nn.Module):
    """A linear layer whose inputs are rounded to e4m3 by groups of 128, as the engine does it."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        reference: Any = quantize.__wrapped__  # type: ignore[attr-defined]
        rounded = reference(x.flatten(0, -2)).dequantize()
        result: Tensor = self.inner(rounded.view(x.shape).to(x.dtype))
        return result


def oracle(
    directory: Path, weights: dict[str, Tensor], quantized: set[str], dtype: torch.dtype
) -> Any:
    """The model of transformers with these weights."""
    sys.modules.setdefault("fla", None)  # type: ignore[arg-type]  # it tunes anew at every length
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = {name: tensor.to(dtype) for name, tensor in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [
        name for name in missing if name != "lm_head.weight" or not config.tie_word_embeddings
    ]
    if missing or unexpected:
        raise SystemExit(
            f"tensors do not match: missing {missing[:4]}, unexpected {unexpected[:4]}"
        )
    model.tie_weights()
    for name in quantized:
        parent = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        leaf = name.split(".")[-2]
        setattr(parent, leaf, Rounded(getattr(parent, leaf)))
    return model.eval()


@torch.inference_mode()
def forced(model: Any, drawn: Drawn, together: int = 16) -> Tensor:
    """The log-probability of every drawn token. Requests of like length share a forward; what
    fills up the shorter ones stands behind them, where no token of theirs looks."""
    pairs = [(prompt, tokens) for prompt, tokens, _ in drawn.values()]
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    for first in range(0, len(order), together):
        chosen = order[first : first + together]
        rows = [torch.tensor(pairs[i][0] + pairs[i][1]) for i in chosen]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(DEVICE)
        hidden = model.model(ids, use_cache=False).last_hidden_state
        for i, row in zip(chosen, hidden, strict=True):
            prompt, tokens = pairs[i]
            start = len(prompt) - 1
            logits = model.lm_head(row[start : start + len(tokens)]).float()
            wanted = torch.tensor(tokens, device=DEVICE)
            found[i] = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].cpu()
    return torch.cat(found)


# --- comparing ---------------------------------------------------------------------------------


def differences(got: Tensor, truth: Tensor) -> dict[str, float]:
    gap = (got.double() - truth.double()).abs()
    p50, p99 = gap.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return {"median": p50, "p99": p99, "most": gap.max().item()}


def compare(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    fp8 = DEVICE == "cuda"
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {what}", file=sys.stderr, flush=True)

    drawn, ran = served(options, directory)
    say("served")
    if options.serve_only:
        logprobs = [x for _, _, found in drawn.values() for x in found]
        sane = all(math.isfinite(x) and x <= 0.0 for x in logprobs)
        return {"tokens": len(logprobs), "right": sane and not ran["rows_not_finite"], **ran}
    gc.collect()
    if fp8:
        torch.cuda.empty_cache()
    weights, quantized = published(directory, fp8)
    say("weights dequantised")
    ours = torch.tensor([x for _, _, logprobs in drawn.values() for x in logprobs])
    found: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = oracle(directory, weights, quantized, dtype)
        say(f"{dtype} built")
        found[str(dtype)] = forced(model, drawn)
        say(f"{dtype} forced")
        del model
        gc.collect()
    truth = found["torch.float32"]
    noise, error = differences(found["torch.bfloat16"], truth), differences(ours, truth)
    right = all(error[name] <= LIMIT * noise[name] for name in ("median", "p99"))
    return {
        "tokens": len(ours),
        "requests": len(drawn),
        "rounded_inputs": len(quantized),
        "noise_of_bfloat16": noise,
        "engine": error,
        "right": right,
        **ran,
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--requests", type=int, default=384)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--no-prefill-graphs", action="store_true")
    parser.add_argument("--state-dtype", default="auto")
    parser.add_argument("--launches", choices=WAYS, default="default", help="of kernels")
    parser.add_argument("--serve-only", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.rows, options.requests, options.chunk = 8, 20, 64
    return options


def main() -> None:
    options = parse_options()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent)
        if options.tiny:
            config = json.dumps(config_json(TinyShape(fp8=True)))
            (directory / "config.json").write_text(config)
        else:
            write_config(directory, options.layers)
        found = compare(options, directory)
    found["commit"] = commit()
    found["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    text = json.dumps(found, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    names = ("noise_of_bfloat16", "engine", "largest_state", "clamped_states", "rows_not_finite")
    print(json.dumps({name: found.get(name) for name in names}))
    sys.exit(0 if found["right"] else 1)


if __name__ == "__main__":
    main()
