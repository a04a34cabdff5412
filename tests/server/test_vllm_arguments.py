"""Command lines as vLLM's users write them: what each becomes, and what is said of the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from millrace.config import EngineArgs
from millrace.errors import ConfigError
from millrace.server.command import serve
from millrace.server.help import GROUPS
from millrace.server.options import ServerOptions
from millrace.server.vllm_arguments import Options, Rewritten, rewrite
from millrace.vllm_flags import (
    PARTS,
    REFUSED_VALUES,
    SAME,
    SYNONYMS,
    TABLE,
    own_keywords,
    positive_form,
)

FIELDS = {*EngineArgs.__struct_fields__, *ServerOptions.__struct_fields__}
NAMES = {f"--{name.replace('_', '-')}" for name in FIELDS} | {"--config"}


def read(*arguments: str) -> Rewritten:
    return rewrite(arguments, Options.of(serve))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("m --max_model_len 32k", ["m", "--max-model-len=32k"]),
        ("m --max_model_len=32k", ["m", "--max-model-len=32k"]),
        ("m -tp 2 -dp=8", ["m", "--tensor-parallel-size=2", "--replicas=8"]),
        ("m --data-parallel-size 8", ["m", "--replicas=8"]),
        ("--model m --seed 3", ["m", "--seed=3"]),
        ("m --max-num-queued-reqs 9", ["m", "--max-queue=9"]),
        ("m --device-memory-utilization 0.5", ["m", "--gpu-memory-utilization=0.5"]),
        (
            "m --served-model-name a b --port 1",
            ["m", "--served-model-name=a", "--served-model-name=b", "--port=1"],
        ),
        ("--served-model-name a m", ["--served-model-name=a", "m"]),
        ("m --disable-prefix-caching", ["m", "--no-enable-prefix-caching"]),
        ("m --no-enable-prefix-caching", ["m", "--no-enable-prefix-caching"]),
        ("m --enable-uvicorn-access-log", ["m", "--no-disable-uvicorn-access-log"]),
        ("m -q fp8", ["m", "--quantization=fp8"]),
        (
            "m --spec-method qwen3_next_mtp --spec-tokens 2",
            [
                "m",
                '--speculative-config={"method":"qwen3_next_mtp","num_speculative_tokens":2}',
            ],
        ),
        (
            'm -sc {"method":"mtp"} --speculative-config.num_speculative_tokens=3',
            ["m", '--speculative-config={"method":"mtp","num_speculative_tokens":3}'],
        ),
        (
            "m --hf-overrides.text_config.vocab_size 9 --hf-overrides.a.b=c",
            ["m", '--hf-overrides={"text_config":{"vocab_size":9},"a":{"b":"c"}}'],
        ),
        ("m --frobnicate 3", ["m", "--frobnicate", "3"]),
        ("m --max-num-seqs=-1 -- --port", ["m", "--max-num-seqs=-1", "--port"]),
    ],
)
def test_vllms_forms_become_plain_options(given: str, meant: list[str]) -> None:
    assert read(*given.split()) == (meant, [])


@pytest.mark.parametrize(
    ("given", "note"),
    [
        ("--trust-remote-code", "no code of a checkpoint is ever run"),
        ("--trust_remote_code", "no code of a checkpoint is ever run"),
        ("--enable-auto-tool-choice", "on already"),
        ("--disable-log-requests", "requests are never logged"),
        ("--no-enable-log-requests", "requests are never logged"),
        ("-O3", "kernels and graphs are chosen at the start"),
        ("-O 3", "kernels and graphs are chosen at the start"),
        ("-O=3", "kernels and graphs are chosen at the start"),
        ('-cc {"level":3}', "kernels and graphs are chosen at the start"),
        ("--compilation-config.level 3", "kernels and graphs are chosen at the start"),
        ("--pipeline-parallel-size 1", "as it is anyway"),
        ("-pp=1", "as it is anyway"),
        ("--no-enable-lora", "off already"),
        ("--limit-mm-per-prompt.image 0", "text only"),
    ],
)
def test_flags_without_effect_are_noted_and_dropped(given: str, note: str) -> None:
    arguments, (said,) = read("m", *given.split(), "--port", "1")
    assert arguments == ["m", "--port=1"]
    assert note in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("-pp 2", "--pipeline-parallel-size 2: layers are not split over devices; use --tensor"),
        ("--max_model_len auto", "--max-model-len auto: the model's whole context is the default"),
        ("--dtype=half", "--dtype half: float16 is not run; use bfloat16"),
        ("--enable-lora", "--enable-lora: LoRA adapters are not served; merge the adapter"),
        ("--cpu-offload-gb=4", "--cpu-offload-gb 4: weights and caches stay on the device"),
        ("--tokenizer-mode slow", "--tokenizer-mode slow: tokenizer.json is read"),
        ("--no-enable-chunked-prefill", "--no-enable-chunked-prefill: it is always on"),
        ("--num-gpu-blocks-override 9", "set memory in bytes with --kv-cache-memory-bytes"),
        ("--config a.yaml --config b.yaml", "--config is given 2 times"),
        ("--config /nowhere.yaml", "--config /nowhere.yaml: No such file"),
        ("-sc [] --spec-tokens 3", "--speculative-config [] is not a JSON object"),
    ],
)
def test_flags_that_cannot_work_are_refused_with_what_would(given: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read("m", *given.split())
    assert said in str(refused.value)


def test_a_file_gives_options_and_the_command_line_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(
        "model: m\nport: 81\nmax_model_len: 32k\nserved-model-name: [a, b]\nenforce-eager: true\n"
        "enable-prefix-caching: false\nspeculative-config:\n  method: mtp\n"
        "trust-remote-code: true\n"
    )
    arguments, notes = read("--config", str(path), "--port", "82", "--served-model-name", "c")
    assert arguments == [
        *("m", "--max-model-len=32k", "--enforce-eager", "--no-enable-prefix-caching"),
        *('--speculative-config={"method":"mtp"}', "--port=82", "--served-model-name=c"),
    ]
    assert [note.split()[0] for note in notes] == ["--trust-remote-code"]
    assert read("n", f"--config={path}", "--enable-prefix-caching").arguments[:3] == [
        *("--port=81", "--max-model-len=32k", "--served-model-name=a"),
    ]


BOMB = "a: &a [x, x]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        *("- a\n", "3", "a: [\n", "1: 2", "", BOMB, "a: &a {b: *a}", "a: &a [*a]", "[" * 9000),
        *("port: " + "9" * 5000, "a: " + "{a: " * 3000, "port: !!python/name:os.system"),
        *("a: 'x" + "x" * (1 << 20) + "'", "\0", "hf-overrides: {? [1] : 2}"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--config .*options\.yaml: "):
        read("m", "--config", str(path))
    with pytest.raises(ConfigError) as raised:
        read("m", "--config", str(path))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600 + len(str(path))


def test_a_file_without_an_end_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in ("/dev/zero", pipe):
        with pytest.raises(ConfigError, match="it is no plain file"):
            read("m", "--config", str(path))


def test_a_yes_where_a_value_belongs_stays_with_its_option(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("port: yes\n")
    assert read("m", "--config", str(path)).arguments == ["--port=true", "m"]


def test_the_table_fits_the_options() -> None:
    assert SAME - {"--model"} <= NAMES
    assert set(TABLE).isdisjoint(NAMES)
    assert set(PARTS).isdisjoint(NAMES)
    targets = {name for name in SYNONYMS.values() if name not in SYNONYMS}
    assert targets <= NAMES | set(TABLE)
    assert {option for option, _ in PARTS.values()} <= NAMES
    assert all(row.words for row in TABLE.values())
    assert {flag for flag, _ in REFUSED_VALUES} <= SAME


def test_no_flag_is_harmless_in_both_directions_by_accident() -> None:
    """A flag and its opposite are one row: else one of them would be decided twice."""
    pairs = {(flag, positive_form(flag)) for flag in TABLE}
    assert [flag for flag, other in pairs if other and other[0] in TABLE] == []


def test_every_group_of_the_help_names_options() -> None:
    listed = [name for names in GROUPS.values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) <= FIELDS - {"model"}


def test_keywords_of_vllms_llm_go_through_the_same_table() -> None:
    given = {
        "seed": 1,
        "trust_remote_code": True,
        "pipeline_parallel_size": 1,
        "enable_lora": False,
    }
    own, notes = own_keywords(given)
    assert own == {"seed": 1}
    assert [note.split()[0] for note in notes] == [
        *("trust_remote_code", "pipeline_parallel_size", "enable_lora"),
    ]
    with pytest.raises(ConfigError, match="enable_lora True: LoRA adapters are not served"):
        own_keywords({"enable_lora": True})


def test_ordinary_keywords_of_vllms_llm_are_taken() -> None:
    own, _ = own_keywords(
        {
            "tokenizer": None,
            "hf_overrides": None,
            "quantization": None,
            "data_parallel_size": 1,
            "reasoning_parser": "qwen3",
            "spec_method": "mtp",
            "spec_tokens": 2,
            "offload_num_in_group": 1,
            "structured_outputs_config": {"backend": "xgrammar"},
            "max_model_len": 512,
        }
    )
    assert own == {
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 2},
        "max_model_len": 512,
    }
    with pytest.raises(ConfigError, match="data_parallel_size 2: an LLM is one replica"):
        own_keywords({"data_parallel_size": 2})
    with pytest.raises(ConfigError, match="matched by llguidance"):
        own_keywords({"structured_outputs_config": {"enable_in_reasoning": True}})
