"""Reviews all documents by `millrace batch`, and writes a page of the findings.

    python -m examples.insurance.review --base-url http://127.0.0.1:8081
    python -m examples.insurance.review --policies 100

The first asks the gateway of the running example, the second runs an engine of its own. A killed
review goes on where it was: run the same command again. --plan-gpu has the planner say what a
replica on that GPU would take.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from examples.insurance.documents.insurer import draw_insurer
from examples.insurance.documents.writing import write_all
from examples.insurance.retrieval.chunks import all_chunks
from examples.insurance.review.findings import (
    KINDS,
    Finding,
    documents_of,
    findings_of,
    known_exclusions,
    request_lines,
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--base-url", help="a server; without one the model is run here")
    parser.add_argument("--model", default="millrace-mini")
    parser.add_argument("--policies", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("build/insurance"))
    parser.add_argument("--plan-gpu", help="of the planner's estimate, such as h200")
    return parser.parse_args()


def main() -> int:
    args = parse()
    folder = args.folder / f"review-{args.policies}"
    folder.mkdir(parents=True, exist_ok=True)
    insurer = draw_insurer(args.policies)
    written = [document for document in write_all(insurer) if document.kind in KINDS]
    documents = documents_of(all_chunks(written))
    owners = {document.name: document.policy or document.form for document in written}
    status = answered(documents, args, folder)
    if status:
        return status
    results = [folder / "results.jsonl", folder / "results.errors.jsonl"]
    findings = findings_of(results, documents, owners, known_exclusions(insurer))
    page = folder / "review.html"
    page.write_text(page_of(findings))
    print(summary(findings))
    if args.plan_gpu:
        print(estimate(folder / "results.jsonl", args))
    print(page)
    return 0


def answered(documents: dict[str, dict[str, str]], args: argparse.Namespace, folder: Path) -> int:
    """Run the batch; its exit status."""
    requests = folder / "requests.jsonl"
    lines = "".join(request_lines(documents, args.model))
    if not requests.exists() or requests.read_text() != lines:
        requests.write_text(lines)
    command = [
        sys.executable, "-m", "millrace", "batch", "-i", str(requests),
        "-o", str(folder / "results.jsonl"), "--model", args.model,
    ]  # fmt: skip
    command += ["--base-url", args.base_url] if args.base_url else []
    return subprocess.run(command, check=False).returncode


def summary(findings: Sequence[Finding]) -> str:
    right, wrong, missed = (
        sum(getattr(one, name) for one in findings) for name in ("right", "wrong", "missed")
    )
    failed = sum(bool(one.failed) for one in findings)
    return (
        f"{len(findings)} documents, {failed} without a finding. Exclusions: {right} found, "
        f"{missed} missed, {wrong} that are none"
    )


def page_of(findings: Sequence[Finding]) -> str:
    folder = Path(__file__).parent
    pages = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True)
    return pages.get_template("page.html").render(findings=findings, summary=summary(findings))


def estimate(output: Path, args: argparse.Namespace) -> str:
    """What the planner expects of one replica, for the lengths that were seen."""
    from millrace.batch.journal import read_counts
    from millrace.model_lookup import find_model
    from millrace.offline.policy_batch import estimate

    return estimate(read_counts(output), args.plan_gpu, str(find_model(args.model)), 1, 256)


if __name__ == "__main__":
    sys.exit(main())
