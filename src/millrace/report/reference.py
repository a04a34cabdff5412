"""Transformers' log-probabilities of given answers: a process of its own.

    python -m millrace.report.reference MODEL SAMPLED.json OUT.json

It runs on the GPU where the weights fit into its free memory, else on the CPU where they fit there;
where they fit nowhere, the file says so. FP8 checkpoints are dequantised as they are loaded.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from millrace.report.steps.journal import write_whole

_SLACK = 1.15  # of the weights' memory, for what else a forward takes
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str]) -> int:
    model, sampled, out = arguments
    answers = json.loads(Path(sampled).read_bytes())
    write_whole(Path(out), json.dumps(computed(Path(model), answers)).encode())
    return 0


def computed(directory: Path, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The log-probabilities of every answer, by dtype; or why there are none."""
    weights = parameters(directory)
    places = {name: device_for(weights * _bytes(dtype)) for name, dtype in _DTYPES.items()}
    fits = {name: device for name, device in places.items() if device is not None}
    if not fits:
        need = weights * 2 / 1e9
        return {"absent": f"its weights take {need:.0f} GB in bfloat16, and that is not free here"}
    found: dict[str, Any] = {"devices": fits, "logprobs": {}}
    for name, device in fits.items():
        model = load(directory, _DTYPES[name], device)
        found["logprobs"][name] = [_forced(model, one, device) for one in answers]
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    import transformers

    return {**found, "transformers": transformers.__version__}


def _bytes(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def parameters(directory: Path) -> int:
    """How many weights a checkpoint has, by the headers of its files."""
    from safetensors import safe_open

    count = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                size = 1
                for extent in file.get_slice(name).get_shape():
                    size *= extent
                count += size
    return count


def device_for(size: float) -> str | None:
    """Where so many bytes of weights fit: the GPU, else the host's memory; None: nowhere."""
    need = size * _SLACK
    if torch.cuda.is_available() and need < torch.cuda.mem_get_info()[0]:
        return "cuda"
    # On a CPU a model of many billions would take hours.
    return "cpu" if need < min(_available(), 32e9) else None


def _available() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return float(line.split()[1]) * 1024
    return 0.0


def load(directory: Path, dtype: torch.dtype, device: str) -> Any:
    """The model of transformers, its weights in `dtype`."""
    sys.modules.setdefault("fla", None)  # type: ignore[arg-type]  # it tunes anew at every length
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype}
    config = AutoConfig.from_pretrained(directory)
    quantization = getattr(config, "quantization_config", None)
    if quantization and _method(quantization) == "fp8":
        from transformers import FineGrainedFP8Config

        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, **options)
    return model.to(device=device, dtype=dtype).eval()


def _method(quantization: Any) -> str:
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", ""))
    return str(getattr(quantization, "quant_method", ""))


@torch.inference_mode()
def _forced(model: Any, answer: dict[str, Any], device: str) -> list[float]:
    """The log-probability of each token of an answer, given all before it."""
    prompt, tokens = answer["prompt"], answer["tokens"]
    ids = torch.tensor([prompt + tokens], device=device)
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    wanted = torch.tensor(tokens, device=device)
    found = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
    return [float(value) for value in found]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
