"""CPU credits of burstable instances, from CloudWatch.

    python -m pixel_lb.cloudwatch REGION INSTANCE…

Prints JSON: by instance ID, the end of its last five-minute period (seconds since 1970) and its credit
balance. Instances with `unlimited` credits, which are never throttled, and those without data are left out.
The credentials come from the balancer's instance profile, which must allow the actions
`cloudwatch:GetMetricData` and `ec2:DescribeInstanceCreditSpecifications`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

# CloudWatch records credits every five minutes, and publishes them some minutes later.
PERIOD_SECONDS = 300
PERIODS = 6


def balances(region: str, instances: list[str]) -> dict[str, tuple[float, float]]:
    """Query the credit balances of instances.

    Returns:
        By instance ID: the end of its last period, in seconds since 1970, and its credit balance.

    Raises:
        BotoCoreError, ClientError: AWS is unreachable or refuses the request.
    """
    config = Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 1})
    ec2 = boto3.client("ec2", region_name=region, config=config)
    answer = ec2.describe_instance_credit_specifications(InstanceIds=instances)
    limited = [
        each["InstanceId"]
        for each in answer["InstanceCreditSpecifications"]
        if each["CpuCredits"] == "standard"
    ]
    if not limited:
        return {}
    this_period = time.time() // PERIOD_SECONDS * PERIOD_SECONDS
    pages = (
        boto3.client("cloudwatch", region_name=region, config=config)
        .get_paginator("get_metric_data")
        .paginate(
            StartTime=this_period - PERIODS * PERIOD_SECONDS,
            EndTime=this_period + PERIOD_SECONDS,
            MetricDataQueries=[_query(number, instance) for number, instance in enumerate(limited)],
        )
    )
    found: dict[str, tuple[float, float]] = {}
    for result in (each for page in pages for each in page["MetricDataResults"]):
        instance = limited[int(result["Id"].removeprefix("host"))]
        for began, balance in zip(result["Timestamps"], result["Values"], strict=True):
            seen = (began.timestamp() + PERIOD_SECONDS, balance)
            found[instance] = max(seen, found.get(instance, seen))
    return found


def _query(number: int, instance: str) -> dict[str, Any]:
    metric = {
        "Namespace": "AWS/EC2",
        "MetricName": "CPUCreditBalance",
        "Dimensions": [{"Name": "InstanceId", "Value": instance}],
    }
    return {
        "Id": f"host{number}",
        "MetricStat": {"Metric": metric, "Period": PERIOD_SECONDS, "Stat": "Average"},
    }


def main() -> None:
    """Print the balances, or exit with a message."""
    region, *instances = sys.argv[1:]
    try:
        print(json.dumps(balances(region, instances)))
    except (BotoCoreError, ClientError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
