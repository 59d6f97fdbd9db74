"""URLs of stores on a server: telling them from folders, and writing them without secrets."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

_SECRETS = ("password", "sslpassword")


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
