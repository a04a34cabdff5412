"""The MTP head against a second implementation, written out from its definition.

`transformers` leaves the head out, so this one is the oracle: no cache, no fusing, one loop a
thing, straight from the published tensors, in float64.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from millrace.model.config import ModelConfig
from millrace.model.tiny import UNIT_TEST, TinyShape, moe_config_json
from tests.oracle.conftest import MakePair, Pair
from tests.support.driver import make_batch

SHAPES = [
    UNIT_TEST,
    dataclasses.replace(UNIT_TEST, num_heads=3, num_kv_heads=1, head_dim=16, tied=False),
    moe_config_json(),
]


class WrittenOutHead:
    """Drafts by definition. Token j's row sees the rows 1 .. j."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self.tensors = {
            k: v.double() for k, v in load_file(directory / "model.safetensors").items()
        }
        self.config = config

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = 1 + self.tensors[name]
        return x / (x.square().mean() + self.config.eps).sqrt() * weight

    def rotate(self, head: Tensor, position: int) -> Tensor:
        c, out = self.config, head.clone()
        half = c.rotary_dim // 2
        for i in range(half):
            angle = position / c.rope_theta ** (2 * i / c.rotary_dim)
            x, y = head[i], head[i + half]
            out[i] = x * math.cos(angle) - y * math.sin(angle)
            out[i + half] = y * math.cos(angle) + x * math.sin(angle)
        return out

    def drafts(self, tokens: list[int], hidden: list[Tensor]) -> list[Tensor]:
        """tokens[i] is at position i + 1, and hidden[i] belongs to position i."""
        c, t, layer = self.config, self.tensors, "mtp.layers.0"
        streams, queries, gates, keys, values = [], [], [], [], []
        for index, (token, before) in enumerate(zip(tokens, hidden, strict=True)):
            embedded = self.norm(
                t["model.embed_tokens.weight"][token], "mtp.pre_fc_norm_embedding.weight"
            )
            known = self.norm(before.double(), "mtp.pre_fc_norm_hidden.weight")
            stream = t["mtp.fc.weight"] @ torch.cat([embedded, known])
            x = self.norm(stream, f"{layer}.input_layernorm.weight")
            attn, position = f"{layer}.self_attn", index + 1
            both = (t[f"{attn}.q_proj.weight"] @ x).view(c.num_heads, 2, c.head_dim)
            k = (t[f"{attn}.k_proj.weight"] @ x).view(c.num_kv_heads, c.head_dim)
            queries.append(
                [self.rotate(self.norm(q, f"{attn}.q_norm.weight"), position) for q in both[:, 0]]
            )
            keys.append([self.rotate(self.norm(h, f"{attn}.k_norm.weight"), position) for h in k])
            values.append((t[f"{attn}.v_proj.weight"] @ x).view(c.num_kv_heads, c.head_dim))
            streams.append(stream)
            gates.append(both[:, 1])
        return [
            self.finish(streams[i], queries[i], gates[i], keys[: i + 1], values[: i + 1])
            for i in range(len(tokens))
        ]

    def finish(
        self,
        stream: Tensor,
        queries: list[Tensor],
        gate: Tensor,
        keys: list[list[Tensor]],
        values: list[Tensor],
    ) -> Tensor:
        c, t, layer = self.config, self.tensors, "mtp.layers.0"
        heads = []
        for h, query in enumerate(queries):
            kv = h // (c.num_heads // c.num_kv_heads)
            scores = torch.stack([query @ k[kv] for k in keys]) / math.sqrt(c.head_dim)
            mixed = sum(p * v[kv] for p, v in zip(scores.softmax(0), values, strict=True))
            heads.append(mixed * torch.sigmoid(gate[h]))
        stream = stream + t[f"{layer}.self_attn.o_proj.weight"] @ torch.cat(heads)
        x = self.norm(stream, f"{layer}.post_attention_layernorm.weight")
        mlp = self.mlp if c.experts is None else self.experts
        return self.norm(stream + mlp(x, f"{layer}.mlp"), "mtp.norm.weight")

    def mlp(self, x: Tensor, prefix: str) -> Tensor:
        gate, up = (self.tensors[f"{prefix}.{name}_proj.weight"] @ x for name in ("gate", "up"))
        return self.tensors[f"{prefix}.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    def experts(self, x: Tensor, prefix: str) -> Tensor:
        assert self.config.experts is not None
        shares = (self.tensors[f"{prefix}.gate.weight"] @ x).softmax(0)
        best = sorted(range(len(shares)), key=lambda expert: -float(shares[expert]))
        chosen = best[: self.config.experts.top_k]
        outputs = [shares[e] * self.mlp(x, f"{prefix}.experts.{e}") for e in chosen]
        gate = torch.sigmoid(self.tensors[f"{prefix}.shared_expert_gate.weight"] @ x)
        shared = gate * self.mlp(x, f"{prefix}.shared_expert")
        return sum(outputs, torch.zeros_like(x)) / shares[chosen].sum() + shared


def run_head(
    pair: Pair,
    caches: object,
    slot: int,
    start: int,
    tokens: list[int],
    hidden: Tensor,
    as_decode: bool,
) -> Tensor:
    """Our head over tokens at positions start .. of one slot."""
    lengths = torch.zeros(4, dtype=torch.int64)
    lengths[slot] = start
    rows = [(slot, tokens)]
    ids, batch = make_batch(caches, lengths, rows if as_decode else [], [] if as_decode else rows)
    return pair.model.mtp(ids, hidden, batch, caches)


@pytest.mark.parametrize("shape", SHAPES)
def test_head_equals_its_definition(make_pair: MakePair, shape: TinyShape | dict[str, Any]) -> None:
    """Over a prompt in two chunks, then over verified rows, then feeding back its own output."""
    pair = make_pair(shape)
    ids, slot = pair.ids(24), 2
    driver = pair.driver(drafts=2)
    _, [hidden] = driver.step(prefill=[(slot, ids)])
    rows = [
        run_head(pair, driver.caches, slot, 1, ids[1:7], hidden[:6], as_decode=False),
        run_head(pair, driver.caches, slot, 7, ids[7:20], hidden[6:19], as_decode=False),
        run_head(pair, driver.caches, slot, 20, ids[20:24], hidden[19:23], as_decode=True),
    ]
    fed, tokens = [], [5, 9, 5]
    feed = hidden[23:24]
    for step, token in enumerate(tokens):
        feed = run_head(pair, driver.caches, slot, 24 + step, [token], feed, as_decode=True)
        fed.append(feed)
    inputs = [*hidden.unbind(), *(x[0] for x in fed[:-1])]
    expected = WrittenOutHead(pair.directory, pair.model.config).drafts(ids[1:] + tokens, inputs)
    ours = torch.cat([*rows, *fed])
    torch.testing.assert_close(ours.double(), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_later_tokens_need_only_keys_and_values(make_pair: MakePair) -> None:
    """Later tokens see tokens with keys and values only as if they were computed in full; the input
    of the layer is enough to make drafts at some of them afterwards."""
    pair = make_pair()
    assert pair.model.mtp is not None
    ids, driver = pair.ids(20), pair.driver()
    ends = {1: 19, 2: 11, 3: 7}
    _, hidden = driver.step(prefill=[(slot, ids[: end + 1]) for slot, end in ends.items()])
    rows = [(slot, ids[1 : end + 1]) for slot, end in ends.items()]
    tokens, batch = make_batch(driver.caches, torch.tensor([0, 1, 1, 1]), [], rows)
    known = torch.cat([one[:-1] for one in hidden])
    x = pair.model.mtp.write_kv(tokens, known, batch, driver.caches)
    last = [(slot, ids[end : end + 1]) for slot, end in ends.items()]
    _, at = make_batch(driver.caches, torch.tensor([0, *ends.values()]), last, [])
    guessed = pair.model.mtp.draft_hidden(x[[18, 29, 36]], at, driver.caches)
    whole = WrittenOutHead(pair.directory, pair.model.config).drafts(ids[1:], [*hidden[0][:-1]])
    expected = torch.stack([whole[end - 1] for end in ends.values()])
    torch.testing.assert_close(guessed.double(), expected, rtol=1e-4, atol=1e-4)


def test_rejected_drafts_leave_no_trace(make_pair: MakePair) -> None:
    """Rows of rejected drafts are overwritten before anything may read them."""
    pair = make_pair()
    ids, slot = pair.ids(12), 1
    _, [hidden] = pair.driver().step(prefill=[(slot, ids)])
    outcomes = []
    for wrong in (False, True):
        driver = pair.driver(drafts=2)
        run_head(pair, driver.caches, slot, 1, ids[1:8], hidden[:7], as_decode=False)
        if wrong:
            run_head(pair, driver.caches, slot, 8, [3, 4, 5], hidden[:3], as_decode=True)
        outcomes.append(
            run_head(pair, driver.caches, slot, 8, ids[8:10], hidden[7:9], as_decode=True)
        )
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-5, atol=1e-6)
