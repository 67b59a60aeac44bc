"""Chat messages to a prompt, by the template of a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twotower_client.errors import RequestRefusedError
from twotower_client.openai.problems import refused

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
TOKENS = ("bos_token", "eos_token")


class ChatTemplate:
    """A template in Jinja's language, as tokenizers have it.

    Args:
        source: The template.
        tokens: Texts of special tokens, which it may use.

    Raises:
        RequestRefusedError: It is no template.
    """

    def __init__(self, source: str, tokens: dict[str, str] | None = None) -> None:
        import jinja2.exceptions
        import jinja2.sandbox

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True
        )
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        self._problem = jinja2.exceptions.TemplateError
        self._tokens = tokens or {}
        try:
            self._template = environment.from_string(source)
        except self._problem as problem:
            raise RequestRefusedError(f"the chat template cannot be read: {problem}") from None

    def prompt(self, messages: Any) -> str:
        """Return the prompt of some messages.

        Raises:
            ApiError: They are wrong, or the template refuses them.
        """
        if not isinstance(messages, list) or not messages:
            raise refused("messages", "must be a list of messages, and not empty")
        plain = [_plain(number, message) for number, message in enumerate(messages)]
        try:
            return self._template.render(messages=plain, add_generation_prompt=True, **self._tokens)
        except (self._problem, TypeError) as problem:
            raise refused("messages", f"do not fit the chat template: {problem}") from None


def read_template(path: Path) -> ChatTemplate | None:
    """Return the template of a file, or of a folder with a tokenizer; None where it has none.

    Raises:
        RequestRefusedError: It is no template.
        OSError: It cannot be read.
    """
    if path.is_file():
        return ChatTemplate(path.read_text(encoding="utf-8"))
    config: dict[str, Any] = {}
    if (path / CONFIG_FILE).is_file():
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    tokens = {
        name: value.get("content", "") if isinstance(value, dict) else value
        for name in TOKENS
        if (value := config.get(name)) is not None
    }
    source = config.get("chat_template")
    if (path / TEMPLATE_FILE).is_file():
        source = (path / TEMPLATE_FILE).read_text(encoding="utf-8")
    return ChatTemplate(source, tokens) if isinstance(source, str) else None


def _plain(number: int, message: Any) -> dict[str, Any]:
    """Return a message whose content is text."""
    name = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise refused(name, "must be an object with a role and a content")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise refused(f"{name}.content", "has a part that is no text; this model reads text")
        content = "".join(map(str, texts))
    if not isinstance(content, str):
        raise refused(f"{name}.content", "must be text")
    return {**message, "content": content}


def _raise(message: str) -> None:
    import jinja2.exceptions

    raise jinja2.exceptions.TemplateError(message)
