"""Every field of the four APIs that generate, and what becomes of it in each: one table.

A field is served, has no effect, or is refused with what works instead, and it means the same
wherever it is served. The rules of the endpoints and docs/api_fields.md are made of this table;
`python -m millrace.server.api.field_table` prints that page. How a field is served is not known
here, nor are the types of its values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Api = Literal["chat", "completions", "responses", "messages"]
APIS: tuple[Api, ...] = ("chat", "completions", "responses", "messages")
PATHS: Mapping[Api, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}


class Refusal(NamedTuple):
    """Why a field is refused. neutral: values at which it changes nothing, and is accepted; null
    always is."""

    reason: str
    neutral: tuple[Any, ...] = ()


Fate = Literal["served", "no effect"] | Refusal


def _fields(
    names: str,
    served: str = "",
    *,
    no_effect: str = "",
    why: str = "",
    neutral: tuple[Any, ...] = (),
    **reasons: str,
) -> dict[str, dict[Api, Fate]]:
    """Fields with the same fates. served, no_effect: APIs; the others refuse them, each for its
    own reason, else for `why`, else because the field belongs to the APIs that serve it."""
    owners = " and ".join(PATHS[api] for api in APIS if api in served.split())
    fates: dict[Api, Fate] = {}
    for api in APIS:
        if api in served.split():
            fates[api] = "served"
        elif api in no_effect.split():
            fates[api] = "no effect"
        else:
            fates[api] = Refusal(reasons.get(api) or why or f"it belongs to {owners}", neutral)
    return dict.fromkeys(names.split(), fates)


_EVERYWHERE = " ".join(APIS)
_CHATS = "chat responses messages"
_OPENAI = "chat completions"
_TEXT_ONLY = "the model reads and writes text only"
_STATELESS = "the server leaves conversations as they are"
_NOTHING_CLEARED: tuple[Any, ...] = (
    {"edits": []},
    {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
)
_BUDGET = "use thinking.budget_tokens"
_SAMPLING = "sampling has temperature, top_p, top_k, min_p and penalties"

FIELDS: Mapping[str, Mapping[Api, Fate]] = {
    # --- what is served -------------------------------------------------------------------------
    **_fields("model stream cache_salt priority stream_interval", _EVERYWHERE),
    **_fields("temperature top_p top_k min_p seed", _EVERYWHERE),
    **_fields("presence_penalty frequency_penalty repetition_penalty logit_bias", _EVERYWHERE),
    **_fields("allowed_token_ids bad_words min_tokens ignore_eos", _EVERYWHERE),
    **_fields("stop stop_token_ids include_stop_str_in_output", _EVERYWHERE),
    **_fields("skip_special_tokens structured_outputs speculative_method", _EVERYWHERE),
    **_fields("max_tokens", "chat completions messages", responses="use max_output_tokens"),
    **_fields(
        "max_completion_tokens", "chat", completions="use max_tokens", messages="use max_tokens",
        responses="use max_output_tokens",
    ),
    **_fields(
        "max_output_tokens", "responses", why="use max_tokens", chat="use max_completion_tokens"
    ),
    **_fields("stop_sequences", "messages", neutral=([],), why="use stop"),
    **_fields("n", _OPENAI, neutral=(1,), why="an answer is one; send the request again"),
    **_fields("best_of", "completions", neutral=(1,), chat="use n", why="an answer is one"),
    **_fields("prompt", "completions", chat="use messages", messages="use messages",
              responses="there are no stored prompts; send instructions and input"),
    **_fields("messages", "chat messages", completions="it belongs to /v1/chat/completions",
              responses="use input"),
    **_fields("input", "responses", chat="use messages", messages="use messages",
              completions="use prompt"),
    **_fields("system", "messages", why="send it as a message", responses="use instructions",
              completions="it belongs to /v1/messages"),
    **_fields("instructions", "responses", chat="send them as a system message",
              messages="use system", completions="it belongs to /v1/responses"),
    **_fields("tools tool_choice", _CHATS, completions="it belongs to /v1/chat/completions",
              neutral=([], "none")),
    **_fields("parallel_tool_calls", "chat responses", neutral=(True,),
              messages="use tool_choice.disable_parallel_tool_use",
              completions="it belongs to /v1/chat/completions"),
    **_fields("chat_template_kwargs", _CHATS, neutral=({},),
              completions="it belongs to /v1/chat/completions"),
    **_fields("thinking", "chat messages", responses="use reasoning",
              completions="it belongs to /v1/messages"),
    **_fields("enable_thinking", "chat", messages="use thinking", responses="use reasoning",
              completions="it belongs to /v1/chat/completions"),
    **_fields("thinking_token_budget", "chat", messages=_BUDGET, responses="no field bounds it",
              completions="it belongs to /v1/chat/completions"),
    **_fields("reasoning", "chat responses", messages="use thinking, or output_config.effort",
              completions="it belongs to /v1/responses"),
    **_fields("reasoning_effort", "chat", responses="use reasoning.effort",
              messages="use thinking, or output_config.effort",
              completions="it belongs to /v1/chat/completions"),
    **_fields("enable_response_messages", "responses", neutral=(False,),
              why="return_token_ids has the ids"),
    **_fields("include_reasoning", "chat responses", neutral=(True,), messages="use thinking",
              completions="it belongs to /v1/chat/completions"),
    **_fields("response_format", _OPENAI, responses="use text.format",
              messages="use output_config.format", neutral=({"type": "text"},)),
    **_fields("text", "responses", chat="use response_format", completions="use response_format",
              messages="use output_config.format", neutral=({}, {"format": {"type": "text"}})),
    **_fields("output_config output_format", "messages", chat="use response_format", neutral=({},),
              completions="use response_format", responses="use text.format"),
    **_fields("guided_json guided_regex guided_choice guided_grammar", _OPENAI,
              why="use structured_outputs"),
    **_fields("logprobs", _OPENAI, neutral=(False,), messages="this API shows none",
              responses='use include: ["message.output_text.logprobs"] and top_logprobs'),
    **_fields("top_logprobs", "chat responses", neutral=(0,), messages="this API shows none",
              completions="use logprobs"),
    **_fields("prompt_logprobs", _OPENAI, why="this API shows none"),
    **_fields("logprob_token_ids", _OPENAI, why="this API shows none"),
    **_fields("echo", _OPENAI, neutral=(False,)),
    **_fields("return_token_ids return_tokens_as_token_ids", _OPENAI, neutral=(False,)),
    **_fields("return_prompt_text", "chat", neutral=(False,)),
    **_fields("resume_token_ids", _OPENAI),
    **_fields("kv_transfer_params", _OPENAI, neutral=({},),
              why="/v1/chat/completions and /v1/completions hand prompts over"),
    **_fields("truncate_prompt_tokens truncation_side", _OPENAI, responses="use truncation",
              messages="shorten the messages"),
    **_fields("truncation", "responses", neutral=("disabled",), messages="shorten the messages",
              why="use truncate_prompt_tokens"),
    **_fields("add_special_tokens", _OPENAI, why="the template writes them", neutral=(False,)),
    **_fields("add_generation_prompt", "chat", neutral=(True,)),
    **_fields("continue_final_message", "chat", neutral=(False,),
              messages="a last message of the assistant is continued"),
    **_fields("documents", "chat", neutral=([],)),
    **_fields("stream_options", _OPENAI, no_effect="responses messages"),
    **_fields("previous_response_id include max_tool_calls", "responses", neutral=([],)),
    **_fields("background", "responses", neutral=(False,)),
    # --- what has no effect ---------------------------------------------------------------------
    **_fields("user safety_identifier prompt_cache_key", "responses",
              no_effect="chat completions messages"),
    **_fields("store metadata", "responses", no_effect="chat completions messages"),
    **_fields("service_tier prompt_cache_retention request_id session_id prompt_cache_options "
              "return_token_offsets mm_payload return_mm_kwargs client_metadata "
              "betas inference_geo diagnostics user_profile_id workspace_id",
              no_effect=_EVERYWHERE),
    **_fields("cache_control", "messages", no_effect="chat completions responses"),
    **_fields("rid cache_prompt id_slot timings_per_token return_progress keep_alive",
              no_effect=_EVERYWHERE),
    # --- what no API serves ---------------------------------------------------------------------
    **_fields("use_beam_search", why="outputs are sampled; n gives several", neutral=(False,)),
    **_fields("length_penalty", why="it belongs to beam search", neutral=(1,)),
    **_fields("early_stopping", why="it belongs to beam search", neutral=(False,)),
    **_fields("suffix", why="the model was not trained to fill gaps", neutral=("",)),
    **_fields("logits_processors", neutral=([],),
              why="code of a client is not run here; logit_bias may do"),
    **_fields("custom_logit_processor", why="code of a client is not run here; logit_bias may do"),
    **_fields("spaces_between_special_tokens", why="tokens are shown as their own bytes",
              neutral=(True,)),
    **_fields("functions", why="use tools", neutral=([],)),
    **_fields("function_call", why="use tool_choice", neutral=("none", "auto")),
    **_fields("chat_template",
              why="the checkpoint's is used; chat_template_kwargs sets its variables"),
    **_fields("think", why="use reasoning_effort, or chat_template_kwargs"),
    **_fields("verbosity", why="the model knows no such setting; say it in a message",
              neutral=("medium",)),
    **_fields("modalities", why=_TEXT_ONLY, neutral=(["text"],)),
    **_fields("audio", why=_TEXT_ONLY),
    **_fields("mm_processor_kwargs media_io_kwargs", why=_TEXT_ONLY, neutral=({},)),
    **_fields("prediction", why="the model drafts for itself"),
    **_fields("web_search_options", why="the server fetches nothing; offer a tool"),
    **_fields("mcp_servers", why="the server calls no tools itself; offer them as tools",
              neutral=([],)),
    **_fields("container", why="the server runs no code"),
    **_fields("context_management", why=_STATELESS, neutral=_NOTHING_CLEARED,
              responses="conversations are left as they are; truncation auto cuts them"),
    **_fields("conversation",
              why="there are no conversation objects; use previous_response_id of /v1/responses"),
    **_fields("previous_input_messages",
              why="use previous_response_id of /v1/responses, or send the whole input"),
    **_fields("moderation", why="nothing is moderated"),
    **_fields("speed", why="there is one speed", neutral=("standard",)),
    **_fields("prompt_embeds input_embeds", why="prompts are text or token ids"),
    **_fields("input_ids", why="/v1/completions takes token ids as its prompt"),
    **_fields("ec_transfer_params", why="prompts are texts"),
    **_fields("vllm_xargs", why="the engine takes no arguments of extensions", neutral=({},)),
    **_fields("guided_decoding_backend", why="there is one, llguidance"),
    **_fields("guided_whitespace_pattern", why="white space in JSON is the model's choice"),
    **_fields("repetition_detection", why="use repetition_penalty or stop"),
    **_fields("watermarking", why="texts are not marked", neutral=(False,)),
    **_fields("return_weight_versions", neutral=(False,),
              why="the weights stay the same while the server runs"),
    **_fields("routed_experts_prompt_start", why="no experts are reported", neutral=(0,)),
    **_fields("return_hidden_states return_routed_experts", why="they are not reported",
              neutral=(False,)),
    # of llama.cpp, SGLang and Ollama
    **_fields("json_schema", why="use structured_outputs.json", neutral=({}, "")),
    **_fields("regex", why="use structured_outputs.regex", neutral=("",)),
    **_fields("ebnf grammar", why="use structured_outputs.grammar", neutral=("",)),
    **_fields("format", why="use response_format", neutral=("",)),
    **_fields("options", why="send the fields themselves", neutral=({},)),
    **_fields("n_predict num_predict", why="use max_tokens", neutral=(-1,)),
    **_fields("max_new_tokens", why="use max_tokens"),
    **_fields("repeat_penalty", why="use repetition_penalty", neutral=(1,)),
    **_fields("typical_p tfs_z", why=_SAMPLING, neutral=(1,)),
    **_fields("dynatemp_range xtc_probability dry_multiplier mirostat top_a", why=_SAMPLING,
              neutral=(0,)),
    **_fields("no_stop_trim", why="use include_stop_str_in_output", neutral=(False,)),
    **_fields("separate_reasoning", neutral=(True,),
              why="start the server with --reasoning-parser none"),
    **_fields("stream_reasoning", why="use include_reasoning", neutral=(True,)),
    **_fields("lora lora_path", why="the server has no adapters", neutral=([],)),
}  # fmt: skip

_THINKING: Mapping[str, Fate] = {
    "type": "served", "budget_tokens": "served", "display": "no effect",
}  # fmt: skip
_REASONING: Mapping[str, Fate] = {
    "effort": "served", "summary": "no effect", "generate_summary": "no effect",
    "enabled": Refusal("use reasoning_effort none to turn it off", (True,)),
    "exclude": Refusal("use include_reasoning", (False,)),
    "max_tokens": Refusal("use thinking_token_budget of /v1/chat/completions"),
}  # fmt: skip
_USAGE: Mapping[str, Fate] = {
    "include_usage": "served", "continuous_usage_stats": "served",
    "include_obfuscation": "no effect",
}  # fmt: skip
# Fields within fields. What stands beside them is unknown.
NESTED: Mapping[tuple[Api, str], Mapping[str, Fate]] = {
    ("chat", "stream_options"): _USAGE,
    ("completions", "stream_options"): _USAGE,
    ("chat", "thinking"): _THINKING,
    ("messages", "thinking"): _THINKING,
    ("chat", "reasoning"): _REASONING,
    ("responses", "reasoning"): _REASONING,
    ("responses", "text"): {
        "format": "served",
        "verbosity": Refusal("the model knows no such setting; say it in a message", ("medium",)),
    },
    ("messages", "output_config"): {
        "format": "served", "effort": "served", "task_budget": "no effect",
    },
}  # fmt: skip


class FieldRules(NamedTuple):
    """What becomes of the fields that an endpoint's body has not. nested: of those within its
    own fields, by the name of these."""

    fates: Mapping[str, Fate]
    nested: Mapping[str, Mapping[str, Fate]]


def field_rules(api: Api) -> FieldRules:
    """The rules of an API."""
    nested = {name: fates for (owner, name), fates in NESTED.items() if owner == api}
    return FieldRules({name: fates[api] for name, fates in FIELDS.items()}, nested)


def counting_rules(api: Api) -> FieldRules:
    """The rules of an endpoint that only counts or shows an API's prompts: what is served there
    has no effect on them, unless it is a field of the endpoint's own body."""
    rules = field_rules(api)
    fates = rules.fates.items()
    return rules._replace(
        fates={name: "no effect" if fate == "served" else fate for name, fate in fates}
    )


# --- docs/api_fields.md -------------------------------------------------------------------------

_OPENING = """# Fields of the API

What becomes of each field of a body. **yes**: it is served, and means the same wherever it is.
*no effect*: it is accepted and changes nothing, which the log says once. Else the request gets 400
with code `unsupported_parameter` and these words, unless the field is `null` or has one of the
values in brackets. A field that is not in the table is ignored, and the log says so once.
[api.md](api.md) says what the fields mean. `python -m millrace.server.api.field_table` prints this
page.
"""
_TITLES = ("field", *(f"`{PATHS[api]}`" for api in APIS))


def page() -> str:
    """The table as a page of the documents."""
    names = sorted(FIELDS)
    served = [name for name in names if "served" in FIELDS[name].values()]
    without = [name for name in names if all(one == "no effect" for one in FIELDS[name].values())]
    refused = [name for name in names if name not in {*served, *without}]
    within: dict[str, dict[Api, Fate]] = {}
    for (api, owner), inner in NESTED.items():
        for name, fate in inner.items():
            within.setdefault(f"{owner}.{name}", {})[api] = fate
    parts = [
        _OPENING,
        _table(_TITLES, [_row(name, FIELDS[name]) for name in served]),
        "## Fields within fields",
        "Where a cell is empty the API has no such field.",
        _table(_TITLES, [_row(name, within[name]) for name in sorted(within)]),
        "## Without effect everywhere",
        ", ".join(f"`{name}`" for name in without) + ".",
        "## Refused everywhere",
        _table(("field", "why, and what works"), [_refusals(name) for name in refused]),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(name: str, fates: Mapping[Api, Fate]) -> tuple[str, ...]:
    return (f"`{name}`", *(_cell(fates.get(api)) for api in APIS))


def _refusals(name: str) -> tuple[str, str]:
    """What most of the APIs say, and those that say something else."""
    said = [(api, _cell(FIELDS[name][api])) for api in APIS]
    common = said[0][1]
    others = [f"`{PATHS[api]}`: {words}" for api, words in said if words != common]
    return f"`{name}`", "; ".join([common, *others])


def _cell(fate: Fate | None) -> str:
    if fate is None:
        return ""
    if not isinstance(fate, Refusal):
        return "**yes**" if fate == "served" else "*no effect*"
    values = ", ".join(f"`{json.dumps(one)}`" for one in fate.neutral)
    reason = fate.reason.replace("|", "\\|")
    return f"{reason} ({values})" if values else reason


if __name__ == "__main__":
    print(page(), end="")
