"""What `millrace doctor` finds, and what it makes of machines that lack something."""

from __future__ import annotations

import io
import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from millrace.cli import run
from millrace.doctor import devices, machine, packages
from millrace.doctor.finding import Finding, show
from millrace.kernels.cpu import build
from millrace.model.tiny import QWEN3_MOE, UNIT_TEST, TinyShape, config_json, write_checkpoint
from tests.kernels.gpu.gpu_support import HAS_TRITON, pretend

Replace = Callable[[str, str | None], None]


def look(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status, and the findings by topic and name."""
    status = run(["doctor", *arguments, "--json", "-"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is (status == 0)
    return status, {f"{one['topic']}: {one['name']}": one for one in report["findings"]}


def test_a_good_machine_and_model(
    capsys: pytest.CaptureFixture[str], small_model: Path, tmp_path: Path
) -> None:
    # The port is any free one: a server of somebody else may run on the default one.
    status, found = look(capsys, str(small_model), "--port", "0", "--max-model-len", "128")
    assert status == 0, [one for one in found.values() if one["verdict"] == "fail"]
    assert found["versions: torch"]["value"].startswith("2.")
    assert "GiB free" in found["machine: memory"]["value"]
    assert "max_model_len 128" in found["model: options"]["value"]
    assert "MiB a snapshot" in found["model: cache"]["value"]
    for op in ("gdn.gdn_decode", "attention.attend_prefill", "sampling.sample"):
        assert f"kernels: {op}" in found


def test_a_model_without_states_has_no_snapshots(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """2 layers x 2 x 2 heads x 32 x 4 bytes are 1 KiB a token; a slot has its index alone."""
    shape = replace(UNIT_TEST, layer_types=("full_attention",) * 2, mtp=False)
    directory = write_checkpoint(tmp_path / "attention", shape)
    options = ("--port", "0", "--dtype", "float32", "--device", "cpu", "--max-model-len", "128")
    _, found = look(capsys, str(directory), *options)
    value = found["model: cache"]["value"]
    assert value == "1.00 KiB a token, 0.00 MiB a sequence, prompts resume at any page"


def test_a_mixture_of_experts_says_what_is_active(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """3 of 8 experts of 3 x 32 x 64 weights in 4 layers: 5 x 4 x 6,144 are not for a token."""
    directory = write_checkpoint(tmp_path / "moe", QWEN3_MOE)
    options = ("--port", "0", "--dtype", "float32", "--device", "cpu", "--max-model-len", "128")
    status, found = look(capsys, str(directory), *options)
    assert status == 0
    stored = load_file(directory / "model.safetensors").values()
    total = sum(tensor.numel() for tensor in stored)
    value = found["model: parameters"]["value"]
    active = f"{(total - 122_880) / 1e6:.2f} M active"
    assert value == f"{total / 1e6:.2f} M, {active}, 0.00 GiB a rank on cpu"
    _, found = look(capsys, str(directory), *options, "--tensor-parallel-size", "8")
    assert "sizes that work: 1, 2, 4" in found["model: parameters"]["value"]


def test_the_report_as_text_and_in_a_file(
    capsys: pytest.CaptureFixture[str], small_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "reports" / "doctor.json"
    assert run(["doctor", str(small_model), "--port", "0", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "native library" in text
    assert "0 fail" in text
    assert len(json.loads(file.read_text())["findings"]) > 20


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, found = look(capsys, "--port", str(taken.getsockname()[1]))
    assert status == 1
    assert found["limits: port"]["verdict"] == "fail"
    assert "in use" in found["limits: port"]["value"]


def test_what_is_wrong_with_a_model_is_said(
    capsys: pytest.CaptureFixture[str], small_model: Path, tmp_path: Path
) -> None:
    status, found = look(capsys, "nonsense", "--port", "0")
    assert status == 1
    assert "neither a directory nor" in found["model: nonsense"]["value"]
    broken = shutil.copytree(small_model, tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    for weights in broken.glob("*.safetensors"):
        weights.unlink()
    status, found = look(capsys, str(broken), "--port", "0", "--max-model-len", "100000000")
    assert status == 1
    assert found["model: tokenizer.json"]["value"] == "missing"
    assert found["model: weights"]["verdict"] == "fail"
    assert "is beyond the model's" in found["model: options"]["value"]


def test_the_output_head_for_drafts_takes_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """1.12 GiB of it beside a file that is nearly empty."""
    config = {**config_json(TinyShape()), "hidden_size": 1200, "vocab_size": 1_000_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"none": torch.zeros(1)}, tmp_path / "model.safetensors")
    for more, said in (({"quantization": "fp8"}, "1.12 GiB"), ({}, "0.00 GiB")):
        options = json.dumps({"num_speculative_tokens": 1, **more})
        _, found = look(capsys, str(tmp_path), "--port", "0", "--speculative-config", options)
        value = found["model: weights"]["value"]
        assert value.startswith(f"{said} a rank in 1 files")
        assert ("and an FP8 head for drafts" in value) == bool(more)


def test_no_native_library(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("MILLRACE_NATIVE", "0")
    status, found = look(capsys, "--port", "0")
    assert status == 0
    assert found["kernels: native library"]["verdict"] == "warn"
    assert "torch reference" in found["kernels: gdn.gdn_decode"]["value"]


def test_a_compiler_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise FileNotFoundError("no g++")

    monkeypatch.delenv("MILLRACE_NATIVE", raising=False)
    monkeypatch.setattr(build, "build", missing)
    found = devices.native_library()
    assert found.verdict == "warn"
    assert "no g++" in found.value
    assert "compiler" in found.advice


def test_small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small = shutil.disk_usage("/")._replace(total=64 << 20, free=60 << 20)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: small)
    found = machine.shared_memory()
    assert found.verdict == "warn"
    assert "--shm-size" in found.advice


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_hopper", lambda: True)


def test_a_broken_package_fails_with_its_remedy(
    capsys: pytest.CaptureFixture[str], hopper: None, replace_package: Replace
) -> None:
    replace_package("deep_gemm", "raise ImportError('undefined symbol: TVMFFIErrorMove')")
    replace_package("pyarrow", "raise ImportError('built for another numpy')")
    status, found = look(capsys, "--port", "0")
    assert status == 1
    one = found["packages: DeepGEMM"]
    assert one["verdict"] == "fail"
    assert "cannot be imported (ImportError: undefined symbol: TVMFFIErrorMove)" in one["value"]
    assert "'sgl-deep-gemm==0.1.3' 'apache-tvm-ffi==0.1.9'" in one["advice"]
    assert found["packages: pyarrow"]["verdict"] == "fail"


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_the_backends_of_a_gpu(monkeypatch: pytest.MonkeyPatch, replace_package: Replace) -> None:
    from millrace.kernels.gpu import cuda_source

    replace_package("deep_gemm", "raise ImportError('no tvm_ffi')")
    pretend(monkeypatch)
    monkeypatch.setattr(cuda_source, "compiled", lambda text, name: print)
    found = {one.name: one for one in devices.backends()}
    assert found["FP8 GEMM"].verdict == "warn"
    assert found["FP8 GEMM"].value.startswith(
        "cuBLAS; DeepGEMM is installed but cannot be imported"
    )
    assert "apache-tvm-ffi==0.1.9" in found["FP8 GEMM"].advice
    assert (found["GDN decode"].value, found["GDN decode"].verdict) == ("CUDA kernels", "ok")
    assert found["experts, 64 tokens or less"].value == "CUDA kernel"
    assert found["experts"].value.startswith("Triton kernels; DeepGEMM is installed but cannot")


def test_packages_that_are_not_installed(
    capsys: pytest.CaptureFixture[str], hopper: None, replace_package: Replace
) -> None:
    """DeepGEMM's absence costs speed, llguidance is no option, others are a choice."""
    for name in ("deep_gemm", "llguidance", "pynvml"):
        replace_package(name, None)
    _, found = look(capsys, "--port", "0")
    verdicts = {name: one["verdict"] for name, one in found.items() if name.startswith("packages")}
    assert verdicts["packages: DeepGEMM"] == "warn"
    assert verdicts["packages: llguidance"] == "fail"
    assert verdicts["packages: nvidia-ml-py"] == "ok"
    assert found["packages: DeepGEMM"]["advice"] == "pip install 'millrace[gpu]'"


def test_a_pinned_package_of_another_version(
    monkeypatch: pytest.MonkeyPatch, hopper: None, replace_package: Replace
) -> None:
    replace_package("deep_gemm", "__version__ = '0.1.3'")
    installed = {"sgl-deep-gemm": "0.1.3", "apache-tvm-ffi": "0.1.9"}
    monkeypatch.setattr(packages.metadata, "version", installed.__getitem__)
    assert next(iter(packages.packages(hopper=True))).value == "0.1.3"
    installed["apache-tvm-ffi"] = "0.1.15"
    found = next(iter(packages.packages(hopper=True)))
    assert (found.verdict, found.value) == ("warn", "loads, but with apache-tvm-ffi 0.1.15")
    assert found.advice == "pip install 'apache-tvm-ffi==0.1.9'"


def test_other_machines_do_not_import_deep_gemm(replace_package: Replace) -> None:
    replace_package("deep_gemm", "raise ImportError('no CUDA here')")
    found = next(iter(packages.packages(hopper=False)))
    assert (found.name, found.verdict) == ("DeepGEMM", "ok")


def test_collectives_need_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--collectives"]) == 2
    assert "needs a MODEL" in capsys.readouterr().err


def test_what_fails_is_shown_last() -> None:
    findings = [
        Finding("machine", "disk", "full", "fail", "delete something"),
        Finding("machine", "memory", "enough"),
        Finding("packages", "uvloop", "old", "warn"),
        Finding("model", "by name", "mini"),
    ]
    console = Console(file=io.StringIO(), width=80)
    show(findings, console)
    assert isinstance(console.file, io.StringIO)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert lines == [
        *("model", "ok by name mini", "packages", "warn uvloop old"),
        *("machine", "ok memory enough", "FAIL disk full", "delete something"),
        "4 looked at: 1 fails, 1 warns",
        "FAIL machine: disk: full; delete something",
    ]
