"""The model that ships: its tokenizer, its files, and a handful of answers by the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from millrace.eval.models import GenerationOptions, InProcess
from millrace.tasks import TASKS, Item

MODELS = Path(__file__).resolve().parents[2] / "models"
MINI, FP8, MOE = (MODELS / f"millrace-mini{twin}" for twin in ("", "-fp8", "-moe"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MINI / "tokenizer.json"))


@pytest.mark.parametrize(
    "text",
    [
        "Grüße, 世界 \U0001f600!",
        " two  spaces\n\n\ttab",
        "<|im_start|>user\n7+5=12<|im_end|>",
        "'s ",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    for text in ("12345", "policy 987-65", "1,234.5"):
        tokens = tokenizer.encode(text).tokens
        assert all(len(t) == 1 for t in tokens if any(c.isdigit() for c in t))


def test_markers_are_one_token_each(tokenizer: Tokenizer) -> None:
    for marker in ("<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_response>"):
        assert len(tokenizer.encode(marker).ids) == 1
    assert tokenizer.get_vocab_size() == 4096
    stops = json.loads((MINI / "generation_config.json").read_text())["eos_token_id"]
    assert stops[0] == tokenizer.token_to_id("<|im_end|>")


@pytest.mark.parametrize("model", [MINI, MOE], ids=lambda model: model.name)
def test_the_directory_is_small(model: Path) -> None:
    assert sum(path.stat().st_size for path in model.iterdir()) <= 24e6


def test_the_mixture_has_the_same_tokenizer() -> None:
    assert (MOE / "tokenizer.json").read_bytes() == (MINI / "tokenizer.json").read_bytes()


def test_fp8_blocks_times_their_scales_are_the_weights() -> None:
    with (
        safe_open(MINI / "model.safetensors", "pt") as plain,
        safe_open(FP8 / "model.safetensors", "pt") as fp8,
    ):
        names = set(fp8.keys())
        scaled = {name for name in names if f"{name}_scale_inv" in names}
        assert names - {f"{name}_scale_inv" for name in scaled} == set(plain.keys())
        assert "mtp.fc.weight" not in scaled
        assert "mtp.layers.0.mlp.up_proj.weight" in scaled
        for name in scaled:
            values, scales = fp8.get_tensor(name), fp8.get_tensor(f"{name}_scale_inv")
            assert values.dtype == torch.float8_e4m3fn
            assert scales.dtype == torch.bfloat16
            spread = scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
            want = plain.get_tensor(name).float()
            error = (values.float() * spread - want).norm() / want.norm()
            assert error < 0.04, name


@pytest.fixture(scope="module")
def oracle() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model = transformers.Qwen3_5ForCausalLM.from_pretrained(MINI, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(MINI)


HANDFUL = (("policy", 1), ("math", 1), ("chat", 0), ("chat", 1))


def _item(task: str, index: int) -> Item:
    return TASKS[task].make(index, 0, "heldout")


def _oracle_text(oracle: tuple[Any, Any], item: Item) -> str:
    model, tokenizer = oracle
    prompt = tokenizer.apply_chat_template(
        list(item.messages), tools=list(item.tools) or None, add_generation_prompt=True,
        return_tensors="pt", return_dict=True,
    )  # fmt: skip
    ids = model.generate(**prompt, max_new_tokens=120)[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids).removesuffix("<|im_end|>"))


@pytest.mark.parametrize(("task", "index"), HANDFUL)
def test_transformers_gives_the_right_answer(
    oracle: tuple[Any, Any], task: str, index: int
) -> None:
    item = _item(task, index)
    text = _oracle_text(oracle, item)
    assert TASKS[task].grade(item, text).correct, text


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 3])
def test_the_engine_says_what_transformers_says(oracle: tuple[Any, Any], drafts: int) -> None:
    items = [_item(task, index) for task, index in HANDFUL]
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024}
    if drafts:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": drafts}
    model = InProcess(str(MINI), concurrency=len(items), **options)
    said = {one.index: one.text for one in model.generate(items, GenerationOptions())}
    stats = model.stats()
    model.close()
    assert [said[i] for i in range(len(items))] == [_oracle_text(oracle, item) for item in items]
    assert len(stats.accepted_per_position) == drafts
    assert all(count > 0.85 * stats.drafts for count in stats.accepted_per_position[:1])


@pytest.fixture(scope="module")
def oracle_of_experts() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model = transformers.Qwen3_5MoeForCausalLM.from_pretrained(MOE, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(MOE)


def test_the_mixture_says_what_transformers_says(oracle_of_experts: tuple[Any, Any]) -> None:
    items = [_item(task, index) for task, index in HANDFUL]
    speculation = {"method": "mtp", "num_speculative_tokens": 2}
    model = InProcess(
        str(MOE), concurrency=len(items), dtype="float32", max_model_len=1024,
        speculative_config=speculation,
    )  # fmt: skip
    said = {one.index: one.text for one in model.generate(items, GenerationOptions())}
    model.close()
    wanted = [_oracle_text(oracle_of_experts, item) for item in items]
    assert [said[i] for i in range(len(items))] == wanted
    assert all(
        TASKS[task].grade(item, text).correct
        for (task, _), item, text in zip(HANDFUL, items, wanted, strict=True)
    )
