"""Chats in transformers' form: their checks, their texts, their images and their questions."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.image_utils import load_image

from ._checks import check
from .images import PreparedImage
from .routing import is_unicode

IMAGE_TOKEN = "<image>"
_KINDS = ("image", "image_url", "text")
_SOURCES = ("image", "url", "path", "base64")  # the keys under which a part of type image can have its image


def check_chats(chats: Sequence[Any]) -> None:
    """Raise unless each chat is a list of messages with a role and a content.

    Raises:
        TypeError: a chat, a message, a role or a text has another type.
        ValueError: a message lacks its role.
    """
    for chat in chats:
        check(isinstance(chat, Sequence), "conversation", "must be a list of messages", chat, TypeError)
        for message in chat:
            is_message = isinstance(message, Mapping)
            check(is_message, "conversation", "must hold messages with role and content", message, TypeError)
            role = message.get("role")
            check(isinstance(role, str), "conversation", "must have the role of each message", role)
            for part in _parts(message):
                text = part.get("text") if part["type"] == "text" else ""
                check(isinstance(text, str), "conversation", "must have text in a part of type text", text, TypeError)
                check(is_unicode(str(text)), "conversation", "must be valid Unicode", text)


def message_text(message: Mapping[str, Any]) -> str:
    """Join the content of a message to one text, with :data:`IMAGE_TOKEN` in the place of each image."""
    return "".join(part["text"] if part["type"] == "text" else f"{IMAGE_TOKEN}\n" for part in _parts(message))


def chat_images(chat: Sequence[Mapping[str, Any]]) -> list[PreparedImage]:
    """Return the images in the parts of a chat, in their order; a URL is fetched, as in transformers."""
    parts = [part for message in chat for part in _parts(message) if part["type"] != "text"]
    return [PreparedImage(_source(part)) for part in parts if any(key in part for key in (*_SOURCES, "image_url"))]


def chat_questions(chat: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the user's text of each turn; turns with images alone are left out."""
    said = [
        "".join(part["text"] for part in _parts(message) if part["type"] == "text")
        for message in chat
        if message["role"] == "user"
    ]
    return [text for text in said if text.strip()]


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content or ""}]
    is_list = isinstance(content, list | tuple)
    check(is_list, "conversation", "must have a string or a list of parts as content", content, TypeError)
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else part
        check(kind in _KINDS, "conversation", "must hold parts of type image or text", kind)
    return list(content)


def _source(part: Mapping[str, Any]) -> Any:
    """Return the source of an image part in a form that ``open_image`` takes."""
    if part["type"] == "image_url":  # OpenAI's form
        url = part["image_url"]
        part = {"url": url["url"] if isinstance(url, Mapping) else url}
    given = [key for key in _SOURCES if key in part]
    check(len(given) == 1, "conversation", f"must have one of {', '.join(_SOURCES)} in an image's part", given)
    source = part[given[0]]
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return load_image(source)
    if isinstance(source, str) and (given == ["base64"] or source.startswith("data:")):
        try:
            return base64.b64decode(source.rpartition(",")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(f"conversation must have base64 where an image says so, got {source[:40]!r}") from error
    return source
