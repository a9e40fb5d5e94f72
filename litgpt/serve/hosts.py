"""Whether a request means this machine, or a page of another site had a browser send it here.

A name of another site may be made to point here (DNS rebinding); then the browser takes the server for that site. An
address cannot.
"""

import ipaddress
import re
from collections.abc import Sequence
from typing import Optional, Union

AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s\[\]:@/\\?#%,]+))(?::[0-9]{0,5})?", re.IGNORECASE)
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([^/]*)", re.IGNORECASE)
Host = Union[str, ipaddress.IPv4Address, ipaddress.IPv6Address]


def host_of(authority: str) -> Optional[Host]:
    """The host of `HOST:PORT`: an address, or a name in lower case without the dot at its end. None for what is not
    just that."""
    found = AUTHORITY.fullmatch(authority)
    if found is None:
        return None
    name = found[2] and found[2].lower().removesuffix(".")
    try:
        return ipaddress.IPv6Address(found[1]) if found[1] else ipaddress.IPv4Address(name)
    except ValueError:
        return name or None


def is_local(authority: str) -> bool:
    """Whether a Host header is an address or `localhost`, and no other name."""
    host = host_of(authority)
    return host is not None and (host == "localhost" or not isinstance(host, str))


def is_own(origin: str, hosts: Sequence[str]) -> bool:
    """Whether an Origin header is of a page of this machine, on whatever port.

    Args:
        hosts: The Host headers of the request.
    """
    found = ORIGIN.fullmatch(origin)
    host = host_of(found[1]) if found else None
    if host is None:
        return False
    own = host == "localhost" if isinstance(host, str) else host.is_loopback
    return own or host in [host_of(name) for name in hosts]
