"""Base weights from the inventory, and effective weights after the controller's shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Share(NamedTuple):
    """A backend's share, set by the controller.

    `factor` multiplies its base weight, 0 to 1; `down` means no requests at all.
    """

    factor: float
    down: bool


FULL = Share(1.0, False)


class Capacity(NamedTuple):
    """A host's capacity from the inventory.

    `explicit` is 0 and `measured` (requests/s) is 0.0 if not set; `instance_type` may be empty.
    """

    instances: int
    vcpus: int
    instance_type: str
    explicit: int
    measured: float


@dataclass(frozen=True)
class Policy:
    """The source of weights: the role's `nginx_lb_weights`, `…_factors` and `…_factor_default`."""

    source: str
    factors: dict[str, float]
    factor_default: float

    def factor(self, instance_type: str) -> float:
        """Return the factor of an instance type: its own, its family's, or the default."""
        family = instance_type.split(".")[0]
        return self.factors.get(instance_type, self.factors.get(family, self.factor_default))


def base_weights(hosts: Sequence[Capacity], policy: Policy) -> list[int]:
    """Compute the weight of one instance of each host.

    A host's weight is divided evenly among its instances; weights are the smallest integers in that ratio:
    12 and 8 become 3 and 2, and with two instances on the first host 3 (twice) and 4.

    Args:
        hosts: The capacity of each host.
        policy: The source of weights.

    Returns:
        One positive integer for each host, in the order of `hosts`.
    """
    best = max(host.measured for host in hosts)

    def whole(host: Capacity) -> int:
        if policy.source == "measured":
            return max(1, round(100 * host.measured / best))
        return host.explicit or round(host.vcpus * policy.factor(host.instance_type))

    multiple = math.lcm(*(host.instances for host in hosts))
    return smallest([whole(host) * multiple // host.instances for host in hosts])


def effective_weights(base: Sequence[int], shares: Sequence[Share]) -> list[int]:
    """Apply the controller's shares to base weights.

    Args:
        base: Base weights.
        shares: One share for each; `down` is ignored.

    Returns:
        The base weights if no share is reduced, otherwise the smallest integers in the new ratio.
    """
    if all(share.factor == 1 for share in shares):
        return list(base)
    return smallest(
        [max(1, round(100 * weight * share.factor)) for weight, share in zip(base, shares, strict=True)]
    )


def smallest(weights: Sequence[int]) -> list[int]:
    """Divide weights by their greatest common divisor."""
    divisor = math.gcd(*weights)
    return [weight // divisor for weight in weights]
