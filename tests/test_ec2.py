"""Provisioning and teardown on EC2, against moto's server on loopback: no AWS account, no outside traffic."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import boto3
import pytest
import yaml
from pixel_lb import elastic_ip
from pixel_lb.controller import Settings
from pixel_lb.credits import CreditMonitor
from pixel_lb.files import Paths
from pixel_lb.fleet import CreditQuery
from pixel_lb.watch import Watch

from bench.compare.processes import free_port

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.prefix, "bin")
REGION = "eu-central-1"
DEBIAN = {
    "ami_id": "ami-0debian12",
    "name": "debian-12-amd64-20260923-2610",
    "owner_id": "136693071363",
    "architecture": "x86_64",
    "root_device_name": "/dev/xvda",
    "root_device_type": "ebs",
    "virtualization_type": "hvm",
}
# Log and refuse every connection of the playbooks' Python to another host. moto's addresses are in 127/8 too.
GUARD = """
import os, socket

connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

def refuse_outside(host):
    if host not in ("127.0.0.1", "localhost"):
        with open(os.environ["GUARD_LOG"], "a") as log:
            log.write(f"{host}\\n")
        raise socket.gaierror(f"{host} is outside")

def guarded_connect(self, address):
    if self.family != socket.AF_UNIX:
        refuse_outside(address[0])
    return connect(self, address)

def guarded_getaddrinfo(host, *arguments, **options):
    refuse_outside(host)
    return getaddrinfo(host, *arguments, **options)

socket.socket.connect, socket.getaddrinfo = guarded_connect, guarded_getaddrinfo
"""
# Headers of an answer that boto3 needs.
KEPT_HEADERS = ("Content-Type", "smithy-protocol")
NO_PORTS = rb"(<ipProtocol>112</ipProtocol>)\s*<fromPort>-1</fromPort>\s*<toPort>-1</toPort>"


class MotoProxy(BaseHTTPRequestHandler):
    """Forwards requests to moto, records their actions, and refuses those that a test names."""

    server: Aws

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        service = self.headers["Authorization"].split("/")[3].replace("monitoring", "cloudwatch")
        # The action is in a header, at the end of the path, or in the body.
        target = self.headers["X-Amz-Target"] or self.path.replace("/", ".")
        words = {} if target != "." else parse_qs(body.decode())
        action = f"{service}:{words['Action'][0] if words else target.rpartition('.')[2]}"
        self.server.actions.append(action)
        if action == "ec2:RunInstances":
            self.server.launched.append(words)
        headers: dict[str, str] = {}
        if refusal := self.server.refuse(action):
            status, answer = 400, refusal.encode()
        else:
            # moto fails without the ports of a protocol that has none, such as VRRP. AWS shows none.
            for word, [value] in words.items():
                if word.endswith(".IpProtocol") and value == "112":
                    body += b"&%b.FromPort=-1&%b.ToPort=-1" % (
                        (word.removesuffix(".IpProtocol").encode(),) * 2
                    )
            moto = http.client.HTTPConnection("127.0.0.1", self.server.moto_port)
            moto.request("POST", self.path, body, dict(self.headers) | {"Content-Length": str(len(body))})
            response = moto.getresponse()
            status, answer = response.status, re.sub(NO_PORTS, rb"\1", response.read())
            headers = {each: value for each, value in response.headers.items() if each in KEPT_HEADERS}
            moto.close()
        if action == "ec2:DescribeInstanceCreditSpecifications" and self.server.unlimited:
            # moto returns the same specification for every instance.
            answer = re.sub(
                rb"(?s)(%b.*?<cpuCredits>)standard" % self.server.unlimited.encode(), rb"\1unlimited", answer
            )
        self.send_response(status)
        for each, value in headers.items():
            self.send_header(each, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


class Aws(ThreadingHTTPServer):
    """A simulated AWS account: moto behind a recording proxy."""

    def __init__(self, moto_port: int) -> None:
        super().__init__(("127.0.0.1", 0), MotoProxy)
        self.moto_port = moto_port
        self.actions: list[str] = []
        self.launched: list[dict[str, list[str]]] = []
        # Number of requests of an action to grant before refusing it with a quota error.
        self.quota: dict[str, int] = {}
        # ID of the instance whose CPU credits are unlimited.
        self.unlimited = ""

    def refuse(self, action: str) -> str | None:
        if action not in self.quota:
            return None
        self.quota[action] -= 1
        if self.quota[action] >= 0:
            return None
        return (
            "<Response><Errors><Error><Code>VcpuLimitExceeded</Code>"
            "<Message>You have requested more vCPU capacity than your current limit allows.</Message>"
            "</Error></Errors></Response>"
        )

    def client(self, service: str) -> Any:
        # boto3's default session is not thread-safe.
        return boto3.session.Session().client(
            service,
            region_name=REGION,
            endpoint_url=f"http://127.0.0.1:{self.moto_port}",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def reset(self) -> None:
        moto = http.client.HTTPConnection("127.0.0.1", self.moto_port)
        moto.request("POST", "/moto-api/reset")
        assert moto.getresponse().status == 200
        moto.close()
        self.quota.clear()
        self.actions.clear()
        self.launched.clear()
        self.unlimited = ""


@contextmanager
def new_account(folder: Path) -> Iterator[Aws]:
    (folder / "amis.json").write_text(json.dumps([DEBIAN]))
    port = free_port()
    with (folder / "log").open("w") as log:
        moto = subprocess.Popen(
            [BIN / "moto_server", "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | {"MOTO_AMIS_PATH": str(folder / "amis.json")},
            stdout=log,
            stderr=log,
        )
    aws = Aws(port)
    threading.Thread(target=aws.serve_forever, daemon=True).start()
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                aws.reset()
                break
            except ConnectionRefusedError:
                assert moto.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, "moto_server doesn't answer"
                time.sleep(0.2)
        yield aws
    finally:
        aws.shutdown()
        aws.server_close()
        moto.terminate()
        moto.wait(10)


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    with new_account(tmp_path_factory.mktemp("moto")) as aws:
        yield aws


class Operator:
    """Runs commands with a copy of inventory/aws, in a directory of its own."""

    def __init__(self, aws: Aws, home: Path) -> None:
        aws.reset()
        self.aws = aws
        self.home = home
        self.inventory = home / "aws"
        shutil.copytree(ROOT / "inventory" / "aws", self.inventory)
        (home / "guard").mkdir()
        (home / "guard" / "sitecustomize.py").write_text(GUARD)
        for name in ("ssh", "scp", "sftp"):
            stub = home / "guard" / name
            stub.write_text(f'#!/bin/sh\necho {name} "$@" >>"$GUARD_LOG"; exit 255\n')
            stub.chmod(0o755)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            "PATH": f"{home / 'guard'}:{os.environ['PATH']}",
            "PYTHONPATH": str(home / "guard"),
            "GUARD_LOG": str(home / "guard.log"),
            "ANSIBLE_NOCOLOR": "1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{aws.server_port}",
            "AWS_ACCESS_KEY_ID": "AKIAOPERATOR",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_CONFIG_FILE": str(home / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(home / "none"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        # moto's hosts have no SSH to wait for, and the operator's address is not looked up outside.
        self.set(aws_wait_for_ssh=False, aws_ssh_from=["198.51.100.7/32"])

    def set(self, **variables: Any) -> None:
        path = self.inventory / "group_vars" / "all.yml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | variables))

    def count(self, name: str, count: int) -> None:
        rows = yaml.safe_load((self.inventory / "group_vars" / "all.yml").read_text())["aws_hosts"]
        self.set(aws_hosts=[row | ({"count": count} if row["name"] == name else {}) for row in rows])

    def type(self, *command: str, **environment: str) -> tuple[int, str]:
        """Run a command; return its status, and its output on one line."""
        program, *arguments = command
        done = subprocess.run(
            [BIN / program, "-i", self.inventory, *arguments],
            cwd=ROOT,
            env=self.environment | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
            check=False,
        )
        assert "PRIVATE KEY" not in done.stdout
        return done.returncode, " ".join(done.stdout.split())

    def provision(self, *arguments: str) -> tuple[int, str]:
        return self.type("ansible-playbook", "playbooks/provision.yml", *arguments)

    def teardown(self, *arguments: str) -> tuple[int, str]:
        return self.type("ansible-playbook", "playbooks/teardown.yml", *arguments)

    def went_outside(self) -> str:
        log = self.home / "guard.log"
        return log.read_text() if log.exists() else ""


@pytest.fixture
def operator(aws: Aws, tmp_path: Path) -> Operator:
    return Operator(aws, tmp_path)


def tags(**values: str) -> list[dict[str, str]]:
    return [{"Key": name, "Value": value} for name, value in values.items()]


def tagged(thing: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in thing.get("Tags", [])}


FLEET_TAGS = {"Project": "pixel", "Environment": "production"}


def account(ec2: Any, *, of_fleet: bool) -> dict[str, Any]:
    """List the account's resources: those with the fleet's tags, or all others."""
    found = {
        "instances": [
            instance
            for reservation in ec2.describe_instances()["Reservations"]
            for instance in reservation["Instances"]
            if instance["State"]["Name"] != "terminated"
        ],
        "groups": ec2.describe_security_groups()["SecurityGroups"],
        "keys": ec2.describe_key_pairs()["KeyPairs"],
        "addresses": ec2.describe_addresses()["Addresses"],
        "volumes": ec2.describe_volumes()["Volumes"],
        "vpcs": ec2.describe_vpcs()["Vpcs"],
    }
    return {
        kind: [thing for thing in things if (tagged(thing).items() >= FLEET_TAGS.items()) == of_fleet]
        for kind, things in found.items()
    }


def launch(ec2: Any, kind: str = "c5.xlarge", key: str = "", **values: str) -> str:
    """Launch an instance without the playbook; with the fleet's key pair it is the fleet's. Return its ID."""
    made = ec2.run_instances(
        **({"KeyName": key} if key else {}),
        ImageId=DEBIAN["ami_id"],
        InstanceType=kind,
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[{"ResourceType": each, "Tags": tags(**values)} for each in ("instance", "volume")],
    )
    instance: str = made["Instances"][0]["InstanceId"]
    return instance


def add_foreign_resources(ec2: Any) -> dict[str, Any]:
    """Create resources with similar names that are not the fleet's; return all of them."""
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    other = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    launch(ec2, Name="c5-1")
    launch(ec2, Name="c5-1", Role="redis", Project="pixel", Environment="staging")
    launch(ec2, Name="t2-1", Role="pixel_app", Project="voxel", Environment="production")
    ec2.create_security_group(GroupName="pixel-production-fleet", Description="another's", VpcId=other)
    ec2.create_security_group(GroupName="another", Description="another's", VpcId=vpc)
    ec2.create_key_pair(KeyName="pixel")
    address = ec2.allocate_address(Domain="vpc")["AllocationId"]
    ec2.create_tags(Resources=[address], Tags=tags(Name="c5-1"))
    ec2.create_volume(AvailabilityZone=f"{REGION}a", Size=1)
    return account(ec2, of_fleet=False)


def hosts(ec2: Any) -> dict[str, dict[str, Any]]:
    return {tagged(instance)["Name"]: instance for instance in account(ec2, of_fleet=True)["instances"]}


def states(ec2: Any) -> dict[str, str]:
    return {name: instance["State"]["Name"] for name, instance in hosts(ec2).items()}


def check_what_was_made(operator: Operator, ec2: Any) -> None:
    made = account(ec2, of_fleet=True)
    key = operator.inventory / "credentials" / "id_ed25519"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    [pair] = made["keys"]
    assert pair["KeyName"] == "pixel-production"

    groups = {group["GroupName"]: group for group in made["groups"]}
    fleet, public = groups["pixel-production-fleet"], groups["pixel-production-public"]
    rules = {
        (
            rule["FromPort"],
            *(r["CidrIp"] for r in rule["IpRanges"]),
            *(g["GroupId"] for g in rule["UserIdGroupPairs"]),
        )
        for rule in fleet["IpPermissions"]
    }
    # tests/test_pixel_fleet.py compares them with the ports that hosts open.
    table = yaml.safe_load((operator.inventory / "group_vars" / "all.yml").read_text())
    within = {(port, fleet["GroupId"]) for port in table["aws_fleet_ports"]}
    assert rules == {(22, "198.51.100.7/32")} | within
    assert {
        (rule["IpProtocol"], rule["FromPort"], *(r["CidrIp"] for r in rule["IpRanges"]))
        for rule in public["IpPermissions"]
    } == {("tcp", 80, "0.0.0.0/0"), ("tcp", 443, "0.0.0.0/0"), ("112", -1)}

    instances = hosts(ec2)
    assert {name: (host["InstanceType"], tagged(host)["Role"]) for name, host in instances.items()} == {
        "c5-1": ("c5.xlarge", "redis pixel_app nginx_lb"),
        "t2-1": ("t2.xlarge", "pixel_app"),
    }
    for name, host in instances.items():
        assert host["ImageId"] == DEBIAN["ami_id"]
        assert host["KeyName"] == "pixel-production"
        assert host["MetadataOptions"]["HttpTokens"] == "required"
        assert host["Monitoring"]["State"] in ("enabled", "pending")
        wanted = {fleet["GroupId"]} | ({public["GroupId"]} if name == "c5-1" else set())
        assert {group["GroupId"] for group in host["SecurityGroups"]} == wanted
    # moto does not store the credit specification, so check the request.
    credits_asked = [
        (asked["InstanceType"][0], asked.get("CreditSpecification.CpuCredits"))
        for asked in operator.aws.launched
    ]
    assert credits_asked == [("c5.xlarge", None), ("t2.xlarge", ["standard"])]
    for volume in made["volumes"]:
        assert volume["Encrypted"]
        assert volume["VolumeType"] == "gp3"
        assert volume["Size"] == 20
    assert len(made["volumes"]) == 2


def check_inventory(operator: Operator) -> None:
    status, output = operator.type("ansible-inventory", "--list")
    assert status == 0, output
    listing = json.loads(output[output.index('{ "_meta"') :])
    variables = listing.pop("_meta")["hostvars"]
    assert {name: set(group["hosts"]) for name, group in listing.items() if "hosts" in group} == {
        "aws_ec2": {"c5-1", "t2-1"},
        "fleet": {"c5-1", "t2-1"},
        "redis": {"c5-1"},
        "pixel_app": {"c5-1", "t2-1"},
        "nginx_lb": {"c5-1"},
        "c5": {"c5-1"},
        "t2": {"t2-1"},
    }
    plain = {name: json.loads(json.dumps(values), object_hook=unwrap) for name, values in variables.items()}
    made = hosts(operator.aws.client("ec2"))
    for name, values in plain.items():
        assert values["ansible_host"] == made[name]["PublicIpAddress"]
        assert values["private_address"] == made[name]["PrivateIpAddress"]
        assert values["instance_type"] == made[name]["InstanceType"]
        assert values["instance_id"] == made[name]["InstanceId"]
        assert values["nginx_lb_credit_region"] == REGION
        assert values["ansible_user"] == "admin"

    status, output = operator.type("ansible-playbook", "site.yml", "--list-hosts")
    assert status == 0, output
    for play, there in (("Redis", "c5-1"), ("Prepare the app", "c5-1 t2-1"), ("Balancer", "c5-1")):
        listed = re.search(rf": {play} \(\d+ of 10\) TAGS.*?hosts \(\d\): (.*?)(?= play #|$)", output)
        assert listed
        assert sorted(listed[1].split()) == there.split()

    # The first play reads only the inventory; the second connects to the hosts, which fails here.
    unreachable = {"ansible_connection": "local", "ansible_python_interpreter": "/nonexistent"}
    status, output = operator.type(
        "ansible-playbook", "playbooks/validate.yml", "-e", json.dumps(unreachable)
    )
    first, found, _ = output.partition("PLAY [Validate the hosts]")
    assert found, output
    assert "fatal" not in first


def unwrap(values: dict[str, Any]) -> Any:
    """Remove the marker of untrusted values from the listing."""
    return values.get("__ansible_unsafe", values)


def check_policy(name: str, used: set[str]) -> None:
    policy = json.loads((ROOT / "docs" / name).read_text())
    assert {action for statement in policy["Statement"] for action in statement["Action"]} == used


INVALID_FORM = [
    {"name": "c5", "type": "c5.xlarge", "count": 1, "roles": ["redis", "web"]},
    {"name": "t2", "count": "many", "roles": ["pixel_app"]},
]
INVALID_COMBINATIONS = [
    {"name": "c5", "type": "c5.xlarge", "count": 2, "roles": ["redis", "pixel_app"], "credits": "standard"},
    {"name": "c5", "type": "t2.xlarge", "count": 0, "roles": ["pixel_app"]},
    {"name": "C 5", "type": "xlarge", "count": 1, "roles": []},
]


@pytest.mark.parametrize(
    ("variables", "messages"),
    [
        ({"pixel_app_redis_url": "rediss://redis.example:6379/0"}, ["1 hosts have the role redis"]),
        (
            {"aws_hosts": INVALID_FORM},
            ["Got no match for: web", "missing required arguments: type", "'count'"],
        ),
        (
            {"aws_hosts": INVALID_COMBINATIONS},
            [
                "two rows have the same name",
                "lower-case letters, digits and -",
                "a type is written like c5.xlarge",
                "a count is 1 to 100",
                "a row without roles does nothing: C 5",
                "2 hosts have the role redis",
                "no host has the role nginx_lb",
                "a row of a T type needs credits: standard or unlimited",
                "only T types have credits",
            ],
        ),
    ],
)
def test_an_invalid_table_is_reported_before_anything_is_created(
    operator: Operator, variables: dict[str, Any], messages: list[str]
) -> None:
    operator.set(**variables)
    status, output = operator.provision()
    assert status == 2
    assert [message for message in messages if message not in output] == [], output
    assert set(operator.aws.actions) == {"ec2:DescribeInstances"}


def test_conflicts_with_existing_resources_are_reported_before_anything_is_created(
    operator: Operator,
) -> None:
    ec2 = operator.aws.client("ec2")
    vpc = ec2.describe_subnets()["Subnets"][0]["VpcId"]
    ec2.create_security_group(GroupName="pixel-production-fleet", Description="another's", VpcId=vpc)
    ec2.create_key_pair(KeyName="pixel-production")
    for name, kind, role in (("c5-1", "c5.large", "redis"), ("old-1", "c5.xlarge", "redis pixel_app")):
        launch(ec2, kind, "pixel-production", **FLEET_TAGS, Name=name, Role=role)
    before = account(ec2, of_fleet=True), account(ec2, of_fleet=False)
    operator.set(aws_image="debian-12-amd64-latest")
    status, output = operator.provision("-e", "remove=true")
    assert status == 2
    messages = [
        "has 0 images 'debian-12-amd64-latest' of 136693071363",
        "c5-1 c5.large: the type differs from the table",
        "old-1 stores the canvas",
        "without the tags Project and Environment",
        "put the private key of the existing hosts there",
    ]
    assert [message for message in messages if message not in output] == [], output

    # Two instances with the same name.
    ec2.create_tags(Resources=[one["InstanceId"] for one in before[0]["instances"]], Tags=tags(Name="c5-1"))
    before = account(ec2, of_fleet=True), account(ec2, of_fleet=False)
    status, output = operator.provision()
    assert status == 2
    assert "without a name, or two with the same: c5-1 i-" in output
    assert (account(ec2, of_fleet=True), account(ec2, of_fleet=False)) == before

    # Instances with the fleet's tags that don't belong to it.
    ec2.create_key_pair(KeyName="theirs")
    strangers = [launch(ec2, key=key, **FLEET_TAGS, Name="theirs") for key in ("", "theirs")]
    before = account(ec2, of_fleet=True), account(ec2, of_fleet=False)
    status, output = operator.teardown("-e", "confirm=pixel")
    assert status == 2
    assert f"{strangers[0]} theirs, {strangers[1]} theirs. Nothing was changed." in output
    assert (account(ec2, of_fleet=True), account(ec2, of_fleet=False)) == before


def test_missing_credentials_and_an_unknown_region_are_reported(operator: Operator) -> None:
    status, output = operator.type(
        "ansible-inventory", "--list", AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY=""
    )
    assert status != 0
    assert "Unable to locate credentials" in output
    path = operator.inventory / "aws_ec2.yml"
    path.write_text(path.read_text().replace(REGION, "nowhere-1"))
    status, output = operator.type("ansible-playbook", "playbooks/provision.yml", AWS_ENDPOINT_URL="")
    assert status != 0
    assert "https://ec2.nowhere-1.amazonaws.com" in output
    assert set(operator.went_outside().split()) == {"ec2.nowhere-1.amazonaws.com"}


@pytest.fixture
def balancer_account(aws: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let boto3 in this process use the simulated account, as on a balancer."""
    for name, value in Operator(aws, tmp_path).environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("balancer_account")
def test_the_elastic_ip_follows_the_holder_of_the_address(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_ip, "RETRY_SECONDS", 0.05)
    ec2 = aws.client("ec2")
    first, second = (launch(ec2, "c5.xlarge", Name=name) for name in ("first", "second"))
    allocation, other = (ec2.allocate_address(Domain="vpc")["AllocationId"] for _ in range(2))

    def holders() -> dict[str, str]:
        addresses = ec2.describe_addresses()["Addresses"]
        return {each["AllocationId"]: each.get("InstanceId", "") for each in addresses}

    assert elastic_ip.claim(REGION, allocation, first, "127.0.0.1")
    assert holders() == {allocation: first, other: ""}
    assert elastic_ip.claim(REGION, allocation, second, "127.0.0.1")
    assert elastic_ip.claim(REGION, allocation, second, "127.0.0.1")
    assert holders() == {allocation: second, other: ""}
    check_policy("aws-address-policy.json", set(aws.actions))
    # A host that has lost the address does not take the Elastic IP.
    assert not elastic_ip.claim(REGION, allocation, first, "192.0.2.1")
    # A refused request is repeated.
    aws.quota["ec2:AssociateAddress"] = 0
    aws.actions.clear()
    with ThreadPoolExecutor(1) as pool:
        claimed = pool.submit(elastic_ip.claim, REGION, allocation, first, "127.0.0.1")
        while len(aws.actions) < 2:
            time.sleep(0.01)
        assert holders() == {allocation: second, other: ""}
        aws.quota.clear()
        assert claimed.result(10)
    assert holders() == {allocation: first, other: ""}


@pytest.mark.usefixtures("balancer_account")
def test_the_controller_reads_cpu_credits_from_cloudwatch(
    aws: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ec2, cloudwatch = aws.client("ec2"), aws.client("cloudwatch")
    instances = {name: launch(ec2, "t2.xlarge", Name=name) for name in ("low", "full", "unlimited", "silent")}
    aws.unlimited = instances["unlimited"]
    data = [("low", 16, 43.5), ("low", 6, 12.5), ("low", 11, 28), ("full", 6, 1296), ("unlimited", 6, 0)]
    for name, minutes, balance in data:
        metric = {
            "MetricName": "CPUCreditBalance",
            "Dimensions": [{"Name": "InstanceId", "Value": instances[name]}],
            "Timestamp": datetime.now(UTC) - timedelta(minutes=minutes),
            "Value": balance,
        }
        cloudwatch.put_metric_data(Namespace="AWS/EC2", MetricData=[metric])

    watch = Watch(Paths(tmp_path, tmp_path, tmp_path), dry_run=True)
    hosts = {name: CreditQuery(instance, "t2.xlarge", 4) for name, instance in instances.items()}
    watch.credits = CreditMonitor(REGION, hosts, watch.log)
    watch.controller.configure({name: name for name in instances}, {}, Settings(adaptive=True))
    poll_once(watch)
    known = {name: backend.credits for name, backend in watch.controller.backends.items()}
    assert {name: each and each.balance for name, each in known.items()} == {
        "low": 12.5,
        "full": 1296,
        "unlimited": None,
        "silent": None,
    }
    assert known["low"]
    # `at` is the end of the metric's five-minute period.
    assert 0 <= time.monotonic() - known["low"].at <= 6 * 60 + 30
    assert known["low"].sustainable == pytest.approx(0.225 + 12.5 / 60)
    check_policy("aws-balancer-policy.json", set(aws.actions))

    # The next query comes after five minutes; if it fails, the last known balance is kept.
    aws.actions.clear()
    poll_once(watch)
    assert aws.actions == []
    later = 300.0
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    poll_once(watch, later)
    assert "CPU credits are unknown: Unable to locate credentials" in capsys.readouterr().err
    assert watch.controller.backends["low"].credits == known["low"]


def poll_once(watch: Watch, later: float = 0.0) -> None:
    """Poll the credits as if `later` seconds had passed: send a query if due, and collect the answer."""
    with ThreadPoolExecutor(1) as pool:
        watch.poll_credits(pool, time.monotonic() + later)
    watch.poll_credits(pool, time.monotonic() + later)


def test_provision_change_and_teardown(operator: Operator) -> None:
    """The longest test, which tests/conftest.py starts first."""
    aws, ec2 = operator.aws, operator.aws.client("ec2")
    foreign = add_foreign_resources(ec2)

    # A dry run reports what it would create, and creates nothing, on AWS or here. Redis may have three hosts.
    path = operator.inventory / "group_vars" / "all.yml"
    table = path.read_text()
    rows = yaml.safe_load(table)["aws_hosts"]
    rows[0] |= {"roles": ["pixel_app", "nginx_lb"]}
    roles = ["redis", "pixel_app", "nginx_lb"]
    operator.set(aws_hosts=[*rows, {"name": "m5", "type": "m5.xlarge", "count": 3, "roles": roles}])
    status, output = operator.provision("--check")
    assert status == 0, output
    assert "make: c5-1, t2-1, m5-1, m5-2, m5-3" in output
    assert account(ec2, of_fleet=False) == foreign
    assert not any(account(ec2, of_fleet=True).values())
    assert not (operator.inventory / "credentials").exists()

    path.write_text(table)
    status, output = operator.provision()
    assert status == 0, output
    assert "make: c5-1, t2-1" in output
    assert states(ec2) == {"c5-1": "running", "t2-1": "running"}
    check_what_was_made(operator, ec2)
    check_inventory(operator)

    # Change the table: one more host, a stopped host with weaker metadata options, an Elastic IP, an
    # instance profile, and another address of the operator.
    t2 = hosts(ec2)["t2-1"]
    ec2.stop_instances(InstanceIds=[t2["InstanceId"]])
    status, output = operator.type("ansible-inventory", "--graph")
    assert "c5-1" in output
    assert "t2-1" not in output
    options = {name: value for name, value in t2["MetadataOptions"].items() if name != "State"}
    ec2.modify_instance_metadata_options(
        InstanceId=t2["InstanceId"], **(options | {"HttpTokens": "optional"})
    )
    ec2.create_tags(Resources=[t2["InstanceId"]], Tags=tags(CostCenter="7"))
    aws.client("iam").create_instance_profile(InstanceProfileName="pixel-balancer")
    operator.set(aws_instance_profile="pixel-balancer")
    # A host of a former version of the table.
    launch(ec2, key="pixel-production", **FLEET_TAGS, Name="t2-9", Role="pixel_app")
    operator.count("t2", 2)
    operator.set(aws_elastic_ip=True, aws_ssh_from=["198.51.100.8/32"])

    # The quota is exhausted during the run.
    aws.quota["ec2:RunInstances"] = 0
    status, output = operator.provision()
    assert status == 2
    assert "start: t2-1" in output
    assert "remove: t2-9 (only with -e remove=true)" in output
    assert "VcpuLimitExceeded" in output
    assert "Service Quotas" in output
    assert states(ec2) == {"c5-1": "running", "t2-1": "running", "t2-9": "running"}
    assert account(ec2, of_fleet=True)["addresses"] == []

    # The next run completes the changes, and with -e remove=true removes the former host.
    aws.quota.clear()
    status, output = operator.provision("-e", "remove=true")
    assert status == 0, output
    assert "make: t2-2" in output
    assert "remove: t2-9" in output
    assert states(ec2) == {"c5-1": "running", "t2-1": "running", "t2-2": "running"}
    now = hosts(ec2)
    assert now["t2-1"]["InstanceId"] == t2["InstanceId"]
    assert tagged(now["t2-1"])["CostCenter"] == "7"
    assert now["t2-1"]["MetadataOptions"]["HttpTokens"] == "required"
    assert "198.51.100.7" not in json.dumps(account(ec2, of_fleet=True)["groups"])
    [address] = account(ec2, of_fleet=True)["addresses"]
    assert f"c5-1: {address['PublicIp']} " in output
    assert {name for name, host in now.items() if "IamInstanceProfile" in host} == {"c5-1"}

    # Another run changes nothing; a lower count alone removes no host.
    operator.count("t2", 1)
    status, output = operator.provision()
    assert "remove: t2-2 (only with -e remove=true)" in output
    assert "changed=0 unreachable=0 failed=0" in output

    # Teardown requires a confirmation.
    status, output = operator.teardown()
    assert status == 2
    assert "Nothing was removed" in output
    assert "-e confirm=pixel" in output
    status, output = operator.teardown("-e", "confirm=pixel")
    assert status == 0, output
    assert not any(account(ec2, of_fleet=True).values())
    status, output = operator.teardown("-e", "confirm=pixel")
    assert "changed=0 unreachable=0 failed=0" in output

    assert account(ec2, of_fleet=False) == foreign
    assert operator.went_outside() == ""
    # sts:GetCallerIdentity needs no permission; iam:PassRole is needed but is not a request.
    check_policy("aws-policy.json", set(aws.actions) - {"sts:GetCallerIdentity"} | {"iam:PassRole"})
