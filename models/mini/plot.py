"""Draws the training log: losses of the first phase, agreement of the drafts in the second.

python models/mini/plot.py models/mini/results
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the directory of train.py's log.json")
    results = parser.parse_args().results
    log = json.loads((results / "log.json").read_text())["log"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    main_phase = [entry for entry in log if entry["phase"] == "main"]
    steps = [entry["step"] for entry in main_phase]
    for name, label in (("loss", "next token"), ("mtp_1", "MTP head, one step ahead")):
        left.plot(steps, [entry[name] for entry in main_phase], label=label)
    left.set(yscale="log", xlabel="step of 65,536 tokens", ylabel="cross-entropy, nats")
    left.set_title("the model, with the MTP head's first step")
    mtp_phase = [entry for entry in log if entry["phase"] == "mtp"]
    for k in range(1, 6):
        shares = [1 - entry[f"agree_{k}"] for entry in mtp_phase]
        right.plot([entry["step"] for entry in mtp_phase], shares, label=f"draft {k}")
    right.set(yscale="log", xlabel="step", ylabel="drafts unlike the model's choice")
    right.set_title("the MTP head alone, five steps ahead")
    for axis in (left, right):
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(results / "training.png", dpi=110)


if __name__ == "__main__":
    main()
