"""LangChain's ChatOpenAI against a server, feature by feature; prints the result of each.

    python benchmarks/langchain_client.py http://127.0.0.1:8000 MODEL

It needs langchain-openai, in an environment of its own.
"""

from __future__ import annotations

import sys
from typing import Any

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

WHERE: dict[str, Any] = {"base_url": f"{sys.argv[1]}/v1", "api_key": "unused", "model": sys.argv[2]}
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
SUM = [SystemMessage("Be brief."), HumanMessage("What is 3 + 4?")]


class Person(BaseModel):
    name: str
    age: int


@tool
def weather(city: str, days: int) -> str:
    """The weather of a city."""
    return f"sunny in {city} for {days} days"


def chat(**fields: Any) -> ChatOpenAI:
    return ChatOpenAI(**WHERE, max_retries=0, max_tokens=200, **fields)


def main() -> None:
    llm = chat(extra_body=OFF, temperature=0)
    answer = llm.invoke(SUM)
    print("invoke   ", answer.content, answer.usage_metadata)
    print("stream   ", "".join(str(chunk.content) for chunk in llm.stream(SUM)))
    print("batch    ", [one.content for one in llm.batch(["What is 1 + 2?", "What is 5 + 5?"])])
    both = chat(n=2, temperature=1, extra_body=OFF).generate([SUM]).generations[0]
    print("n        ", [one.text for one in both])
    told = llm.bind(logprobs=True, top_logprobs=2).invoke(SUM).response_metadata["logprobs"]
    print("logprobs ", [entry["logprob"] for entry in told["content"]])
    tools(llm)
    for method in ("json_schema", "function_calling", "json_mode"):
        bound = llm.with_structured_output(Person, method=method, include_raw=True)
        print(method, bound.invoke("Ann is 7 years old. Answer in JSON."))
    print("responses", chat(use_responses_api=True, temperature=0).invoke(SUM).content)
    print("complete ", repr(OpenAI(**WHERE, max_tokens=8).invoke("Once upon")))


def tools(llm: ChatOpenAI) -> None:
    """A call, the same streamed, and its result."""
    question = HumanMessage("What is the weather in Rio?")
    bound = llm.bind_tools([weather], tool_choice="weather")
    call = bound.invoke([question])
    print("tool     ", call.tool_calls)
    streamed: Any = None
    for chunk in bound.stream([question]):
        streamed = chunk if streamed is None else streamed + chunk
    print("streamed ", streamed.tool_calls)
    first = call.tool_calls[0]
    result = ToolMessage(weather.invoke(first["args"]), tool_call_id=first["id"])
    print("result   ", llm.bind_tools([weather]).invoke([question, call, result]).content)


if __name__ == "__main__":
    main()
