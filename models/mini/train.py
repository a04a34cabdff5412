"""Trains millrace-mini: the model with its first MTP step, then the MTP head alone, 5 steps ahead.

    python models/mini/train.py --directory models/millrace-mini --out OUT
    python models/mini/train.py --model millrace-mini-moe --directory models/millrace-mini --out OUT

Needs one GPU for minutes (a CPU is enough for a trial of a few steps). Writes OUT/part-*.bin (the
weights in fp32, cut into files of 15 MiB, which --resume OUT continues from), OUT/log.json and
OUT/heldout.json; `export.py` makes the model directory of them. Momentum is not saved: a resumed
run warms up again.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from data import ANSWER, PROMPT, rows, template
from generate import evaluate
from model import SHAPES, Mini, Packing, imbalance
from optimizer import make_optimizers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

PART_BYTES = 15 * 2**20
MTP_STEPS = 5


@dataclass
class Settings:
    """The hyperparameters. steps, mtp_steps: of the two phases."""

    steps: int = 4200
    mtp_steps: int = 600
    batch: int = 64
    length: int = 1024
    lr: float = 3e-3
    mtp_lr: float = 2e-3
    decay: float = 0.05
    warmup: int = 150
    hold: float = 0.3  # share of a phase at full rate; then it falls in a straight line to 1%
    mtp_weight: float = 0.2
    balance_weight: float = 0.01  # of the experts' imbalance
    prompt_weight: float = 0.1  # falls to nothing over the first half of the first phase
    math_share: float = 0.4
    unlisted: float = 0.0  # share of policies whose names, numbers and phrases are of any spelling
    seed: int = 1


@dataclass
class Progress:
    """What has been done, for the log and for going on."""

    phase: str = "main"
    step: int = 0
    log: list[dict[str, float | str]] = field(default_factory=list)


class Batches(IterableDataset):
    """Batches [3, B, L] (ids, documents, kinds); each worker draws its own."""

    def __init__(self, directory: Path, s: Settings, seed: int) -> None:
        self.directory, self.s, self.seed = directory, s, seed

    def __iter__(self) -> Iterator[Tensor]:
        torch.set_num_threads(1)
        info = get_worker_info()
        tokenizer = Tokenizer.from_file(str(self.directory / "tokenizer.json"))
        seed = self.seed * 1000 + (info.id if info else 0)
        drawn = rows(tokenizer, seed, self.s.length, self.s.math_share, self.s.unlisted)
        while True:
            batch = [next(drawn) for _ in range(self.s.batch)]
            yield torch.stack(
                [
                    torch.stack([torch.from_numpy(getattr(row, name)) for row in batch])
                    for name in ("ids", "documents", "kinds")
                ]
            )


def batches(directory: Path, s: Settings, seed: int, workers: int) -> Iterator[Tensor]:
    loader = DataLoader(
        Batches(directory, s, seed),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


Draw = Callable[[Path, Settings, int, int], Iterator[Tensor]]


def rate(step: int, total: int, s: Settings) -> float:
    """The learning rate's factor at a step of a phase."""
    warm = min(1.0, (step + 1) / s.warmup)
    left = (total - step) / max(1.0, total * (1 - s.hold))
    return warm * max(0.01, min(1.0, left))


# --- losses --------------------------------------------------------------------------------------


@dataclass
class Batch:
    """A batch on the device. weights: of each row's next token as a target."""

    ids: Tensor
    packing: Packing
    targets: Tensor
    weights: Tensor

    @classmethod
    def of(cls, raw: Tensor, device: torch.device, prompt_weight: float) -> Batch:
        ids, documents, kinds = raw.to(device, non_blocking=True).long()
        following = F.pad(kinds, (0, 1))[:, 1:]
        same = documents == F.pad(documents, (0, 1))[:, 1:]
        weights = (following == ANSWER).float() + prompt_weight * (following == PROMPT).float()
        return cls(ids, Packing.of(documents), F.pad(ids, (0, 1))[:, 1:], weights * same)


def _cross_entropy(hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    rows, wanted, weight = hidden.flatten(0, 1), targets.flatten(), weights.flatten()
    if not rows.is_cuda:  # most logits are of no weight; a GPU is faster with a fixed shape
        chosen = weight > 0
        rows, wanted, weight = rows[chosen], wanted[chosen], weight[chosen]
    losses = F.cross_entropy(F.linear(rows, embedding).float(), wanted, reduction="none")
    return (losses * weight).sum() / weight.sum().clamp(min=1)


def main_loss(model: Mini, batch: Batch, s: Settings) -> tuple[Tensor, dict[str, Tensor]]:
    hidden, _, loads = model.hidden(batch.ids, batch.packing)
    embedding = model.model.embed_tokens.weight
    loss = _cross_entropy(hidden, embedding, batch.targets, batch.weights)
    if not s.mtp_weight and not model.shape.experts:
        return loss, {"loss": loss.detach()}
    (draft,), of_head = model.drafts(batch.ids, hidden, batch.packing, 1)
    mtp = _cross_entropy(draft, embedding, batch.targets, batch.weights)
    report = {"loss": loss.detach(), "mtp_1": mtp.detach()}
    total = loss + s.mtp_weight * mtp + _balance(model, loads + of_head, s, report)
    return total, report


def _balance(model: Mini, loads: list[Tensor], s: Settings, report: dict[str, Tensor]) -> Tensor:
    """The auxiliary loss, weighted; the largest share of a layer's choices, 1 if even, to report.

    Nothing of a model without experts.
    """
    if not model.shape.experts:
        return loads[0].new_zeros(())
    shares = torch.stack([load.detach()[:, 1] for load in loads])
    report["largest_share"] = shares.max() * model.shape.experts
    report["smallest_share"] = shares.min() * model.shape.experts
    return s.balance_weight * imbalance(loads)


def mtp_loss(model: Mini, batch: Batch, s: Settings) -> tuple[Tensor, dict[str, Tensor]]:
    """Each step's cross-entropy against what the model itself would say, over the answers."""
    with torch.no_grad():
        hidden, _, _ = model.hidden(batch.ids, batch.packing)
        chosen = batch.weights.flatten() > 0
        said = model.logits(hidden.flatten(0, 1)[chosen]).float()
        wanted, best = said.softmax(-1), said.argmax(-1)
    report: dict[str, Tensor] = {}
    drafts, loads = model.drafts(batch.ids, hidden, batch.packing, MTP_STEPS)
    total = _balance(model, loads, s, report)
    for step, out in enumerate(drafts, start=1):
        logits = model.logits(out.flatten(0, 1)[chosen]).float()
        total = total - 0.9**step * (wanted * logits.log_softmax(-1)).sum(-1).mean()
        report[f"agree_{step}"] = (logits.argmax(-1) == best).float().mean()
    return total, report


# --- phases --------------------------------------------------------------------------------------


class Trainer:
    """draw: (directory, settings, seed, workers) -> batches without end."""

    def __init__(
        self, model: Mini, args: argparse.Namespace, s: Settings, draw: Draw = batches
    ) -> None:
        self.model, self.args, self.s, self.draw = model, args, s, draw
        self.device = next(model.parameters()).device
        self.began = time.monotonic()
        self.progress = Progress()

    def run_phase(self, phase: str, total: int, deadline: float | None, seed: int) -> None:
        """deadline: seconds since the start by which to be done; steps are cut to meet it."""
        s, model = self.s, self.model
        for p in model.model.parameters():
            p.requires_grad_(phase == "main")
        optimizers = make_optimizers(model, s.lr if phase == "main" else s.mtp_lr, s.decay)
        base = [group["lr"] for o in optimizers for group in o.param_groups]
        source = self.draw(self.args.directory, s, seed, self.args.workers)
        step, timed = 0, (0, 0.0)
        while step < total:
            factor = rate(step, total, s)
            for group, lr in zip(
                (g for o in optimizers for g in o.param_groups), base, strict=True
            ):
                group["lr"] = lr * factor
            report = self._step(phase, next(source), optimizers, max(0.0, 1 - 2 * step / total))
            step += 1
            if step % 50 == 0 or step == total:
                self._log(phase, step, total, factor, report)
            if deadline and step in (50, 250, 1000):
                now = time.monotonic() - self.began
                if step > 50:
                    speed = (step - timed[0]) / (now - timed[1])
                    total = min(total, step + int((deadline - now) * speed))
                timed = (step, now)
        del source

    def _step(
        self, phase: str, raw: Tensor, optimizers: list[torch.optim.Optimizer], prompt: float
    ) -> dict[str, Tensor]:
        main = phase == "main"
        s, losses = self.s, main_loss if main else mtp_loss
        batch = Batch.of(raw, self.device, s.prompt_weight * prompt if main else 0.0)
        cuda = self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=cuda):
            loss, report = losses(self.model, batch, s)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return report

    def _log(
        self, phase: str, step: int, total: int, factor: float, report: dict[str, Tensor]
    ) -> None:
        values = {name: round(float(value), 5) for name, value in report.items()}
        seconds = round(time.monotonic() - self.began, 1)
        entry = {
            "phase": phase,
            "step": step,
            "seconds": seconds,
            "rate": round(factor, 4),
            **values,
        }
        self.progress.log.append(entry)
        if step % 250 == 0 or step <= 100 or step == total:
            print(f"{phase} {step}/{total} {seconds}s rate {factor:.3f} {values}", flush=True)


# --- files ---------------------------------------------------------------------------------------


def save(model: Mini, log: list[dict[str, float | str]], s: Settings, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, buffer)
    data = buffer.getvalue()
    for part, first in enumerate(range(0, len(data), PART_BYTES)):
        (out / f"part-{part}.bin").write_bytes(data[first : first + PART_BYTES])
    (out / "log.json").write_text(json.dumps({"settings": vars(s), "log": log}))


def load(out: Path) -> dict[str, Tensor]:
    """The weights that a run has written, or those of a model directory."""
    if (out / "model.safetensors").exists():
        return joined(load_file(out / "model.safetensors"))
    parts = sorted(out.glob("part-*.bin"), key=lambda p: int(p.stem.split("-")[1]))
    data = b"".join(part.read_bytes() for part in parts)
    weights: dict[str, Tensor] = torch.load(io.BytesIO(data), map_location="cpu")
    return weights


MTP_EXPERTS = re.compile(r"(mtp\..*\.experts)\.0\.down_proj\.weight")


def joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The MTP head's experts, which a checkpoint has one by one, in the two tensors of `model.py`.

    `export.split_experts` is the inverse.
    """
    made = dict(weights)
    for stem in [match[1] for match in map(MTP_EXPERTS.fullmatch, weights) if match]:
        experts = range(sum(name.startswith(stem) for name in weights) // 3)
        gate, up, down = (
            torch.stack([made.pop(f"{stem}.{expert}.{part}_proj.weight") for expert in experts])
            for part in ("gate", "up", "down")
        )
        made[f"{stem}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        made[f"{stem}.down_proj"] = down
    return made


def heldout(model: Mini, args: argparse.Namespace) -> None:
    """Greedy answers of the weights rounded to bf16, as they ship."""
    rounded = copy.deepcopy(model).to(torch.bfloat16).eval()
    tokenizer = Tokenizer.from_file(str(args.directory / "tokenizer.json"))
    results = {}
    for task in ("policy", "math", "chat"):
        began = time.monotonic()
        count = args.items if task != "chat" else min(args.items, 200)
        score = evaluate(rounded, tokenizer, template(), task, count, MTP_STEPS, batch=512)
        results[task] = score.summary()
        print(task, json.dumps(results[task]), f"{time.monotonic() - began:.1f}s", flush=True)
        for question, answer, text in score.wrong[:3]:
            print("WRONG", repr(question[-80:]), "\n  want", answer, "\n  said", text, flush=True)
    (args.out / "heldout.json").write_text(json.dumps(results, indent=1))


def parse(description: str = "") -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(description=description or __doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="millrace-mini")
    parser.add_argument("--directory", type=Path, required=True, help="where tokenizer.json is")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--resume", type=Path, help="an earlier --out, or a model directory, to go on from"
    )
    parser.add_argument("--seconds", type=float, help="cut the steps to be done by then")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--items", type=int, default=1000, help="held-out items a task")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    return args, Settings(**{name: getattr(args, name) for name in vars(Settings())})


def train(args: argparse.Namespace, s: Settings, draw: Draw = batches) -> Mini:
    """Both phases; their weights are in args.out, and in the model that comes back."""
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(s.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Mini(SHAPES[args.model]).to(device)
    if args.resume:
        model.load_state_dict(load(args.resume))
    trainer = Trainer(model, args, s, draw)
    if args.compile:
        torch._dynamo.config.cache_size_limit = 32
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        model.mtp.compile(dynamic=False)
        global _cross_entropy
        _cross_entropy = torch.compile(_cross_entropy, dynamic=False)
    if s.steps:
        until = args.seconds * 0.78 if args.seconds else None
        trainer.run_phase("main", s.steps, until, s.seed)
        save(model, trainer.progress.log, s, args.out)
    if s.mtp_steps:
        trainer.run_phase("mtp", s.mtp_steps, args.seconds, s.seed + 1)
        save(model, trainer.progress.log, s, args.out)
    return model


def main() -> None:
    args, s = parse()
    model = train(args, s)
    if args.items:
        fresh = Mini(model.shape).to(next(model.parameters()).device)
        fresh.load_state_dict(model.state_dict())
        heldout(fresh, args)


if __name__ == "__main__":
    main()
