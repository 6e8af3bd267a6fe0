"""The fleet's Elastic IP, associated with the balancer that holds the address.

    python -m pixel_lb.elastic_ip REGION ALLOCATION INSTANCE ADDRESS

keepalived starts it when this host takes ADDRESS. It tries again while AWS refuses or does not answer, as
long as the host holds ADDRESS. Messages go to the journal. The credentials come from the balancer's instance
profile, which must allow the action `ec2:AssociateAddress` (docs/aws-address-policy.json).
"""

from __future__ import annotations

import sys
import syslog
import time

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from pixel_lb.peers import holds

RETRY_SECONDS = 1.0


def associate(region: str, allocation: str, instance: str) -> None:
    """Associate the Elastic IP with an instance, and so take it from another one.

    Repeating it changes nothing.

    Raises:
        BotoCoreError, ClientError: AWS is unreachable or refuses the request.
    """
    config = Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 0})
    boto3.client("ec2", region_name=region, config=config).associate_address(
        AllocationId=allocation, InstanceId=instance, AllowReassociation=True
    )


def claim(region: str, allocation: str, instance: str, address: str) -> bool:
    """Associate the Elastic IP with this host's instance while the host holds its address.

    Returns:
        Whether it is associated; False if the host has lost the address meanwhile.
    """
    while holds(address):
        try:
            associate(region, allocation, instance)
        except (BotoCoreError, ClientError) as error:
            syslog.syslog(syslog.LOG_ERR, f"{allocation} was not associated with {instance}: {error}")
            time.sleep(RETRY_SECONDS)
        else:
            syslog.syslog(f"{allocation} is associated with {instance}")
            return True
    return False


if __name__ == "__main__":
    syslog.openlog("pixel-lb", syslog.LOG_PID)
    sys.exit(0 if claim(*sys.argv[1:]) else 1)
