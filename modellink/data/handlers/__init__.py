"""What is done with a record before it is tokenized; chosen with --handler-name."""

import difflib
from collections.abc import Sequence

from modellink.config.errors import ConfigError
from modellink.data.handlers.dialogues import (
    AlpacaStyleInstructionHandler,
    BelleMultiTurnInstructionHandler,
    GeneralInstructionHandler,
    InstructionHandler,
    LeetcodePythonInstructionHandler,
    LlamaFactoryInstructionHandler,
    MessagesInstructionHandler,
    MOSSInstructionHandler,
    MOSSMultiTurnHandler,
    QwenConversationHandler,
    SharegptStyleInstructionHandler,
)
from modellink.data.handlers.pairs import AlpacaStylePairwiseHandler, SharegptStylePairwiseHandler
from modellink.data.handlers.records import KeyMap
from modellink.data.handlers.text import (
    AlpacaPretrainHandler,
    GeneralPretrainHandler,
    StackOverflowPythonPretrainHandler,
    TextHandler,
    WikiTextPretrainHandler,
    WrittenPretrainHandler,
)

KEYED = {handler.__name__: handler for handler in (GeneralPretrainHandler, WikiTextPretrainHandler)}
WRITTEN: dict[str, type[WrittenPretrainHandler]] = {
    handler.__name__: handler for handler in (AlpacaPretrainHandler, StackOverflowPythonPretrainHandler)}
DIALOGUES: dict[str, type[InstructionHandler]] = {handler.__name__: handler for handler in (
    GeneralInstructionHandler, AlpacaStyleInstructionHandler, SharegptStyleInstructionHandler,
    LlamaFactoryInstructionHandler, MessagesInstructionHandler, QwenConversationHandler,
    BelleMultiTurnInstructionHandler, MOSSInstructionHandler, MOSSMultiTurnHandler, LeetcodePythonInstructionHandler,
    AlpacaStylePairwiseHandler, SharegptStylePairwiseHandler)}
DIALOGUES["OpenAIInstructionHandler"] = MessagesInstructionHandler  # its name in later versions of the original
HANDLERS = [*KEYED, *WRITTEN, *DIALOGUES]

Handler = TextHandler | InstructionHandler

__all__ = ["HANDLERS", "GeneralPretrainHandler", "Handler", "InstructionHandler", "TextHandler", "is_pairwise",
           "make_handler"]


def make_handler(name: str, keys: tuple[str, ...], key_map: KeyMap | None = None,
                 sources: Sequence[KeyMap] = ()) -> Handler:
    """The handler called `name`.

    Args:
        keys: --json-keys, for plain text.
        key_map: names in the file, for records.
        sources: names in each input, for LlamaFactoryInstructionHandler.

    Raises:
        ConfigError: there is none of that name.
    """
    if name in KEYED:
        return KEYED[name](keys)
    if name in WRITTEN:
        return WRITTEN[name](key_map or KeyMap())
    if name == "LlamaFactoryInstructionHandler":
        return LlamaFactoryInstructionHandler(key_map or KeyMap(), tuple(sources))
    if name in DIALOGUES:
        return DIALOGUES[name](key_map or KeyMap())
    near = difflib.get_close_matches(name, HANDLERS, n=1)
    raise ConfigError(f"--handler-name {name}: no such handler; there is {', '.join(HANDLERS)}"
                      f"{f'; did you mean {near[0]}?' if near else ''}.")


def is_pairwise(handler: Handler) -> bool:
    """Whether a record of the handler makes two dialogues."""
    return isinstance(handler, AlpacaStylePairwiseHandler | SharegptStylePairwiseHandler)
