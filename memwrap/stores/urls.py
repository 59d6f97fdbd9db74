"""URLs of stores on a server: telling them from folders, and writing them without secrets."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

_SECRETS = ("password", "sslpassword")
_NUMBERS = {"m": 16, "ef_construction": 64, "ef_search": 128}


def is_url(place: str | Path) -> bool:
    """Tell whether a store's place is a server's URL, of whatever kind, and no folder."""
    return not isinstance(place, Path) and "://" in place


def without_password(url: str, **more: object) -> str:
    """Return the URL as it may be shown and written into files, with `more` parameters."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(a URL that cannot be read)"
    place = parts.netloc.rpartition("@")
    user = place[0].partition(":")[0]
    netloc = f"{user}@{place[2]}" if place[0] else place[2]
    query = [(k, v) for k, v in parse_qsl(parts.query) if k not in _SECRETS]
    query += [(k, str(v)) for k, v in more.items()]
    return urlunsplit(parts._replace(netloc=netloc, query=urlencode(query, quote_via=quote)))


def without_secrets(text: str) -> str:
    """Return a text, such as a word of a command, without passwords of URLs in it and values of
    keys that are called after secrets."""
    text = re.sub(r"(://[^:/@\s]*):[^/\s]*@", r"\1@", text)
    return re.sub(r"((?:token|password|secret)['\"]?\s*[=:]\s*)[^,}&\s]+", r"\1***", text)


def parts_of(url: str) -> tuple[str, str, dict[str, int]]:
    """Split a URL: that for libpq, the table, and the index's settings."""
    parts = urlsplit(url)
    if parts.scheme not in ("postgresql", "postgres"):
        raise ValueError("`url` must begin with postgresql://.")
    table, settings, rest = "memwrap_store", dict(_NUMBERS), []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name == "table":
            table = value
        elif name in settings:
            if not value.isdigit() or not int(value):
                raise ValueError(f"`{name}` in the URL is {value!r}; it must be a number from 1.")
            settings[name] = int(value)
        else:
            rest.append((name, value))
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,40}", table):
        raise ValueError(
            f"`table` in the URL is {table!r}; it must be small letters, digits and underscores."
        )
    return urlunsplit(parts._replace(query=urlencode(rest, quote_via=quote))), table, settings


def hidden(text: str, url: str) -> str:
    """Return an error's text without the URL's password."""
    password = urlsplit(url).password
    return text.replace(password, "***") if password else text
