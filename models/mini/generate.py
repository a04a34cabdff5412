"""Greedy generation in batches, held-out accuracy, and how many MTP drafts would be accepted.

A simple check of a checkpoint during training; Millrace serves the finished model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jinja2 import Template
from model import CHUNK, Attention, DeltaNet, Layer, Mini, Packing
from tokenizers import Tokenizer
from torch import Tensor

from millrace.tasks import TASKS, make_items
from millrace.tasks.items import Item

Cache = list[tuple[Tensor, Tensor]]


@dataclass
class Prompts:
    """Prompts padded on the left to one length, and which tokens are real (1) or padding (0)."""

    ids: Tensor
    real: Tensor

    @classmethod
    def of(cls, prompts: list[list[int]], device: torch.device) -> Prompts:
        length = -(-max(map(len, prompts)) // CHUNK) * CHUNK
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        real = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            real[row, length - len(prompt) :] = 1
        return cls(ids.to(device), real.to(device))


def _attention_step(
    layer: Attention, x: Tensor, cache: tuple[Tensor, Tensor], at: int, mask: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    q, k, v, gate = layer.heads(x, torch.tensor([at], device=x.device))
    cache[0][:, :, at : at + 1], cache[1][:, :, at : at + 1] = k, v
    out = F.scaled_dot_product_attention(q, *cache, attn_mask=mask)
    return layer.finish(out, gate), cache


def _recurrent_step(
    layer: DeltaNet, x: Tensor, cache: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    state, earlier = cache
    inputs = torch.cat((earlier, layer.in_proj_qkv(x)), dim=1)
    weight = layer.conv1d.weight[:, 0].float().T
    q, k, v = layer.split(F.silu((inputs.float() * weight).sum(1, keepdim=True)))
    log_decay, beta = layer.gates(x)
    state = state * log_decay.transpose(1, 2).exp()[..., None]
    update = beta.transpose(1, 2)[..., None] * (v - k @ state)
    state = state + k.transpose(-1, -2) * update
    return layer.finish((q @ state).transpose(1, 2), x), (state, inputs[:, 1:])


def _step(model: Mini, token: Tensor, caches: Cache, at: int, mask: Tensor) -> Tensor:
    x = model.model.embed_tokens(token)[:, None]
    for i, layer in enumerate(model.model.layers):
        assert isinstance(layer, Layer)
        normed = layer.input_layernorm(x)
        if isinstance(layer.mixer, Attention):
            mixed, caches[i] = _attention_step(layer.mixer, normed, caches[i], at, mask)
        else:
            mixed, caches[i] = _recurrent_step(layer.mixer, normed, caches[i])
        x = x + mixed
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.logits(model.model.norm(x)[:, 0])


@torch.inference_mode()
def greedy(model: Mini, prompts: Prompts, stop: int, limit: int) -> Tensor:
    """Prompts and what follows them; a sequence that has stopped repeats the stop token."""
    length = prompts.ids.shape[1]
    hidden, caches, _ = model.hidden(prompts.ids, Packing.of(prompts.real))
    token = model.logits(hidden[:, -1]).argmax(-1)
    for i, layer in enumerate(model.model.layers):
        if layer.attention:
            caches[i] = tuple(F.pad(c, (0, 0, 0, limit)) for c in caches[i])
    mask = F.pad(prompts.real.bool(), (0, limit))[:, None, None]
    tokens, done = [token], token == stop
    for at in range(length, length + limit - 1):
        if done.all():
            break
        mask[..., at] = True
        token = _step(model, token, caches, at, mask).argmax(-1)
        token = torch.where(done, stop, token)
        done = done | (token == stop)
        tokens.append(token)
    return torch.cat((prompts.ids, torch.stack(tokens, dim=1)), dim=1)


@torch.inference_mode()
def acceptance(model: Mini, ids: Tensor, real: Tensor, start: int, stop: int, k: int) -> Tensor:
    """[k, 2]: for each draft position, chains accepted so far and chains that came that far.

    ids: prompts and greedy answers from `start` on. Every token of an answer starts a chain.
    """
    pad = -ids.shape[1] % CHUNK
    ids, real = (
        F.pad(ids, (0, pad), value=stop),
        F.pad(real, (0, ids.shape[1] + pad - start), value=1),
    )
    packing = Packing.of(real)
    hidden, _, _ = model.hidden(ids, packing)
    target = F.pad(ids, (0, 1))[:, 1:]
    ended = (ids[:, start:] == stop).cumsum(1) > 0
    counts = torch.zeros(k, 2, dtype=torch.long)
    alive = torch.ones_like(ids[:, start:], dtype=torch.bool)
    for step, out in enumerate(model.drafts(ids, hidden, packing, k)[0]):
        right = model.logits(out).argmax(-1) == target
        shifted = F.pad(right, (0, step))[
            :, start + step :
        ]  # the chain begun at row j is at j+step
        valid = ~F.pad(ended, (0, step), value=True)[:, step:]
        counts[step, 1] += (alive & valid).sum().cpu()
        alive = alive & shifted
        counts[step, 0] += (alive & valid).sum().cpu()
    return counts


# --- held-out accuracy ----------------------------------------------------------------------------


def encode_item(tokenizer: Tokenizer, render: Template, item: Item) -> list[int]:
    prompt = render.render(
        messages=item.messages, tools=item.tools, add_generation_prompt=True, enable_thinking=True
    )
    return tokenizer.encode(prompt, add_special_tokens=False).ids


@dataclass
class Score:
    """Counts over one task, by kind of question, and the MTP table of its answers."""

    right: dict[str, list[int]]
    fields: list[int]
    drafts: Tensor
    wrong: list[tuple[str, str, str]]

    def summary(self) -> dict[str, object]:
        total = [sum(c[i] for c in self.right.values()) for i in (0, 1)]
        return {
            "right": total,
            "by_kind": self.right,
            "fields": self.fields,
            "drafts_accepted_by_position": self.drafts.tolist(),
        }


def evaluate(
    model: Mini, tokenizer: Tokenizer, render: Template, task: str, count: int, k: int, batch: int
) -> Score:
    """The first held-out items of a task, longest prompts first so that batches are even."""
    device = next(model.parameters()).device
    stop = tokenizer.token_to_id("<|im_end|>")
    items = make_items(task, count, seed=0)
    todo = sorted(((encode_item(tokenizer, render, i), i) for i in items), key=lambda p: -len(p[0]))
    score = Score({}, [0, 0], torch.zeros(k, 2, dtype=torch.long), [])
    for first in range(0, count, batch):
        part = todo[first : first + batch]
        prompts = Prompts.of([ids for ids, _ in part], device)
        length = prompts.ids.shape[1]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            ids = greedy(model, prompts, stop, TASKS[task].max_tokens)
            score.drafts += acceptance(model, ids, prompts.real, length, stop, k)
        for (_, item), row in zip(part, ids[:, length:].tolist(), strict=True):
            said = row[: row.index(stop)] if stop in row else row
            _count(score, item, tokenizer.decode(said, skip_special_tokens=False))
    return score


def _count(score: Score, item: Item, text: str) -> None:
    grade = TASKS[item.task].grade(item, text)
    kind = score.right.setdefault(item.kind, [0, 0])
    kind[0] += grade.correct
    kind[1] += 1
    score.fields[0] += sum(grade.fields.values())
    score.fields[1] += len(grade.fields)
    if not grade.correct:
        score.wrong.append((str(item.messages[-1]["content"]), item.answer, text))
