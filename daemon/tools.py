"""Structured answers and tools: what a request asks for -> what the engine is told, and back.

Gemma 3n has no turn of its own for tools. It is told about them in the way that its makers describe
for prompts (ai.google.dev/gemma/docs/capabilities/function-calling), and a grammar keeps the answer
to a call of one of them, or, where the model may choose, to a call or plain text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nestd.bundle.errors import BadRequest
from nestd.daemon.engine.messages import ChatMessage, Structure, TextContent
from nestd.daemon.mqtt.contract import Request, Tool, ToolCall

INSTRUCTIONS = (
    "You have access to functions. If you decide to invoke any of the function(s), you MUST put it "
    'in the format of {"name": function name, "parameters": dictionary of argument name and its '
    "value}. You SHOULD NOT include any other text in the response if you call a function."
)


def structure_of(request: Request) -> Structure | None:
    """Return what the answer has to keep to, None for free text.

    Raises:
        BadRequest: tools and a schema at once, or a choice of a tool that is not there.
    """
    tools = chosen_tools(request)
    schema = request.response_format.schema_of_answer()
    if schema is not None and tools:
        raise BadRequest("tools and a JSON response_format exclude each other: choose one")
    if schema is not None:
        return Structure(json_schema=json.dumps(schema))
    if not tools:
        return None
    calls = [_call_schema(tool) for tool in tools]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return Structure(json_schema=json.dumps(schema), or_text=request.tool_choice == "auto")


def chosen_tools(request: Request) -> tuple[Tool, ...]:
    """Return the tools that the answer may call.

    Raises:
        BadRequest: `tool_choice` names none of them.
    """
    choice = request.tool_choice
    if choice == "none":
        return ()
    if choice in ("auto", "required"):
        if choice == "required" and not request.tools:
            raise BadRequest("tool_choice is required and there are no tools: add some")
        return request.tools
    chosen = tuple(tool for tool in request.tools if tool.name == choice)
    if not chosen:
        raise BadRequest(
            f"tool_choice is {choice!r}: write auto, none, required or the name of a tool"
        )
    return chosen


def with_tools(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> tuple[ChatMessage, ...]:
    """Return the conversation with the tools explained and their results as the user's turns."""
    turns = [tool_result(turn) if turn.role == "tool" else turn for turn in messages]
    if not tools:
        return tuple(turns)
    described = json.dumps([tool.model_dump() for tool in tools], ensure_ascii=False)
    text = f"{INSTRUCTIONS}\n\n{described}"
    if turns and turns[0].role == "system":
        text = f"{plain(turns.pop(0))}\n\n{text}"
    return (ChatMessage(role="system", content=text), *turns)


def call_of(text: str, tools: Sequence[Tool]) -> ToolCall | None:
    """Return the call that an answer is, None for text or an answer that was cut off."""
    if not tools or not text.startswith("{"):
        return None
    try:
        document: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    # A grammar keeps the engine's answers to this form; a remote server's, or a text that takes an
    # answer's place, may be any JSON.
    name, arguments = document.get("name"), document.get("parameters")
    if name not in {tool.name for tool in tools} or not isinstance(arguments, dict):
        return None
    return ToolCall(name=name, arguments=arguments)


def _call_schema(tool: Tool) -> dict[str, Any]:
    properties = {"name": {"const": tool.name}, "parameters": tool.parameters}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def tool_result(turn: ChatMessage) -> ChatMessage:
    """Return what a function returned as a turn of the user."""
    return ChatMessage(role="user", content=f"The function returned:\n{plain(turn)}")


def plain(turn: ChatMessage) -> str:
    """Return the text of a turn in one piece."""
    if isinstance(turn.content, str):
        return turn.content
    return "".join(part.text for part in turn.content if isinstance(part, TextContent))
