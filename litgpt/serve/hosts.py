"""Whether a request is meant for this machine, or a page of another site made a browser send it here.

The domain of another site may resolve to this machine (DNS rebinding); the browser then takes the server for that
site. An address cannot.
"""

import ipaddress
import re
from collections.abc import Sequence
from typing import Optional, Union

AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s\[\]:@/\\?#%,]+))(?::[0-9]{0,5})?", re.IGNORECASE)
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([^/]*)", re.IGNORECASE)
Host = Union[str, ipaddress.IPv4Address, ipaddress.IPv6Address]


def parse_host(authority: str) -> Optional[Host]:
    """The host in `HOST:PORT`: an address, or a name in lower case without a final dot. None for anything else."""
    found = AUTHORITY.fullmatch(authority)
    if found is None:
        return None
    name = found[2] and found[2].lower().removesuffix(".")
    try:
        return ipaddress.IPv6Address(found[1]) if found[1] else ipaddress.IPv4Address(name)
    except ValueError:
        return name or None


def is_local(authority: str) -> bool:
    """Whether a Host header is an address or `localhost`."""
    host = parse_host(authority)
    return host is not None and (host == "localhost" or not isinstance(host, str))


def is_own(origin: str, hosts: Sequence[str]) -> bool:
    """Whether an Origin header belongs to a page of this machine, on any port.

    Args:
        hosts: The Host headers of the request.
    """
    found = ORIGIN.fullmatch(origin)
    host = parse_host(found[1]) if found else None
    if host is None:
        return False
    loopback = host == "localhost" if isinstance(host, str) else host.is_loopback
    return loopback or host in map(parse_host, hosts)
