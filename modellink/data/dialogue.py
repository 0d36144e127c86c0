"""What every instruction format becomes before a template is laid over it."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

from modellink.config.errors import ConfigError

Role = Literal["user", "assistant"]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a dialogue; what a tool answered is a user turn, a call of a tool an assistant turn."""

    role: Role
    content: str


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation.

    Attributes:
        turns: in order.
        system: the system text; None leaves it to the template.
        tools: what the system text says about tools; empty without any.
        place: where it stands in the input, for messages.
    """

    turns: tuple[Turn, ...]
    system: str | None = None
    tools: str = ""
    place: str = ""

    def system_text(self, default: str | None) -> str:
        """The whole system text with `default` where the dialogue brings none; empty: no system turn."""
        return "\n\n".join(part for part in (default if self.system is None else self.system, self.tools) if part)


def replies(dialogue: Dialogue) -> int:
    """Number of assistant turns."""
    return sum(turn.role == "assistant" for turn in dialogue.turns)


class ToolText:
    """Tools, calls and answers of tools in the ReAct form that Qwen was trained on.

    Args:
        words: `react` of templates.json.
    """

    def __init__(self, words: dict[str, str]):
        self.words = words

    def system(self, place: str, tools: Any) -> str:
        """What the system text says about a `tools` column: a JSON list, its text, or nothing."""
        described = [self._describe(place, tool) for tool in self._list(place, "tools", tools)]
        if not described:
            return ""
        return self.words["system"].format(tools="\n\n".join(text for _, text in described),
                                           names=",".join(name for name, _ in described))

    def call(self, place: str, value: Any) -> str:
        """The assistant's words for one call or a list of calls: objects with `name` and `arguments`, or their text."""
        calls = self._list(place, "a function call", value)
        if not calls:
            raise ConfigError(f"{place}: a function call that calls nothing; mend or remove this record.")
        return "\n".join(self._call(place, call) for call in calls)

    def observation(self, text: str) -> str:
        """The user's words for the answer of a tool."""
        return self.words["observation"].format(content=text)

    def _call(self, place: str, call: Any) -> str:
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ConfigError(f"{place}: a function call without a name; it must be an object with name and arguments.")
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return self.words["call"].format(name=call["name"], arguments=arguments)

    def _describe(self, place: str, tool: Any) -> tuple[str, str]:
        tool = tool.get("function", tool) if isinstance(tool, dict) else tool
        name = tool.get("name") or tool.get("name_for_model") if isinstance(tool, dict) else None
        if not isinstance(name, str):
            raise ConfigError(f"{place}: a tool without a name; every tool must be an object with name, description "
                              "and parameters.")
        return name, self.words["tool"].format(
            name=name, human_name=tool.get("name_for_human") or name,
            description=tool.get("description") or tool.get("description_for_model") or "",
            parameters=json.dumps(tool.get("parameters", {}), ensure_ascii=False))

    def _list(self, place: str, what: str, value: Any) -> Sequence[Any]:
        if value is None or value == "":
            return []
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{place}: {what} is no valid JSON: {error.msg}; mend or remove this record.") \
                    from error
        return value if isinstance(value, list) else [value]
