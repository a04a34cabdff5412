"""The Python API over the real engine on a tiny random model."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace import LLM, SamplingParams, StructuredOutputs
from millrace.errors import CheckpointError, ConfigError, RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "kv_cache_memory_bytes": 16 << 20,
}


@pytest.fixture(scope="module")
def llm(small_model: Path) -> Iterator[LLM]:
    import torch

    torch.set_num_threads(1)
    with LLM(str(small_model), **OPTIONS) as one:
        yield one


def idle(llm: LLM) -> bool:
    return not llm.engine.has_work() and llm.stats().running == 0


def test_prompts_in_every_shape_give_the_same(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello")
    shapes: list[Any] = ["hello", ["hello"], {"prompt": "hello"}, {"prompt_token_ids": ids}, ids]
    shapes.append([ids])
    outputs = [llm.generate(shape, GREEDY)[0] for shape in shapes]
    assert {tuple(output.prompt_token_ids) for output in outputs} == {tuple(ids)}
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert [output.prompt for output in outputs] == ["hello"] * 3 + [None] * 3


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["a", "bc", "def", "ghij", "klmno", "p"]
    params = [
        SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (9, 1, 7, 2, 8, 3)
    ]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 1, 7, 2, 8, 3]
    assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 6
    assert all(output.finished for output in outputs)
    alone = [
        llm.generate(p, q)[0].outputs[0].token_ids for p, q in zip(prompts, params, strict=True)
    ]
    assert [output.outputs[0].token_ids for output in outputs] == alone


def test_the_text_is_that_of_the_tokens(llm: LLM) -> None:
    (output,) = llm.generate(["hello"], GREEDY)
    assert output.outputs[0].text == llm.get_tokenizer().decode(output.outputs[0].token_ids)


def test_times_are_in_order(llm: LLM) -> None:
    metrics = llm.generate(["hello"], GREEDY)[0].metrics
    assert 0 < metrics.arrival_time < metrics.first_token_time < metrics.finished_time


def test_a_stop_text_ends_a_request_and_frees_it(llm: LLM) -> None:
    (plain,) = llm.generate(["hello"], SamplingParams(temperature=0.0, max_tokens=60))
    text = plain.outputs[0].text
    assert len(text) > 3
    stop = text[1:3]
    params = SamplingParams(temperature=0.0, max_tokens=60, stop=[stop])
    (stopped,) = llm.generate(["hello"], params)
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert stopped.outputs[0].stop_reason == stop
    assert stopped.outputs[0].finish_reason == "stop"
    assert len(stopped.outputs[0].token_ids) < len(plain.outputs[0].token_ids)
    assert idle(llm)


def test_a_stop_token_is_the_last_token(llm: LLM) -> None:
    (plain,) = llm.generate(["hello"], GREEDY)
    stop = plain.outputs[0].token_ids[4]
    params = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[stop], ignore_eos=True)
    (stopped,) = llm.generate(["hello"], params)
    first = plain.outputs[0].token_ids.index(stop)
    assert stopped.outputs[0].token_ids == plain.outputs[0].token_ids[: first + 1]
    assert stopped.outputs[0].stop_reason == stop


@pytest.mark.parametrize("many", [False, True])
def test_a_chat_is_the_rendered_prompt(llm: LLM, many: bool) -> None:
    chat: list[Any] = [{"role": "user", "content": "hi"}]
    outputs = llm.chat([chat, chat] if many else chat, GREEDY)
    assert len(outputs) == 1 + many
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert outputs[0].prompt == rendered
    (direct,) = llm.generate([rendered], GREEDY)
    assert outputs[0].outputs[0].token_ids == direct.outputs[0].token_ids


def test_a_long_shared_prefix_is_found_again(llm: LLM) -> None:
    prompt = list(range(40)) * 4
    first, second = llm.generate([prompt], GREEDY)[0], llm.generate([prompt], GREEDY)[0]
    assert second.num_cached_tokens > first.num_cached_tokens
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_without_sampling_params_the_checkpoints_defaults_hold(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    assert params.max_tokens == 16
    assert len(llm.generate(["hello"])[0].outputs[0].token_ids) <= 16


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["ok", [10**6]], None, "out of vocabulary"),
        (["ok", ""], None, "at least one token"),
        (["ok", {"text": "x"}], None, "a prompt is"),
        (["ok", [1] * 300], None, "at most 255 tokens"),
        (["ok"], [GREEDY, GREEDY], "2 sampling_params for 1 prompts"),
    ],
)
def test_one_wrong_prompt_runs_none(llm: LLM, prompts: Any, params: Any, message: str) -> None:
    before = llm.stats().prompt_tokens
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, params)
    assert idle(llm)
    assert llm.stats().prompt_tokens == before


def test_an_interrupt_leaves_the_engine_idle(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = llm.engine.step, []

    def interrupted() -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["hello", "world"], GREEDY)
    while llm.engine.has_work():
        llm.engine.step()
    assert idle(llm)
    assert llm.generate(["hello"], GREEDY)[0].finished


def test_n_outputs_share_one_prompt(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=8, ignore_eos=True)
    (output,) = llm.generate(["hello"], params)
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert output.finished
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    alone = SamplingParams(temperature=1.0, seed=6, max_tokens=8, ignore_eos=True)
    assert llm.generate(["hello"], alone)[0].outputs[0].token_ids == output.outputs[2].token_ids


def test_logprobs_have_vllms_shape(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=2, prompt_logprobs=1
    )
    (output,) = llm.generate(["hello"], params)
    (one,) = output.outputs
    assert one.logprobs is not None
    for token, position in zip(one.token_ids, one.logprobs, strict=True):
        assert next(iter(position)) == token
        assert position[token].rank == 1  # greedy
        assert position[token].decoded_token == llm.get_tokenizer().token_text(token)
        assert max(entry.logprob for entry in position.values()) == position[token].logprob
    total = sum(next(iter(position.values())).logprob for position in one.logprobs)
    assert one.cumulative_logprob == pytest.approx(total)
    known = output.prompt_logprobs
    assert known is not None
    assert known[0] is None
    assert [next(iter(entry)) for entry in known[1:] if entry] == output.prompt_token_ids[1:]


def test_tokens_can_be_asked_for_by_their_ids(llm: LLM) -> None:
    """Beside a request for the most probable ones, in the same step."""
    best = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=5)
    ids = [7, 3, 7]
    named = SamplingParams(
        temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=0, logprob_token_ids=ids
    )
    whole, some = llm.generate(["hello", "hello"], [best, named])
    assert whole.outputs[0].token_ids == some.outputs[0].token_ids
    for token, position in zip(
        some.outputs[0].token_ids, some.outputs[0].logprobs or (), strict=True
    ):
        assert next(iter(position)) == token
        assert set(position) == {token, 3, 7}
    assert [len(position) for position in whole.outputs[0].logprobs or ()] == [5, 5, 5]
    with pytest.raises(RequestError, match="out of vocabulary"):
        llm.generate("a", SamplingParams(logprobs=0, logprob_token_ids=[10**7]))


def test_the_whole_vocabulary_is_reported_where_that_is_allowed(
    llm: LLM, small_model: Path
) -> None:
    params = SamplingParams(
        temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=-1, prompt_logprobs=-1
    )
    with pytest.raises(RequestError, match=r"logprobs must be from 0 to 20, got -1.*max-logprobs"):
        llm.generate(["hello"], params)
    with LLM(str(small_model), max_logprobs=-1, **OPTIONS) as generous:
        (output,) = generous.generate(["hello there"], params)
        positions = [*(output.outputs[0].logprobs or ()), *(output.prompt_logprobs or ())[1:]]
        for position in positions:
            assert position is not None
            assert len(position) == generous.vocab_size
            total = sum(math.exp(entry.logprob) for entry in position.values())
            assert total == pytest.approx(1.0, abs=1e-3)


def test_structured_outputs_bind_the_text(llm: LLM) -> None:
    wanted = StructuredOutputs(regex="[0-9]{3}-[a-c]+z")
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=100, structured_outputs=wanted)
    (output,) = llm.generate(["hello"], params)
    assert re.fullmatch("[0-9]{3}-[a-c]+z", output.outputs[0].text)
    wrong = SamplingParams(structured_outputs=StructuredOutputs(regex="[0-9"))
    with pytest.raises(RequestError, match="unclosed character class"):
        llm.generate(["hello"], wrong)


def test_nothing_to_do(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


@pytest.mark.slow
@pytest.mark.parametrize("last", ["", "llm.close(); llm.close()"])
def test_two_ranks_end_with_the_script(small_model: Path, last: str) -> None:
    """Also when nobody closes it: no rank complains, none stays."""
    script = (
        "from millrace import LLM, SamplingParams\n"
        f"llm = LLM({str(small_model)!r}, tensor_parallel_size=2, **{OPTIONS!r})\n"
        "params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)\n"
        "print(len(llm.generate('hello', params)[0].outputs[0].token_ids))\n" + last
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "4\n", "")


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("/nowhere", {}, CheckpointError, "neither a directory nor"),
        (None, {"max_model_length": 5}, ConfigError, "unknown option 'max_model_length'"),
        (None, {"dtype": "int8"}, ConfigError, "use one of auto, float32, bfloat16"),
        (None, {"generation_config": "x"}, ConfigError, "use auto or vllm"),
        (None, {"max_model_len": 10**9}, ConfigError, "max_model_len 1000000000"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    small_model: Path, model: str | None, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LLM(model or str(small_model), **options)


def test_without_a_tokenizer_token_ids_go_in_and_out(small_model: Path) -> None:
    with LLM(str(small_model), skip_tokenizer_init=True, **OPTIONS) as llm:
        (output,) = llm.generate([[1, 2, 3]], GREEDY)
        assert (len(output.outputs[0].token_ids), output.outputs[0].text) == (12, "")
        with pytest.raises(RequestError, match="send token ids"):
            llm.generate(["hello"], GREEDY)


def test_a_scheme_that_the_checkpoint_has_not_is_refused(small_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization fp8: the weights of .* are float32"):
        LLM(str(small_model), quantization="fp8", **OPTIONS)
    with LLM(str(small_model), quantization="none", **OPTIONS) as llm:
        assert llm.generate([[1]], GREEDY)[0].finished


def test_an_output_ends_where_the_context_does(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1000, min_tokens=999, ignore_eos=True)
    for output in llm.generate([[1] * 200, [2] * 255], params):
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 256
        assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("priority", [None, 0, 1, [2, 1]])
def test_priorities_without_effect_are_taken(llm: LLM, priority: Any) -> None:
    assert len(llm.generate(["a", "b"], GREEDY, priority=priority)) == 2
    chat: list[Any] = [{"role": "user", "content": "hi"}]
    assert len(llm.chat([chat, chat], GREEDY, priority=priority)) == 2


@pytest.mark.parametrize("priority", [[], [0], [0, 0, 0]])
def test_each_prompt_has_one_priority(llm: LLM, priority: Any) -> None:
    with pytest.raises(RequestError, match="priorities for 2 prompts"):
        llm.generate(["a", "b"], GREEDY, priority=priority)


def test_priorities_order_requests(small_model: Path) -> None:
    options = {**OPTIONS, "max_num_seqs": 1, "scheduling_policy": "priority"}
    with LLM(str(small_model), **options) as llm:
        outputs = llm.generate(["a", "b", "c"], GREEDY, priority=[2, 1, 0])
    ends = [output.metrics.finished_time for output in outputs]
    assert ends == sorted(ends, reverse=True)


def test_other_keywords_of_vllms_calls(llm: LLM) -> None:
    chat: list[Any] = [{"role": "user", "content": "hi"}]
    plain = llm.chat(chat, GREEDY)[0].outputs[0].token_ids
    more: Any = {
        "lora_request": None, "chat_template_content_format": "openai",
        "tokenization_kwargs": {"add_special_tokens": False}, "mm_processor_kwargs": None,
    }  # fmt: skip
    assert llm.chat(chat, GREEDY, **more)[0].outputs[0].token_ids == plain
    kwargs = {"tokenization_kwargs": {"truncation": 1}}
    for wrong in ({"lora_request": object()}, {"chat_template": "x"}, kwargs):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            llm.chat(chat, GREEDY, **wrong)  # type: ignore[arg-type]


def test_a_template_and_defaults_may_be_given(small_model: Path) -> None:
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    with LLM(
        str(small_model),
        chat_template=template,
        override_generation_config={"temperature": 0.0, "max_new_tokens": 3},
        **OPTIONS,
    ) as llm:
        (output,) = llm.chat([{"role": "user", "content": "hi"}])
        assert output.prompt == "[hi]"
        assert llm.get_default_sampling_params().temperature == 0.0
        assert len(output.outputs[0].token_ids) <= 3


def test_cached_prefixes_can_be_forgotten(llm: LLM) -> None:
    prompt = list(range(40)) * 4
    llm.generate([prompt], GREEDY)
    assert llm.reset_prefix_cache()
    assert llm.generate([prompt], GREEDY)[0].num_cached_tokens == 0
