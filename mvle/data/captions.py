"""What the words of a caption tell: its id, whether a mirrored image would make it false, whether it names a colour."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

NO_FLIP = 1  # bits of the index column caption.flags
NAMES_COLOUR = 2

TEXT_FIELDS = ("txt", "txt-lines")  # names of a caption field that mean the text file, not an entry of the JSON

# "right now" is caught too: an unflipped image costs nothing, a false caption does.
_SIDES = re.compile(r"\b(?:left|right)(?:most|wards?|hand|handed|side)?\b", re.IGNORECASE)
# Words for how bright a thing is, too: that is changed with the colours.
_COLOURS = re.compile(
    r"\b(?:(?:redd?|green|blue?|yellow|orange?|purple?|violet|pink|brown|black|white?|gr[ae]y|cyan|magenta|turquoise|teal"
    r"|maroon|beige|tan|gold|silver|crimson|scarlet|navy|lavender|olive)(?:s|y|ish|n?er|n?est|ness|ned|en|ened|ening|ed|ing)?"
    r"|bluer|golden|amber|copper|charcoal|chestnut|two-tone|khaki|burgundy|aqua|indigo|lilac|mauve|fuchsia|ivory|bronze|auburn|cream|peach|coral|rusty?|emerald|ruby|ginger"
    r"|platinum|lime|ochre|redhead(?:ed|s)?|blond(?:e|es|s)?|brunettes?|b&w"
    r"|(?:multi-?|tri|dis)?colou?r(?:s|ed|ful|fully|less)?|gr[ae]yscale|monochrom(?:e|atic)|sepia|rainbow|pastel|neon|tinted"
    r"|dark(?:er|est|ened|ness)?|bright(?:er|est|ly|ened|ness)?|lighter|(?:sun|back)lit|dim(?:ly|med|mer)?|pale(?:r|st)?|vivid(?:ly)?|faded)\b",
    re.IGNORECASE,
)


class CaptionError(ValueError):
    """A pair whose caption cannot be read; the message is the reason."""


def bytes_id(data: bytes) -> int:
    """A 64-bit hash as int64: the id of an image's bytes. Equal bytes have equal ids everywhere."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def text_id(caption: str) -> int:
    """The id of a caption: captions that differ in case and spaces alone are the same."""
    return bytes_id(" ".join(caption.lower().split()).encode("utf-8", "replace"))


def caption_flags(caption: str) -> int:
    """NO_FLIP and NAMES_COLOUR as they hold."""
    return NO_FLIP * bool(_SIDES.search(caption)) + NAMES_COLOUR * bool(_COLOURS.search(caption))


def lines_of(text: str) -> list[str]:
    """Its lines, where Unix, Windows or old Macs end them; str.splitlines would also cut at rarer signs."""
    return re.split(r"\r\n|\n|\r", text)


def captions_of(components: Mapping[str, bytes], field: str | None) -> list[str]:
    """The captions of one pair, stripped, blank ones dropped.

    components: suffix -> bytes of "json" and "txt". field names an entry of the JSON (a string or a list of them; a.b
    goes into objects, and into each object of a list), or the text file: "txt" is one caption, "txt-lines" one a line.
    None takes the first of JSON "captions", JSON "caption", and the text file (one caption) that is there.
    Raises CaptionError where there is none.
    """
    candidates: list[Any] = []
    names: list[str] = []
    if field not in TEXT_FIELDS and "json" in components:
        try:
            record = json.loads(components["json"])
        except (ValueError, RecursionError) as error:
            raise CaptionError(f"its .json is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise CaptionError("its .json is not an object with fields")
        candidates = [_entry(record, name) for name in ([field] if field else ["captions", "caption"])]
        names = sorted(record)
    if field in (None, *TEXT_FIELDS) and "txt" in components:
        text = components["txt"].decode("utf-8-sig", "replace")
        candidates.append(lines_of(text) if field == "txt-lines" else text)
    for candidate in candidates:
        texts = [candidate] if isinstance(candidate, str) else candidate if isinstance(candidate, list) else []
        captions = [" ".join(text.split()) for text in texts if isinstance(text, str)]
        if captions := [text for text in captions if text]:
            return captions
    has = f"; the .json has {', '.join(names[:12])}" if names else ""
    raise CaptionError(f"nothing in {field or 'captions or caption of its .json, nor in a .txt'}{has}")


def _entry(record: Any, name: str) -> Any:
    """The entry `name` of an object; else, step by step, the one that dots lead to."""
    if isinstance(record, list):
        return [_entry(item, name) for item in record if isinstance(item, dict)]
    if not isinstance(record, dict):
        return None
    if name in record:
        return record[name]
    first, dot, rest = name.partition(".")
    return _entry(record[first], rest) if dot and first in record else None
