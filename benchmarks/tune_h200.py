"""`millrace tune` on one GPU with the shapes of Qwen3.5-27B-FP8 and random weights, in short parts.

A part ends by itself after `--seconds`; the same command goes on where it ended. The study is in
`--dir`, its report in `report.html` there.

    python benchmarks/tune_h200.py --dir study --seconds 225            # what serves a load best
    python benchmarks/tune_h200.py --dir phases --walk --seconds 225    # the write-up's phases
    python benchmarks/tune_h200.py --dir tiny --tiny --seconds 60       # small, on any machine
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from model_shapes import write_config

from millrace.model.tiny import TinyShape, config_json

SPACE = Path(__file__).resolve().with_suffix(".yaml")
MILLRACE = [sys.executable, "-m", "millrace.cli"]
_ENDING = 60.0  # seconds until a study that is told to end has ended


def model(directory: Path, *, tiny: bool) -> Path:
    """A directory with a config.json alone; weights are drawn at the start."""
    if not tiny:
        return write_config(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json(TinyShape())))
    return directory


def begun(options: argparse.Namespace) -> list[str]:
    """The command that begins a study. Its load is the write-up's: 512 to 1,024 tokens and 256 to
    512 more, 256 in flight; a tenth of that for the tiny model."""
    part = 16 if options.tiny else 1
    kind = "write-up" if options.walk else "run"
    words = [*MILLRACE, "tune", kind, str(model(options.dir / "model", tiny=options.tiny))]
    words += ["--space", str(SPACE), "--dir", str(options.dir / "study")]
    words += ["--random-input-len", str(1024 // part), "--random-output-len", str(512 // part)]
    words += ["--random-range-ratio", "0.5", "--random-range-convention", "inferencex"]
    words += ["--max-concurrency", str(256 // part), "--num-prompts", str(768 // part)]
    words += ["--short-share", "0.67", "--num-warmups", str(32 // part), "--accuracy-items", "0"]
    words += ["--full-runs", "1", "--trials", str(options.trials), "--finalists", "1"]
    words += ["--least-rounds", "3", "--most-rounds", "4", "--draft-rounds", "0"]
    words += ["--start-timeout", "200", "--hang-timeout", "60", "--seed", str(options.seed)]
    return [*words, "--", "--load-format", "dummy", "--skip-tokenizer-init"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=225.0)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--walk", action="store_true", help="the write-up's phases, no search")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    study = options.dir / "study"
    goes_on = (study / "journal.jsonl").exists()
    words = [*MILLRACE, "tune", "resume", str(study)] if goes_on else begun(options)
    print("+", " ".join(words), file=sys.stderr, flush=True)
    tuning = subprocess.Popen(words)
    try:
        status = tuning.wait(options.seconds)
    except subprocess.TimeoutExpired:
        tuning.send_signal(signal.SIGTERM)  # it notes that its visit begins anew
        try:
            status = tuning.wait(_ENDING)
        except subprocess.TimeoutExpired:
            tuning.kill()
            status = tuning.wait()
        print("not ended: the same command goes on", file=sys.stderr)
    sys.exit(0 if status == 128 + signal.SIGTERM else status)


if __name__ == "__main__":
    main()
