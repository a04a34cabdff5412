"""Answers the requests of a Ray Dataset: python examples/ray_batch.py IN OUT --base-url URL

IN: a directory of JSON lines with custom_id and body. OUT: a directory for Parquet files. After a
kill the same command goes on from Ray's checkpoints in OUT.done.
"""

from __future__ import annotations

import argparse

import ray
from ray.data.checkpoint import CheckpointConfig

from millrace.offline.ray_data import answer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("requests")
    parser.add_argument("answers")
    parser.add_argument("--base-url", action="append", required=True)
    parser.add_argument("--max-in-flight", type=int, default=256)
    parser.add_argument("--rows-at-once", type=int, default=2048)
    parser.add_argument("--num-cpus", type=int, help="Of a Ray that is started for this.")
    options = parser.parse_args()
    ray.init(num_cpus=options.num_cpus)

    # Before the dataset is read: rows that were written are read again, but not answered again.
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="custom_id",
        checkpoint_path=f"{options.answers}.done",
        delete_checkpoint_on_success=False,
    )
    rows = ray.data.read_json(options.requests, file_extensions=["jsonl"])
    answered = answer(
        rows,
        base_url=options.base_url,
        max_in_flight=options.max_in_flight,
        rows_at_once=options.rows_at_once,
    )
    answered.write_parquet(options.answers)


if __name__ == "__main__":
    main()
