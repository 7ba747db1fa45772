"""Tokens as text: the bytes that a token stands for, and the tokens that a text hides."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any


@cache
def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level tokenizers write for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def token_bytes(token: str, is_byte_level: bool, is_special: bool) -> bytes:
    """The bytes of text that a token stands for."""
    if is_byte_level and not is_special:
        alphabet = _byte_alphabet()
        if all(char in alphabet for char in token):
            return bytes(alphabet[char] for char in token)
    elif re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode("utf-8", "surrogatepass")


def find_hidden(added_tokens: dict[int, Any], shown: Sequence[str] = ()) -> set[int]:
    """Special tokens that a decoded text leaves out: all but those in a text of `shown`.

    A stop text such as "<end_of_turn>" can then be found in the text.
    """
    return {
        i
        for i, token in added_tokens.items()
        if token.special and not any(token.content in text for text in shown)
    }
