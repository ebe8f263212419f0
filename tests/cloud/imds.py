"""The instance metadata service, version 2 only, for the instance created last."""

import json
import secrets
import threading
import time
from datetime import datetime, timedelta, timezone
from ipaddress import ip_interface
from urllib.parse import unquote

from calls import CallLog
from faults import Faults
from server import Request, Response
from world import ACCOUNT, REGION, ZONE, Guest, World

TTL_HEADER = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
MAX_TTL = 21600
CREDENTIALS_LIFETIME = timedelta(hours=6)
# Every version gets the same tree: cloud-init asks for some of them, nobody for a difference.
VERSIONS = (
    "1.0",
    "2007-01-19",
    "2009-04-04",
    "2011-01-01",
    "2016-04-19",
    "2016-06-30",
    "2016-09-02",
    "2018-03-28",
    "2018-08-17",
    "2018-09-24",
    "2019-10-01",
    "2020-10-27",
    "2021-01-03",
    "2021-03-23",
    "2021-07-15",
    "2022-09-24",
    "2024-04-11",
    "latest",
)
REASONS = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Directory(dict[str, "Directory | str"]):
    """A level of the tree. `labels` replaces names in the listing, as public-keys/ has it."""

    def __init__(
        self,
        entries: "dict[str, Directory | str] | None" = None,
        labels: dict[str, str] | None = None,
    ) -> None:
        super().__init__(entries or {})
        self.labels = labels or {}

    def listing(self) -> str:
        return "\n".join(
            self.labels.get(name) or (name + "/" if isinstance(entry, Directory) else name)
            for name, entry in self.items()
        )


class Imds:
    def __init__(self, world: World, faults: Faults, calls: CallLog) -> None:
        self._world = world
        self._faults = faults
        self._calls = calls
        self._lock = threading.Lock()
        self._tokens: dict[str, float] = {}

    def reset(self) -> None:
        """Forget the tokens: they belong to an instance that is gone."""
        with self._lock:
            self._tokens.clear()

    def handle(self, request: Request) -> Response | None:
        path = unquote(request.path).lstrip("/")
        action = f"{request.method} {path}"
        touched, fault = self._faults.apply("imds", path)
        if fault and fault.kind == "hang":
            self._calls.add("imds", action, {}, None, None, True)
            request.wait_for_hangup()
            return None
        if fault and fault.kind == "error":
            response = _error(fault.status)
        elif fault:
            response = Response(200)
        else:
            response = self._answer(request, path)
        error = fault.code or str(fault.status) if fault and fault.kind == "error" else None
        if response.status >= 400 and error is None:
            error = REASONS.get(response.status, str(response.status))
        self._calls.add("imds", action, {}, response.status, error, touched)
        return response

    def _answer(self, request: Request, path: str) -> Response:
        if path == "latest/api/token":
            return self._token(request)
        if request.method not in ("GET", "HEAD"):
            return _error(405)
        ttl = self._time_left(request.header("X-aws-ec2-metadata-token"))
        if ttl is None:
            return _error(401)
        with self._world.lock:
            self._world.expire_lifecycle_actions()
            guest = self._world.current_guest()
            tree = _tree(self._world, guest) if guest else Directory()
        entry: Directory | str | None = tree
        for part in filter(None, path.split("/")):
            entry = entry.get(part) if isinstance(entry, Directory) else None
        if entry is None:
            return _error(404)
        text = entry.listing() if isinstance(entry, Directory) else entry
        kind = "application/octet-stream" if path.endswith("/user-data") else "text/plain"
        return Response(200, text.encode(), kind, [(TTL_HEADER, str(ttl))])

    def _token(self, request: Request) -> Response:
        if request.method != "PUT":
            return _error(405)
        # A forwarded request comes from a proxy, which must not obtain tokens.
        if request.header("X-Forwarded-For"):
            return _error(403)
        ttl = request.header(TTL_HEADER)
        if not (ttl.isascii() and ttl.isdigit() and 1 <= int(ttl) <= MAX_TTL):
            return _error(400)
        token = secrets.token_urlsafe(40) + "=="
        with self._lock:
            self._tokens[token] = time.monotonic() + int(ttl)
        return Response(200, token.encode(), headers=[(TTL_HEADER, ttl)])

    def _time_left(self, token: str) -> int | None:
        with self._lock:
            left = self._tokens.get(token, 0) - time.monotonic()
        return int(left) if left > 0 else None


def _error(status: int) -> Response:
    title = f"{status} - {REASONS.get(status, 'Error')}"
    body = (
        '<?xml version="1.0" encoding="iso-8859-1"?>\n'
        '<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN"\n'
        '\t"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">\n'
        '<html xmlns="http://www.w3.org/1999/xhtml" xml:lang="en" lang="en">\n'
        f" <head>\n  <title>{title}</title>\n </head>\n"
        f" <body>\n  <h1>{title}</h1>\n </body>\n</html>\n"
    )
    return Response(status, body.encode(), "text/html")


def _tree(world: World, guest: Guest) -> Directory:
    version = Directory()
    version["dynamic"] = Directory(
        {
            # cloud-init retries for a minute if this directory does not list the document.
            "instance-identity": Directory({"document": _identity_document(guest)}),
        }
    )
    version["meta-data"] = _meta_data(world, guest)
    if guest.user_data is not None:
        version["user-data"] = guest.user_data
    # The top two levels are listed without slashes, unlike everything below them.
    version.labels = {name: name for name in version}
    return Directory(
        {name: version for name in VERSIONS}, labels={name: name for name in VERSIONS}
    )


def _meta_data(world: World, guest: Guest) -> Directory:
    model = guest.model
    name = model.private_dns_name
    address = model.private_ip
    groups = "\n".join(group.name for group in model.security_groups)
    tree = Directory()
    tree["ami-id"] = model.image_id
    tree["ami-launch-index"] = str(model.ami_launch_index)
    tree["ami-manifest-path"] = "(unknown)"
    group = world.group_of(model.id)
    target = group.target_state() if group else None
    if target:
        tree["autoscaling"] = Directory({"target-lifecycle-state": target})
    tree["block-device-mapping"] = _block_devices(world, guest)
    tree["events"] = Directory({"maintenance": Directory({"history": "[]", "scheduled": "[]"})})
    tree["hostname"] = name
    if guest.role:
        tree["iam"] = _iam(guest)
    tree["instance-action"] = "none"
    tree["instance-id"] = model.id
    tree["instance-life-cycle"] = model.lifecycle or "on-demand"
    tree["instance-type"] = model.instance_type
    tree["local-hostname"] = name
    tree["local-ipv4"] = address
    tree["mac"] = guest.mac
    tree["network"] = Directory(
        {"interfaces": Directory({"macs": Directory({guest.mac: _interface(guest, groups)})})}
    )
    zone = next(z for z in world.ec2.describe_availability_zones() if z.name == ZONE)
    tree["placement"] = Directory(
        {"availability-zone": ZONE, "availability-zone-id": zone.zone_id, "region": REGION}
    )
    tree["profile"] = "default-hvm"
    if guest.public_key:
        label = (guest.public_key.split(" ", 2) + ["", ""])[2].strip() or "lab"
        tree["public-keys"] = Directory(
            {"0": Directory({"openssh-key": guest.public_key})}, labels={"0": f"0={label}"}
        )
    tree["reservation-id"] = _reservation_id(world, model.id)
    tree["security-groups"] = groups
    tree["services"] = Directory({"domain": "amazonaws.com", "partition": "aws"})
    tree["system"] = "nitro"
    if guest.metadata_tags:
        tree["tags"] = Directory({"instance": Directory(world.tags(model.id))})
    return tree


def _block_devices(world: World, guest: Guest) -> Directory:
    root = guest.model.root_device_name
    tree = Directory({"ami": root})
    for index, volume in enumerate(guest.launch_volumes[1:], start=1):
        model = world.ec2.volumes.get(volume)
        if model and model.attachment:
            # As EC2 has it: the root with its directory, the others without.
            tree[f"ebs{index}"] = model.attachment.device.removeprefix("/dev/")
    tree["root"] = root
    return tree


def _iam(guest: Guest) -> Directory:
    current = datetime.now(timezone.utc)
    profile = guest.model.iam_instance_profile
    info = {
        "Code": "Success",
        "LastUpdated": _timestamp(current),
        "InstanceProfileArn": profile["Arn"],
        "InstanceProfileId": profile["Id"],
    }
    credentials = {
        "Code": "Success",
        "LastUpdated": _timestamp(current),
        "Type": "AWS-HMAC",
        "AccessKeyId": guest.access_key,
        "SecretAccessKey": guest.secret_key,
        "Token": guest.session_token,
        "Expiration": _timestamp(current + CREDENTIALS_LIFETIME),
    }
    return Directory(
        {
            "info": json.dumps(info, indent=2),
            "security-credentials": Directory({guest.role: json.dumps(credentials, indent=2)}),
        }
    )


def _interface(guest: Guest, groups: str) -> Directory:
    model = guest.model
    # The guest's own network, not moto's subnet: cloud-init may configure addresses from it.
    network = str(ip_interface(f"{model.private_ip}/24").network)
    return Directory(
        {
            "device-number": "0",
            "interface-id": model.nics[0].id,
            "local-hostname": model.private_dns_name,
            "local-ipv4s": model.private_ip,
            "mac": guest.mac,
            "owner-id": ACCOUNT,
            "security-group-ids": "\n".join(group.id for group in model.security_groups),
            "security-groups": groups,
            "subnet-id": model.subnet_id,
            "subnet-ipv4-cidr-block": network,
            "vpc-id": model.vpc_id,
            "vpc-ipv4-cidr-block": network,
            "vpc-ipv4-cidr-blocks": network,
        }
    )


def _identity_document(guest: Guest) -> str:
    model = guest.model
    document = {
        "accountId": ACCOUNT,
        "architecture": model.architecture,
        "availabilityZone": ZONE,
        "billingProducts": None,
        "devpayProductCodes": None,
        "marketplaceProductCodes": None,
        "imageId": model.image_id,
        "instanceId": model.id,
        "instanceType": model.instance_type,
        "kernelId": None,
        "pendingTime": _timestamp(model.launch_time),
        "privateIp": model.private_ip,
        "ramdiskId": None,
        "region": REGION,
        "version": "2017-09-30",
    }
    return json.dumps(document, indent=2)


def _reservation_id(world: World, instance: str) -> str:
    return next(
        reservation.id
        for reservation in world.ec2.reservations.values()
        if any(member.id == instance for member in reservation.instances)
    )


def _timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
