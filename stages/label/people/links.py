"""Annotators' links: a token each, made once, so that a link stays good when the server starts again."""

import ipaddress
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path


def tokens_of(annotators: Sequence[str], path: Path) -> dict[str, str]:
    """Annotator -> token, in the given order; new ones are added to the file, which only its owner can read."""
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tokens = {name: known.get(name) or secrets.token_urlsafe(24) for name in annotators}
    if tokens.keys() - known.keys():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(known | tokens, file)
        temporary.replace(path)
    return tokens


def links_of(tokens: Mapping[str, str], host: str, port: int) -> dict[str, str]:
    """Annotator -> link. The token stands behind the #, so that it is in no request line and in no log."""
    shown = f"[{host}]" if ":" in host else host
    return {name: f"http://{shown}:{port}/#{token}" for name, token in tokens.items()}


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
