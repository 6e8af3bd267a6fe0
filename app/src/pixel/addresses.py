"""Addresses of clients. A client is an IPv4 address or an IPv6 /64, as at the balancer."""

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

PREFIX = "addr:"
"""Start of an address's name as an author, and as a client in ``moderation``."""


def parse(text: str) -> IPv4Address | IPv6Address:
    """The address; IPv4 if it is mapped to IPv6. Raises ValueError."""
    address = ip_address(text.removesuffix("/64") if ":" in text else text)
    return getattr(address, "ipv4_mapped", None) or address


def name(address: IPv4Address | IPv6Address) -> str:
    """The client's name, as in addr:192.0.2.7 or addr:2001:db8:1:2::/64."""
    if isinstance(address, IPv4Address):
        return f"{PREFIX}{address}"
    return f"{PREFIX}{IPv6Network((int(address) >> 64 << 64, 64))}"
