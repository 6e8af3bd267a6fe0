#!/usr/bin/python3
"""How many CPU credits hosts of a T type have left, as CloudWatch knows it.

    credits.py REGION INSTANCE…     JSON: by instance, when its last five minutes ended, and its credits then

A host whose credits are `unlimited` is never slowed down, and is left out; so is one of which nothing
is known. The credentials are the balancer's own: its instance profile allows the two actions
`cloudwatch:GetMetricData` and `ec2:DescribeInstanceCreditSpecifications`.

This is a program by itself because boto3 takes time and memory, which the controller has no use for.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

# Credits are counted every five minutes, and known some minutes later.
PERIOD = 300
PERIODS = 6


def balances(region: str, instances: list[str]) -> dict[str, tuple[float, float]]:
    """By instance: when its last period ended, and what it had left."""
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
    this_period = time.time() // PERIOD * PERIOD
    pages = (
        boto3.client("cloudwatch", region_name=region, config=config)
        .get_paginator("get_metric_data")
        .paginate(
            StartTime=this_period - PERIODS * PERIOD,
            EndTime=this_period + PERIOD,
            MetricDataQueries=[query(number, instance) for number, instance in enumerate(limited)],
        )
    )
    found: dict[str, tuple[float, float]] = {}
    for result in (each for page in pages for each in page["MetricDataResults"]):
        instance = limited[int(result["Id"].removeprefix("host"))]
        for began, balance in zip(result["Timestamps"], result["Values"], strict=True):
            seen = (began.timestamp() + PERIOD, balance)
            found[instance] = max(seen, found.get(instance, seen))
    return found


def query(number: int, instance: str) -> dict[str, Any]:
    metric = {
        "Namespace": "AWS/EC2",
        "MetricName": "CPUCreditBalance",
        "Dimensions": [{"Name": "InstanceId", "Value": instance}],
    }
    return {
        "Id": f"host{number}",
        "MetricStat": {"Metric": metric, "Period": PERIOD, "Stat": "Average"},
    }


def main() -> None:
    region, *instances = sys.argv[1:]
    try:
        print(json.dumps(balances(region, instances)))
    except (BotoCoreError, ClientError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
