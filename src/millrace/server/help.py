"""What `millrace serve --help` shows: a page that fits a screen, a group, or every option.

`--help` alone shows the options that most users need and the names of the groups; `--help=all`
shows everything, `--help=GROUP` a group, and `--help=WORD` the options with WORD in their name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

COMMON = (
    *("host", "port", "served_model_name", "api_key", "max_model_len", "max_num_seqs"),
    *("speculative_config", "kv_cache_dtype", "gpu_memory_utilization", "tensor_parallel_size"),
    *("replicas", "device"),
)

GROUPS: Mapping[str, tuple[str, ...]] = {
    "model": (
        *("served_model_name", "tokenizer", "skip_tokenizer_init", "revision", "download_dir"),
        *("hf_overrides", "quantization", "dtype", "load_format", "generation_config"),
        *("override_generation_config", "chat_template", "default_chat_template_kwargs"),
        *("reasoning_parser", "tool_call_parser", "seed"),
    ),
    "memory": (
        *("max_model_len", "max_num_seqs", "block_size", "kv_cache_dtype"),
        *("mamba_ssm_cache_dtype", "gpu_memory_utilization", "kv_cache_memory_bytes"),
        *("enable_prefix_caching", "snapshot_interval", "snapshot_distance", "num_snapshots"),
        *("host_cache_gb", "disk_cache", "disk_cache_gb"),
    ),
    "hand-over": (
        *("role", "kv_transfer_host", "kv_transfer_port", "kv_transport", "kv_lease"),
        *("kv_load_failure_policy",),
    ),
    "scheduling": (
        *("max_num_batched_tokens", "mixed_prefill_tokens", "long_prefill_token_threshold"),
        *("max_num_partial_prefills", "max_long_partial_prefills", "scheduling_policy"),
        *("async_scheduling", "speculative_config", "max_queue", "max_logprobs", "stream_interval"),
    ),
    "devices": (
        *("device", "tensor_parallel_size", "replicas", "policy", "gateway_processes", "engine"),
        *("engine_command", "engine_args", "enforce_eager", "prefill_graphs"),
    ),
    "server": (
        *(
            "host",
            "port",
            "uds",
            "root_path",
            "api_key",
            "gateway_api_key",
            "admin_key",
            "cache_salt_by_api_key",
            "ssl_keyfile",
            "ssl_certfile",
            "ssl_ca_certs",
        ),
        *("ssl_cert_reqs", "allowed_origins", "allowed_methods", "allowed_headers"),
        *("allow_credentials", "max_body_bytes", "max_bodies_bytes", "max_header_bytes"),
        *("read_timeout", "shutdown_timeout", "max_engine_restarts", "enable_request_id_headers"),
        *("max_stored_responses", "max_stored_bytes", "enable_force_include_usage"),
        *("enable_per_request_metrics", "return_tokens_as_token_ids"),
    ),
    "logs": (
        *("log_level", "log_format", "disable_log_stats"),
        *("disable_uvicorn_access_log", "disable_access_log_for_endpoints", "uvicorn_log_level"),
        *("otlp_traces_endpoint", "plan_log", "step_timeout", "report_expert_load", "debug"),
    ),
}
OTHERS = "more"  # the group of options that no group names


def grouped(options: Sequence[click.Option]) -> dict[str, list[click.Option]]:
    """Group -> its options, in their order there."""
    named = {str(option.name): option for option in options if option.name != "help"}
    found = {
        group: [named.pop(name) for name in names if name in named]
        for group, names in GROUPS.items()
    }
    return {group: rows for group, rows in {**found, OTHERS: [*named.values()]}.items() if rows}


def write_options(
    context: click.Context, formatter: click.HelpFormatter, options: Sequence[click.Option],
    topic: str,
) -> None:  # fmt: skip
    """Write the options that `topic` names: "" the common ones, all, a group, or a word."""
    groups = grouped(options)
    if topic == "all":
        _write(context, formatter, groups)
    elif not topic:
        _write(context, formatter, {"common options": [o for o in options if o.name in COMMON]})
        _write_topics(formatter, groups)
    elif topic in groups:
        _write(context, formatter, {topic: groups[topic]})
    else:
        found = [o for o in options if any(topic.replace("_", "-") in name for name in o.opts)]
        if not found:
            raise click.UsageError(
                f"--help={topic}: no option has that in its name; use --help=all, or a group: "
                f"{', '.join(groups)}",
                context,
            )
        _write(context, formatter, {f"options with {topic}": found})


def _write(
    context: click.Context,
    formatter: click.HelpFormatter,
    groups: Mapping[str, Sequence[click.Option]],
) -> None:
    for title, options in groups.items():
        rows = [row for option in options if (row := option.get_help_record(context))]
        with formatter.section(title.capitalize()):
            formatter.write_dl(rows)


def _write_topics(
    formatter: click.HelpFormatter, groups: Mapping[str, Sequence[click.Option]]
) -> None:
    count = sum(map(len, groups.values()))
    with formatter.section("More"):
        formatter.write_dl([
            ("--help=all", f"All {count} options."),
            (f"--help={'|'.join(groups)}", "The options of one group."),
            ("--help=WORD", "The options with WORD in their name."),
            ("--config FILE", "Options from a YAML file; the command line comes first."),
        ])  # fmt: skip
    formatter.write_paragraph()
    formatter.write_text("Flags of vLLM work here, or say what does; see docs/vllm_flags.md.")
