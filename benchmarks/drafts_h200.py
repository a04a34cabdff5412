"""Drafts on one GPU: looked up against those of the head, and the depth that is chosen by itself.

Seeded random weights in the shapes of Qwen3.5-27B-FP8, as in h200_throughput.py.

    python benchmarks/drafts_h200.py --phases lookup                   # some 4 minutes on an H200
    python benchmarks/drafts_h200.py --phases depth --drafts 1,auto    # some 6 minutes
    python benchmarks/drafts_h200.py --phases depth --drafts 3         # some 3 minutes
    python benchmarks/drafts_h200.py --phases answers                  # on a CPU
    python benchmarks/drafts_h200.py --tiny --phases lookup,depth      # small, on any machine

"lookup": one stream that says a given text, token by token, whatever random weights would say: an
edit of a source file of this tree that is in the prompt, quotes from a page of its documentation
that is in the prompt, and a page that has little in common with its prompt. Every step computes all
that it would. What is looked up is accepted as the text decides; a draft of the head is made the
right one with the probability --acceptance. Tokens are those of the models that ship, which has
shorter tokens than Qwen's: the same text has more of them.

"answers": the model that ships answers policy questions, sums and greetings one at a time, with its
own drafts and real look-ups: tokens a step, and acceptance by method and position.

"depth": prompts of 8,192 random tokens with 1,024 of output, drafts accepted with the probability
--depth-acceptance each, for numbers of streams, drafts fixed or chosen by the engine.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_runs import closed_run, commit, requests, synchronize
from h200_throughput import BASE, TINY_ARGS, model_directory

from millrace.config import engine_args
from millrace.engine.engine import Engine
from millrace.eval.models import GenerationOptions, InProcess
from millrace.kernels.sampling import gumbel
from millrace.protocol import AddRequest, SamplingParams
from millrace.replica.build import build_engine
from millrace.runtime.step.inputs import SampledRows
from millrace.runtime.step.sampler import Sampler
from millrace.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "models" / "millrace-mini"
TOKENIZER = MINI / "tokenizer.json"
LOOKUPS: dict[str, dict[str, Any]] = {
    "mtp-1": {"num_speculative_tokens": 1},
    "suffix": {"method": "suffix"},
    "mtp-1 + suffix": {"num_speculative_tokens": 1, "lookup": "suffix"},
    "mtp auto + suffix": {"num_speculative_tokens": "auto", "lookup": "suffix"},
    "mtp auto": {"num_speculative_tokens": "auto"},
}
LUCK = 1 << 41  # positions of the noise that decides whether a draft is made the right one


# --- a model that says a given text ------------------------------------------------------------


class Script:
    """Makes samplers draw given tokens: of every slot the one at its position.

    It works inside graphs, so engines must be built while it is installed.
    """

    def __init__(self, acceptance: float) -> None:
        self.acceptance, self.table = acceptance, torch.zeros(0)
        self._init, self._targets, self._draft = Sampler.__init__, Sampler.targets, Sampler.draft

    def __enter__(self) -> Script:
        script = self

        def init(sampler: Sampler, *given: Any) -> None:
            script._init(sampler, *given)  # type: ignore[arg-type]
            script.table = torch.full_like(sampler._slots.tokens, -1)

        def targets(sampler: Sampler, hidden: Tensor, context: int, rows: SampledRows, *rest: Any):  # type: ignore[no-untyped-def]
            drawn, logprobs = script._targets(sampler, hidden, context, rows, *rest)
            slots, positions, _ = rows.candidates()
            said = script._said(slots, positions + 1)
            return torch.where(said >= 0, said, drawn.flatten()).view_as(drawn), logprobs

        def draft(sampler: Sampler, hidden: Tensor, positions: Tensor, rows: SampledRows) -> Tensor:
            drafted = script._draft(sampler, hidden, positions, rows)
            said = script._said(rows.slots, positions)
            noise = gumbel(rows.slots, positions + LUCK, 1)[:, 0]
            right = torch.exp(-torch.exp(-noise)) < script.acceptance
            return torch.where(right & (said >= 0), said, drafted)

        Sampler.__init__ = init  # type: ignore[method-assign]
        Sampler.targets, Sampler.draft = targets, draft  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Sampler.__init__ = self._init  # type: ignore[method-assign]
        Sampler.targets, Sampler.draft = self._targets, self._draft  # type: ignore[method-assign]

    def _said(self, slots: Tensor, positions: Tensor) -> Tensor:
        """The tokens of the text: int64, -1 behind its end."""
        return self.table[slots, positions.clamp(max=self.table.shape[1] - 1)]

    def write(self, tokens: list[int]) -> None:
        """What every slot says, from position 0 on."""
        self.table.fill_(-1)
        self.table[:, : len(tokens)] = torch.tensor(tokens, device=self.table.device)


def texts(length: int, output: int, vocab: int) -> dict[str, tuple[list[int], list[int]]]:
    """By name: tokens of a prompt of at most `length`, and of an output of at most `output`."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(TOKENIZER)).encode
    source = (ROOT / "src/millrace/engine/scheduler.py").read_text()
    page = (ROOT / "docs/operations.md").read_text()
    other = (ROOT / "docs/gateway.md").read_text()
    edited = re.sub(r"\brequests?\b", "job", source).replace("Scheduler", "StepScheduler")
    sentences = re.findall(r"[A-Z][^.|`]{60,}\.", page[: 3 * length])
    notes = ("This decides the case", "See also the terms", "The rule is clear", "Not excluded")
    quotes = "\n".join(
        f'{{"clause": {at}, "quote": "{one.strip()}", "note": "{notes[at % 4]}"}}'
        for at, one in enumerate(sentences[::2])
    )

    def pair(given: str, said: str) -> tuple[list[int], list[int]]:
        ids = [[token % vocab for token in encode(text).ids] for text in (given, said)]
        return ids[0][:length], ids[1][:output]

    return {"edit": pair(source, edited), "quotes": pair(page, quotes), "other": pair(page, other)}


# --- phases ------------------------------------------------------------------------------------


def lookup(options: argparse.Namespace, model: Path, out: dict[str, Any]) -> None:
    """Output tokens a second of one stream, by text and method, by turns within an engine."""
    length, output = (300, 60) if options.tiny else (4096, 1024)
    said = texts(length, output, 2000 if options.tiny else 1 << 17)
    for name, speculative in LOOKUPS.items():
        with Script(options.acceptance) as script:
            engine = build(options, model, max_num_seqs=1, speculative_config=speculative)
            found: dict[str, Any] = {}
            for repeat in range(1 + options.repeats):
                for text, (prompt, answer) in said.items():
                    script.write(prompt + answer)
                    figures = one_stream(engine, f"{text} {repeat}", prompt, len(answer))
                    if repeat:
                        found.setdefault(text, []).append(figures)
            engine.close()
        out[name] = {text: middle(runs) for text, runs in found.items()}
        print(name, json.dumps(out[name]), flush=True)
    base = out["mtp-1"]
    for name in LOOKUPS:
        ratios = {t: round(out[name][t]["tok_s"] / base[t]["tok_s"], 2) for t in said}
        print(f"{name}: {ratios} times mtp-1", flush=True)


def one_stream(engine: Engine, name: str, prompt: list[int], output: int) -> dict[str, float]:
    """Tokens a second from the first token on, tokens a step, and milliseconds of a step."""
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    engine.add(AddRequest(name, prompt, params))
    synchronize()
    arrivals: list[tuple[float, int]] = []
    while engine.has_work():
        lengths = [len(delta.token_ids) for delta in engine.step()]
        arrivals += [(time.perf_counter(), count) for count in lengths]
    tokens = sum(count for _, count in arrivals[1:])
    seconds = arrivals[-1][0] - arrivals[0][0]
    steps = len(arrivals) - 1
    return {
        "tok_s": tokens / seconds,
        "tokens_a_step": tokens / steps,
        "step_ms": 1e3 * seconds / steps,
    }


def answers(options: argparse.Namespace, model: Path, out: dict[str, Any]) -> None:
    """Tokens a step of the model that ships, by task and method; greedy, so they never vary."""
    count = 1 if options.tiny else 4
    for name, speculative in LOOKUPS.items():
        for task in ("policy", "math", "chat"):
            items = [TASKS[task].make(index, 0, "heldout") for index in range(count)]
            given = {"dtype": "float32", "max_model_len": 2048, "speculative_config": speculative}
            runs = InProcess(str(MINI), concurrency=1, **given)
            before = runs.stats()
            list(runs.generate(items, GenerationOptions()))
            stats = runs.stats()
            runs.close()
            decoded = stats.generated_tokens - before.generated_tokens - count
            rows = sum(stats.steps_by_depth.values()) - sum(before.steps_by_depth.values())
            found: dict[str, Any] = {"tokens_a_step": round(decoded / rows, 2)}
            for method, one in stats.draft_methods.items():
                shares = [round(n / max(one.drafts, 1), 2) for n in one.accepted]
                found[method] = {"rows": one.drafts, "accepted": shares}
            out.setdefault(name, {})[task] = found
            print(f"{name}, {task}: {json.dumps(found)}", flush=True)


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}


def depth(options: argparse.Namespace, model: Path, out: dict[str, Any]) -> None:
    """Throughput and time per output token, by number of streams and of drafts."""
    streams = {1: 1, 2: 4} if options.tiny else {1: 2, 16: 32, 64: 128}
    inputs, output = (64, 48) if options.tiny else (8192, 1024)
    for drafts in options.drafts.split(","):
        k = "auto" if drafts == "auto" else int(drafts)
        spec = {"num_speculative_tokens": k, "synthetic_acceptance": options.depth_acceptance}
        more = {} if options.tiny else {"max_num_batched_tokens": 8192}
        engine = build(
            options, model, max_num_seqs=max(streams), speculative_config=spec,
            **({} if options.tiny else {"max_model_len": 9472}), **more,
        )  # fmt: skip
        vocab = 2000 if options.tiny else 248_000
        warm = requests(2, 1, (inputs, inputs), (16, 16), vocab)
        closed_run(engine, warm, 2)
        for rows, count in streams.items():
            before = engine.stats().steps_by_depth
            todo = requests(count, rows, (inputs, inputs), (output, output), vocab)
            trace = closed_run(engine, todo, rows)
            tpot = [
                (seen[-1][0] - seen[0][0]) / (sum(n for _, n in seen) - seen[0][1])
                for seen in trace.arrivals.values()
            ]
            now = engine.stats().steps_by_depth
            found = {
                "total_tok_s": round(trace.summary()["total_tok_s"], 1),
                "tpot_ms": round(1e3 * statistics.median(tpot), 3),
                "steps_by_depth": {d: n - before.get(d, 0) for d, n in sorted(now.items())},
            }
            out.setdefault(drafts, {})[str(rows)] = found
            print(f"drafts {drafts}, {rows} streams: {json.dumps(found)}", flush=True)
        engine.close()


def build(options: argparse.Namespace, model: Path, **arguments: Any) -> Engine:
    given = {**BASE, "max_model_len": 6144, **(TINY_ARGS if options.tiny else {}), **arguments}
    return build_engine(engine_args(model=str(model), **given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phases", default="lookup,depth")
    parser.add_argument("--drafts", default="1,3,auto", help="of the phase depth")
    parser.add_argument("--acceptance", type=float, default=0.9)
    parser.add_argument("--depth-acceptance", type=float, default=0.85)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir(), "drafts.json"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens")
    options = parser.parse_args()
    options.model, options.quantization = "qwen3.5-27b", "fp8"
    logging.basicConfig(format="%(name)s %(message)s")
    logging.getLogger("millrace").setLevel(logging.INFO)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    out: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    out |= {"commit": commit(), "device": device, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as parent:
        model = model_directory(options, Path(parent))
        for name in options.phases.split(","):
            run = {"lookup": lookup, "depth": depth, "answers": answers}[name]
            run(options, model, out.setdefault(name, {}))
            options.out.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
