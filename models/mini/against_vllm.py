"""vLLM and Millrace compared: greedy answers to held-out items, in bf16, token by token.

    python models/mini/against_vllm.py --vllm-python PATH [--model millrace-mini-int4]

PATH is the Python of an environment with vLLM (`benchmarks/cpu_vs_vllm.py --setup` makes one). Both
get the same prompt token ids, and the script exits with 1 if any answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

from millrace import LLM, SamplingParams
from millrace.eval.evaluation import make_all

MODELS = Path(__file__).parents[1]
OTHER = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, asked, answered, most = sys.argv[1:]
    prompts = [{"prompt_token_ids": ids} for ids in json.load(open(asked))]
    llm = LLM(model, dtype="bfloat16", max_model_len=1536, max_num_seqs=8, enforce_eager=True,
              gpu_memory_utilization=0.3, enable_prefix_caching=False)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=int(most)))
    json.dump([list(o.outputs[0].token_ids) for o in outputs], open(answered, "w"))
"""


def ours(
    model: Path, num_items: int, seed: int, most: int
) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, answers) as token ids."""
    items = make_all(["policy", "math", "chat"], num_items, seed)
    options = {"dtype": "bfloat16", "max_model_len": 1536, "max_num_seqs": 8}
    with LLM(str(model), enable_prefix_caching=False, **options) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=most)
        outputs = llm.chat([item.messages for item in items], params)
    return [o.prompt_token_ids for o in outputs], [o.outputs[0].token_ids for o in outputs]


def theirs(model: Path, python: str, prompts: list[list[int]], most: int) -> list[list[int]]:
    """vLLM's answers, from a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        script, asked, answered = (Path(name) / part for part in ("run.py", "asked", "answered"))
        script.write_text(OTHER)
        asked.write_text(json.dumps(prompts))
        command = [python, str(script), str(model), str(asked), str(answered), str(most)]
        env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
        env.pop("PYTHONPATH", None)
        subprocess.run(command, check=True, env=env, timeout=1800)
        answers: list[list[int]] = json.loads(answered.read_text())
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--model", default="millrace-mini", help="one of models/")
    parser.add_argument("--num-items", type=int, default=40, help="of each task")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=400)
    args = parser.parse_args()
    model = MODELS / args.model
    prompts, answers = ours(model, args.num_items, args.seed, args.max_tokens)
    others = theirs(model, args.vllm_python, prompts, args.max_tokens)
    same = sum(a == b for a, b in zip(answers, others, strict=True))
    print(f"{same} of {len(answers)} answers equal, {sum(map(len, answers))} tokens")
    return 0 if same == len(answers) else 1


if __name__ == "__main__":
    raise SystemExit(main())
