"""What disks, editors and other versions do to a file, at random and repeatably."""

from __future__ import annotations

import json
import random
from typing import Any

ODD = [None, True, 0, -1, 2**70, 1e308, "", "x", "../../x", "\ud800", [], {}, [[]], {"x": {}}]
"""In place of a value of JSON."""


def damaged(content: bytes, *, seed: int) -> bytes:
    """The content of a file after a mishap."""
    draw = random.Random(seed)
    kinds = [_cut, _flipped, _emptied, _garbage, _doubled, _other_encoding, _deep]
    if _parsed(content) is not None:
        kinds += [_changed] * 12
    elif content[:1] == b"{":
        kinds += [_line_changed] * 6
    return draw.choice(kinds)(content, draw)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) or 1)]


def _flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 3, 30])):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _emptied(content: bytes, draw: random.Random) -> bytes:
    return draw.choice([b"", b"\n", b"null", b"{}", b"[]", b"0", b'"x"', b"[{}]", b"\0" * 64])


def _garbage(content: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(draw.choice([1, 100, 5000]))


def _doubled(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) or 1)
    return content[:at] + content


def _other_encoding(content: bytes, draw: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    return draw.choice(
        [text.encode("utf-16"), b"\xef\xbb\xbf" + content, b"\xff\xfe" + content, content + b"\xff"]
    )


def _deep(content: bytes, draw: random.Random) -> bytes:
    return b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n"


def _changed(content: bytes, draw: random.Random) -> bytes:
    """One value or key of the JSON."""
    value = json.loads(content)
    _change(value, draw)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _line_changed(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    if draw.random() < 0.3:
        lines[at] = draw.choice([b"", lines[at] * 2, lines[at][:-1], b"[1]\n", b'"x"\n', b"{}\n"])
    elif _parsed(lines[at]) is not None:
        lines[at] = _changed(lines[at], draw) + b"\n"
    return b"".join(lines)


def _change(value: Any, draw: random.Random) -> None:
    """Somewhere inside, in place."""
    while True:
        inside = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not inside:
            return
        key = draw.choice(inside)
        if isinstance(value[key], (dict, list)) and value[key] and draw.random() < 0.8:
            value = value[key]
            continue
        action = draw.randrange(6)
        if action == 0:
            del value[key]
        elif action == 1 and isinstance(value, dict):
            value[f"{key}x"] = value.pop(key)
        elif action == 2 and isinstance(value, list):
            value.append(value[key])
        elif action == 3:
            value[key] = str(value[key])
        else:
            value[key] = draw.choice(ODD)
        return
