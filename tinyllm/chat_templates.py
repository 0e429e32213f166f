"""Chat templates: how a published model wants a conversation spelt.

A model tuned for chat has seen each conversation as one text, with special tokens between what the system,
the user and the assistant say. Its folder brings the program that writes such a text from a list of messages,
in the language Jinja. It may come from anywhere, so it runs in Jinja's sandbox, given nothing but plain data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from tinyllm.errors import InputError

INSTALL = 'pip install -e ".[tokenizers]"'
SAFE_JINJA = (3, 1, 6)  # older ones have known ways out of the sandbox
Messages = Sequence[Mapping[str, Any]]  # {"role": "user", "content": "Hello"}


class ChatTemplate:
    """A template and the names of special tokens that it may write, {"bos_token": "<s>", ...}.

    Messages are dicts with a "role", mostly system, user or assistant, and a "content". The same texts come
    out as of transformers' apply_chat_template(messages, tokenize=False).
    """

    def __init__(self, source: str, names: Mapping[str, str], folder: str | Path) -> None:
        self.source, self.names, self.folder = source, dict(names), folder

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The conversation as one text; add_generation_prompt: up to where the assistant's answer begins.

        Raises InputError where the library is missing, and for messages that the template cannot spell.
        """
        try:
            return self._program.render(
                messages=plain(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.names,
            )
        except Exception as error:  # a program from elsewhere may fail in any way
            raise self._failed(error) from None

    @cached_property
    def _program(self) -> Any:
        try:
            return _sandbox().from_string(self.source)
        except Exception as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> InputError:
        if isinstance(error, InputError):
            return error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return InputError(
            f"the chat template of {self.folder} fails: {reason}; change the messages, or leave it out "
            "(generate.py --raw) and write the prompt as the model expects it"
        )


def plain(messages: Any) -> Any:
    """A copy made of what JSON knows, so that no object with methods gets into the sandbox."""
    try:
        return json.loads(json.dumps(messages))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages are lists, dicts and texts such as JSON has: {error}") from None


def find_template(jinja_file: bytes | None, settings: Mapping[str, Any], folder: Path) -> str | None:
    """chat_template.jinja, else "chat_template" in tokenizer_config.json: a text, or a list of named ones."""
    if jinja_file is not None:
        try:
            return jinja_file.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"chat_template.jinja in {folder} is damaged: {error}; copy it again") from None
    template = settings.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = {str(entry.get("name")): entry.get("template") for entry in template}
        if "default" not in named:
            raise InputError(
                f"no chat template of {folder} is named default: rename one of {', '.join(named)}"
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise InputError(f'"chat_template" in tokenizer_config.json in {folder} is no text; copy it again')
    return template


def _sandbox() -> Any:
    """What templates run in, with the settings, the functions and the tags that transformers gives them."""
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise InputError(f"a chat template is run by the library jinja2: {INSTALL}") from None
    version = metadata.version("jinja2")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < SAFE_JINJA:
        raise InputError(f"hostile chat templates get out of the sandbox of jinja2 {version}: {INSTALL}")

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks, for training, what the assistant says."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Jinja's own spells < as \\u003c, for web pages."""
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
