"""What servers say, without what belongs in no log."""

from __future__ import annotations

import re

MAX_TEXT = 400  # characters of what a service says

IS = r"[\\\"']*\s*[:=]\s*[\\\"']*"  # between a name and its value, maybe quoted, and that again
VALUE = r"[^\s\\\"',;&]+"

# Should a server or a proxy repeat it: tokens, passwords, keys, signed claims and addresses.
SECRETS = re.compile(
    rf"(?P<kept>(?i:authorization{IS}))(?!\(left out\))(?i:(?:basic|bearer|digest)\s+)?{VALUE}"
    rf"|(?i:bearer\s+|(?:passw(?:or)?d|pwd|secret|api[_-]?key|cookie){IS}){VALUE}"
    # Not of a lexer's "unexpected token: x" and a model's "missing signature: x".
    rf"|(?i:token(?:=|[\\\"']+\s*[:=]|(?<=[_-]token)\s*:)\s*[\\\"']*|signature=){VALUE}"
    r"|(?<=://)[^\s/@]+(?=@)"
    r"|ya29\.[\w.-]+|AIza[\w-]+|eyJ[\w-]+\.[\w.-]+"
    r"|-----BEGIN [A-Z ]+-----.*?(?:-----END [A-Z ]+-----|$)",
    re.DOTALL,
)


def without_secrets(text: str) -> str:
    """A text with its secrets left out, its lines as they are."""
    return SECRETS.sub(lambda found: f"{found['kept'] or ''}(left out)", text)


def one_line(text: str) -> str:
    """What a server says, in one line that holds no secrets; of its traceback the first words."""
    plain = " ".join(without_secrets(text).split())
    return plain if len(plain) <= MAX_TEXT else plain[: MAX_TEXT - 3] + "..."
