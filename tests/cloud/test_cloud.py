"""Talks to the simulated cloud as the lab, a guest and boto3 would."""

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError, ReadTimeoutError

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cloud.py")
INSTANCE = "i-0123456789abcdef0"
ROOT = "vol-0aaaaaaaaaaaaaaa0"
VOLUME = "vol-0123456789abcdef0"
MAC = "52:54:00:12:34:56"
TTL = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN = "X-aws-ec2-metadata-token"


class Cloud:
    """The program as a child process, and a client for each of its ports."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ports = json.loads(self.process.stdout.readline())

    def request(
        self,
        port: str,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 30,
    ) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[port], timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
        finally:
            connection.close()

    def try_admin(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        status, answer, _ = self.request("admin", method, path, data)
        return status, json.loads(answer)

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        status, answer = self.try_admin(method, path, body)
        if status != 200:
            raise AssertionError(f"{method} {path}: {status} {answer}")
        return answer

    def client(self, service: str, **config: Any) -> Any:
        return boto3.client(
            service,
            region_name="us-east-1",
            endpoint_url=f"http://127.0.0.1:{self.ports['api']}",
            aws_access_key_id="ASIAEXAMPLE",
            aws_secret_access_key="example",
            aws_session_token="session-secret",
            config=Config(retries={"total_max_attempts": 1}, **config),
        )

    def token(self, ttl: str = "60") -> str:
        status, body, _ = self.request("imds", "PUT", "/latest/api/token", headers={TTL: ttl})
        assert status == 200, status
        return body.decode()

    def imds(self, path: str, token: str | None = None) -> tuple[int, str]:
        headers = {TOKEN: token or self.token()}
        status, body, _ = self.request("imds", "GET", path, headers=headers)
        return status, body.decode()

    def close(self) -> int:
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


CLOUD: Cloud
LOG: str


def setUpModule() -> None:
    global CLOUD, LOG
    handle, LOG = tempfile.mkstemp(suffix=".jsonl")
    os.close(handle)
    CLOUD = Cloud("--log", LOG)


def tearDownModule() -> None:
    CLOUD.close()
    os.unlink(LOG)


class CloudCase(unittest.TestCase):
    def setUp(self) -> None:
        CLOUD.admin("POST", "/reset")

    def instance(self, **more: Any) -> None:
        CLOUD.admin("POST", "/instance", {"id": INSTANCE, **more})

    def volume(self, **more: Any) -> None:
        CLOUD.admin("POST", "/volume", {"id": VOLUME, **more})

    def attach(self, **more: Any) -> None:
        body = {"volume": VOLUME, "instance": INSTANCE, "device": "/dev/sdf", **more}
        CLOUD.admin("POST", "/attach", body)

    def assert_refused(self, method: str, path: str, body: Any, text: str) -> None:
        status, answer = CLOUD.try_admin(method, path, body)
        self.assertEqual(status, 400, answer)
        self.assertIn(text, answer["error"])

    def aws_error(self, call: Any, **params: Any) -> tuple[str, str, int]:
        with self.assertRaises(ClientError) as caught:
            call(**params)
        response = caught.exception.response
        status = response["ResponseMetadata"]["HTTPStatusCode"]
        return response["Error"]["Code"], response["Error"]["Message"], status


class Process(unittest.TestCase):
    def test_ends_with_its_standard_input_before_moto_is_loaded(self) -> None:
        self.assertEqual(Cloud().close(), 0)

    def test_ends_with_its_standard_input_though_a_request_hangs(self) -> None:
        cloud = Cloud()
        cloud.admin("POST", "/faults", {"service": "imds", "kind": "hang"})
        with socket.create_connection(("127.0.0.1", cloud.ports["imds"])) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            # The record says that the request is being held.
            while not cloud.admin("GET", "/calls?service=imds"):
                time.sleep(0.05)
            self.assertEqual(cloud.close(), 0)


class Http(CloudCase):
    def test_a_connection_serves_many_requests(self) -> None:
        for port in ("imds", "api", "admin"):
            connection = http.client.HTTPConnection("127.0.0.1", CLOUD.ports[port], timeout=10)
            connection.connect()
            first = connection.sock
            for _ in range(3):
                connection.request("GET", "/calls")
                answer = connection.getresponse()
                self.assertEqual(int(answer.headers["Content-Length"]), len(answer.read()))
                self.assertIs(connection.sock, first, f"{port} closed the connection")
            connection.close()

    def test_many_connections_at_once(self) -> None:
        connections = []
        for _ in range(50):
            connection = http.client.HTTPConnection("127.0.0.1", CLOUD.ports["imds"], timeout=10)
            connection.request("PUT", "/latest/api/token", headers={TTL: "60"})
            connections.append(connection)
        tokens = {connection.getresponse().read() for connection in connections}
        for connection in connections:
            connection.close()
        self.assertEqual(len(tokens), 50)

    def test_a_chunked_body_is_read(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", CLOUD.ports["admin"], timeout=10)
        for name, parts in (("a", [b"one ", b"two"]), ("b", [b"three"])):
            connection.request("PUT", f"/files/{name}", iter(parts), encode_chunked=True)
            self.assertEqual(connection.getresponse().read(), b"{}")
        connection.close()
        self.assertEqual(CLOUD.request("api", "GET", "/lab/files/a")[1], b"one two")

    def test_head_has_the_length_and_no_body(self) -> None:
        CLOUD.request("admin", "PUT", "/files/x", b"12345")
        status, body, headers = CLOUD.request("api", "HEAD", "/lab/files/x")
        self.assertEqual((status, body, headers["content-length"]), (200, b"", "5"))


class Token(CloudCase):
    def test_put_gives_a_token_with_its_lifetime(self) -> None:
        status, body, headers = CLOUD.request(
            "imds", "PUT", "/latest/api/token", headers={TTL: "21600"}
        )
        self.assertEqual(status, 200)
        self.assertEqual(headers[TTL.lower()], "21600")
        self.assertGreater(len(body), 40)

    def test_a_lifetime_is_required_and_bounded(self) -> None:
        for ttl in (None, "0", "21601", "-1", "x", ""):
            headers = {} if ttl is None else {TTL: ttl}
            status, _, _ = CLOUD.request("imds", "PUT", "/latest/api/token", headers=headers)
            self.assertEqual(status, 400, ttl)

    def test_a_forwarded_request_gets_none(self) -> None:
        headers = {TTL: "60", "X-Forwarded-For": "10.0.0.1"}
        status, _, _ = CLOUD.request("imds", "PUT", "/latest/api/token", headers=headers)
        self.assertEqual(status, 403)

    def test_nothing_is_read_without_a_valid_token(self) -> None:
        self.instance()
        for path in ("/", "/latest/meta-data/instance-id", "/latest/user-data", "/no-such"):
            self.assertEqual(CLOUD.request("imds", "GET", path)[0], 401)
            self.assertEqual(CLOUD.imds(path, "stale")[0], 401)

    def test_a_token_expires(self) -> None:
        self.instance()
        token = CLOUD.token("1")
        self.assertEqual(CLOUD.imds("/latest/meta-data/instance-id", token)[0], 200)
        time.sleep(1.1)
        self.assertEqual(CLOUD.imds("/latest/meta-data/instance-id", token)[0], 401)

    def test_a_reset_ends_tokens(self) -> None:
        token = CLOUD.token()
        CLOUD.admin("POST", "/reset")
        self.assertEqual(CLOUD.imds("/", token)[0], 401)


class Metadata(CloudCase):
    def read(self, path: str) -> str:
        status, body = CLOUD.imds(path)
        self.assertEqual(status, 200, path)
        return body

    def test_items_of_the_instance(self) -> None:
        self.instance(type="c5.xlarge", image="ami-00000000000000001")
        base = "/latest/meta-data/"
        expected = {
            "instance-id": INSTANCE,
            "instance-type": "c5.xlarge",
            "ami-id": "ami-00000000000000001",
            "ami-launch-index": "0",
            "mac": MAC,
            "local-ipv4": "169.254.169.15",
            "hostname": "ip-169-254-169-15.ec2.internal",
            "local-hostname": "ip-169-254-169-15.ec2.internal",
            "placement/region": "us-east-1",
            "placement/availability-zone": "us-east-1a",
            "instance-life-cycle": "on-demand",
            "services/partition": "aws",
            "services/domain": "amazonaws.com",
            "security-groups": "default",
            f"network/interfaces/macs/{MAC}/device-number": "0",
            f"network/interfaces/macs/{MAC}/local-ipv4s": "169.254.169.15",
        }
        for path, value in expected.items():
            self.assertEqual(self.read(base + path), value, path)
        self.assertRegex(self.read(base + "placement/availability-zone-id"), r"^use1-az\d$")

    def test_the_interface_agrees_with_the_api(self) -> None:
        self.instance(mac="02:00:00:00:00:07", local_ipv4="169.254.169.16")
        ec2 = CLOUD.client("ec2").describe_instances()["Reservations"][0]["Instances"][0]
        base = "/latest/meta-data/network/interfaces/macs/02:00:00:00:00:07/"
        self.assertEqual(self.read(base + "vpc-id"), ec2["VpcId"])
        self.assertEqual(self.read(base + "subnet-id"), ec2["SubnetId"])
        self.assertEqual(
            self.read(base + "security-group-ids"), ec2["SecurityGroups"][0]["GroupId"]
        )
        self.assertEqual(ec2["PrivateIpAddress"], "169.254.169.16")
        self.assertEqual(ec2["NetworkInterfaces"][0]["MacAddress"], "02:00:00:00:00:07")

    def test_what_is_absent_is_404(self) -> None:
        self.instance()
        for path in (
            "latest/user-data",
            "latest/meta-data/spot/termination-time",
            "latest/meta-data/placement/tenancy",
            "latest/meta-data/placement/host-id",
            "latest/meta-data/public-keys/",
            "latest/meta-data/tags/instance",
            "latest/meta-data/autoscaling/target-lifecycle-state",
            "latest/meta-data/instance-id/x",
            "1999-01-01/meta-data/",
        ):
            status, body = CLOUD.imds("/" + path)
            self.assertEqual(status, 404, path)
            self.assertIn("<title>404 - Not Found</title>", body)

    def test_without_an_instance_there_is_nothing(self) -> None:
        self.assertEqual(CLOUD.imds("/latest/meta-data/instance-id")[0], 404)

    def test_the_last_instance_is_the_one_served(self) -> None:
        self.instance()
        second = {"id": "i-00000000000000002", "root_volume": "vol-00000000000000002"}
        CLOUD.admin("POST", "/instance", second)
        self.assertEqual(self.read("/latest/meta-data/instance-id"), second["id"])
        reservations = CLOUD.client("ec2").describe_instances()["Reservations"]
        self.assertEqual(len(reservations), 2)

    def test_versions_and_top_levels_are_listed(self) -> None:
        self.instance(user_data="#!/bin/sh\n")
        versions = self.read("/").splitlines()
        used = {"2009-04-04", "2016-09-02", "2018-09-24", "2021-03-23"}
        self.assertLessEqual(used, set(versions))
        self.assertEqual(versions[-1], "latest")
        self.assertEqual(self.read("/latest").splitlines(), ["dynamic", "meta-data", "user-data"])
        self.assertEqual(self.read("/2021-03-23/meta-data/instance-id"), INSTANCE)

    def test_the_tree_can_be_crawled_as_cloud_init_does(self) -> None:
        key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 lab-key"
        self.instance(public_key=key, metadata_tags=True, tags={"Name": "host"})
        self.volume()
        self.attach(at_launch=True)
        group = {"name": "workers", "instance": INSTANCE, "hook": "launch"}
        CLOUD.admin("POST", "/group", group)
        for version in ("2009-04-04", "2016-09-02", "2018-09-24", "2021-03-23", "latest"):
            tree = self.crawl(f"/{version}/meta-data/")
            self.assertEqual(tree["instance-id"], INSTANCE)
            self.assertEqual(tree["public-keys"], {"lab-key": key})
            self.assertEqual(tree["network"]["interfaces"]["macs"][MAC]["mac"], MAC)
            self.assertEqual(
                tree["block-device-mapping"],
                {"ami": "/dev/sda1", "ebs1": "sdf", "root": "/dev/sda1"},
            )
            self.assertEqual(tree["tags"]["instance"]["Name"], "host")
            self.assertEqual(tree["autoscaling"], {"target-lifecycle-state": "InService"})
            identity = self.crawl(f"/{version}/dynamic/instance-identity/")
            self.assertEqual(json.loads(identity["document"])["instanceId"], INSTANCE)

    def crawl(self, base: str) -> dict[str, Any]:
        """What cloud-init's Ec2 data source does: children end in a slash, keys read `0=name`."""
        leaves: dict[str, str] = {}
        children = []
        for line in self.read(base).splitlines():
            self.assertTrue(line.strip(), f"empty line in {base}")
            if line.endswith("/"):
                children.append(line.rstrip("/"))
                continue
            index, equals, name = line.partition("=")
            if equals and index.isdigit():
                leaves[name] = f"{index}/openssh-key"
            else:
                leaves[line] = line
        result: dict[str, Any] = {name: self.crawl(f"{base}{name}/") for name in children}
        for name, path in leaves.items():
            result[name] = self.read(base + path)
        return result

    def test_the_identity_document_is_complete(self) -> None:
        self.instance(type="m5.large")
        document = json.loads(self.read("/latest/dynamic/instance-identity/document"))
        self.assertEqual(
            sorted(document),
            sorted(
                "accountId architecture availabilityZone billingProducts devpayProductCodes imageId"
                " instanceId instanceType kernelId marketplaceProductCodes pendingTime privateIp"
                " ramdiskId region version".split()
            ),
        )
        self.assertEqual(document["instanceType"], "m5.large")
        self.assertEqual(document["region"], "us-east-1")
        self.assertEqual(document["privateIp"], "169.254.169.15")

    def test_credentials_of_the_role(self) -> None:
        self.instance(role="web")
        base = "/latest/meta-data/iam/"
        self.assertEqual(self.read(base), "info\nsecurity-credentials/")
        self.assertEqual(self.read(base + "security-credentials/"), "web")
        credentials = json.loads(self.read(base + "security-credentials/web"))
        self.assertEqual(credentials["Code"], "Success")
        self.assertRegex(credentials["AccessKeyId"], r"^ASIA[0-9A-F]{16}$")
        self.assertTrue(credentials["SecretAccessKey"] and credentials["Token"])
        left = time.mktime(time.strptime(credentials["Expiration"], "%Y-%m-%dT%H:%M:%SZ"))
        self.assertGreater(left - time.mktime(time.gmtime()), 3600)
        info = json.loads(self.read(base + "info"))
        self.assertIn("instance-profile/web", info["InstanceProfileArn"])

    def test_an_instance_without_a_role(self) -> None:
        self.instance(role=None)
        self.assertEqual(CLOUD.imds("/latest/meta-data/iam/info")[0], 404)

    def test_user_data(self) -> None:
        self.instance(user_data="#cloud-config\nlocale: ü\n")
        self.assertEqual(self.read("/latest/user-data"), "#cloud-config\nlocale: ü\n")
        CLOUD.admin("PATCH", f"/instance/{INSTANCE}", {"user_data": "#!/bin/sh\n"})
        self.assertEqual(self.read("/latest/user-data"), "#!/bin/sh\n")
        CLOUD.admin("PATCH", f"/instance/{INSTANCE}", {"user_data": None})
        self.assertEqual(CLOUD.imds("/latest/user-data")[0], 404)

    def test_tags_are_there_only_when_enabled_and_stay_current(self) -> None:
        self.instance(tags={"Name": "one", "aws:cloudformation:stack-name": "patients"})
        self.assertEqual(CLOUD.imds("/latest/meta-data/tags/instance/Name")[0], 404)
        CLOUD.admin("PATCH", f"/instance/{INSTANCE}", {"metadata_tags": True})
        self.assertEqual(self.read("/latest/meta-data/tags/instance/Name"), "one")
        CLOUD.client("ec2").create_tags(
            Resources=[INSTANCE], Tags=[{"Key": "Name", "Value": "two"}]
        )
        self.assertEqual(self.read("/latest/meta-data/tags/instance/Name"), "two")
        CLOUD.admin("PATCH", f"/instance/{INSTANCE}", {"tags": {"Name": None, "b": "3"}})
        self.assertEqual(
            self.read("/latest/meta-data/tags/instance").splitlines(),
            ["aws:cloudformation:stack-name", "b"],
        )

    def test_metadata_tags_restrict_the_keys(self) -> None:
        self.assert_refused(
            "POST", "/instance", {"id": INSTANCE, "metadata_tags": True, "tags": {"a b": ""}}, "a b"
        )
        self.instance(tags={"a/b": "1"})
        self.assert_refused("PATCH", f"/instance/{INSTANCE}", {"metadata_tags": True}, "a/b")

    def test_a_volume_attached_later_is_not_in_the_mapping(self) -> None:
        self.instance()
        self.volume()
        self.attach()
        listing = self.read("/latest/meta-data/block-device-mapping/")
        self.assertEqual(listing.splitlines(), ["ami", "root"])


class Instances(CloudCase):
    def setUp(self) -> None:
        super().setUp()
        self.ec2 = CLOUD.client("ec2")

    def describe(self, **params: Any) -> list[dict[str, Any]]:
        reservations = self.ec2.describe_instances(**params)["Reservations"]
        return [instance for r in reservations for instance in r["Instances"]]

    def test_fixed_ids_and_attributes_by_every_way_of_asking(self) -> None:
        self.instance(tenancy="dedicated", tags={"Name": "host"}, hop_limit=2)
        for params in (
            {},
            {"InstanceIds": [INSTANCE]},
            {"Filters": [{"Name": "instance-id", "Values": [INSTANCE]}]},
            {"Filters": [{"Name": "tag:Name", "Values": ["host"]}]},
        ):
            (instance,) = self.describe(**params)
            self.assertEqual(instance["InstanceId"], INSTANCE)
            self.assertEqual(instance["Placement"]["Tenancy"], "dedicated")
            self.assertEqual(instance["InstanceType"], "m5.large")
            self.assertEqual(instance["State"]["Name"], "running")
            self.assertEqual(instance["RootDeviceName"], "/dev/sda1")
            (mapping,) = instance["BlockDeviceMappings"]
            self.assertEqual(mapping["Ebs"]["VolumeId"], ROOT)
            options = instance["MetadataOptions"]
            self.assertEqual(options["HttpTokens"], "required")
            self.assertEqual(options["HttpPutResponseHopLimit"], 2)
            self.assertEqual(options["State"], "applied")

    def test_other_ids_do_not_match(self) -> None:
        self.instance()
        other = "i-00000000000000009"
        self.assertEqual(self.describe(Filters=[{"Name": "instance-id", "Values": [other]}]), [])
        code, _, status = self.aws_error(self.ec2.describe_instances, InstanceIds=[other])
        self.assertEqual((code, status), ("InvalidInstanceID.NotFound", 400))

    def test_tags_of_aws_itself(self) -> None:
        self.instance(tags={"aws:cloudformation:stack-name": "patients", "Owner": "x"})
        tags = {tag["Key"]: tag["Value"] for tag in self.describe()[0]["Tags"]}
        self.assertEqual(tags, {"aws:cloudformation:stack-name": "patients", "Owner": "x"})

    def test_changes(self) -> None:
        self.instance()
        self.assertEqual(self.describe()[0]["Placement"]["Tenancy"], "default")
        CLOUD.admin("PATCH", f"/instance/{INSTANCE}", {"tenancy": "host", "state": "stopping"})
        (instance,) = self.describe()
        self.assertEqual(instance["Placement"]["Tenancy"], "host")
        self.assertEqual(instance["State"], {"Code": 64, "Name": "stopping"})

    def test_the_same_id_again_replaces_the_instance(self) -> None:
        self.instance(tags={"Name": "old"}, user_data="old")
        self.volume()
        self.attach(at_launch=True)
        self.instance(tenancy="dedicated", root_volume="vol-00000000000000002", tags={"a": "b"})
        (instance,) = self.describe()
        self.assertEqual(instance["Placement"]["Tenancy"], "dedicated")
        self.assertEqual(instance["Tags"], [{"Key": "a", "Value": "b"}])
        self.assertEqual(len(instance["BlockDeviceMappings"]), 1)
        volumes = {v["VolumeId"]: v["State"] for v in self.ec2.describe_volumes()["Volumes"]}
        self.assertEqual(volumes, {"vol-00000000000000002": "in-use", VOLUME: "available"})
        self.assertEqual(len(self.ec2.describe_network_interfaces()["NetworkInterfaces"]), 1)
        self.assertEqual(CLOUD.imds("/latest/user-data")[0], 404)
        # A refused replacement leaves what was there.
        body = {"id": INSTANCE, "tenancy": "shared"}
        self.assert_refused("POST", "/instance", body, "tenancy must be one of")
        self.assertEqual(len(self.describe()), 1)
        CLOUD.admin("POST", "/group", {"name": "workers", "instance": INSTANCE})
        self.assert_refused("POST", "/instance", {"id": INSTANCE}, "is in a group")

    def test_optional_tokens(self) -> None:
        self.instance(http_tokens="optional")
        self.assertEqual(self.describe()[0]["MetadataOptions"]["HttpTokens"], "optional")

    def test_wrong_input(self) -> None:
        for body, text in (
            ({}, "id is missing"),
            ({"id": "x"}, "'x' is no instance id"),
            ({"id": INSTANCE, "colour": 1}, "unknown key colour"),
            ({"id": INSTANCE, "tenancy": "shared"}, "tenancy must be one of"),
            ({"id": INSTANCE, "hop_limit": True}, "hop_limit must be an integer"),
            ({"id": INSTANCE, "tags": {"a": 1}}, "tag a must be a string"),
            ({"id": INSTANCE, "http_tokens": "no"}, "http_tokens"),
            ({"id": INSTANCE, "root_volume": "x"}, "no volume id"),
            ({"id": INSTANCE, "mac": "x"}, "no MAC address"),
            ({"id": INSTANCE, "local_ipv4": "x"}, "x"),
            ([], "the body must be an object"),
        ):
            self.assert_refused("POST", "/instance", body, text)
        self.assertEqual(self.describe(), [], "a refused instance was created")
        self.instance()
        other = {"id": "i-00000000000000002"}
        self.assert_refused("POST", "/instance", other, f"volume {ROOT} exists")
        self.assert_refused("PATCH", "/instance/i-9", {"state": "running"}, "no instance i-9")
        self.assert_refused("PATCH", f"/instance/{INSTANCE}", {"state": "gone"}, "state must be")
        status, _, _ = CLOUD.request("admin", "POST", "/instance", b"{")
        self.assertEqual(status, 400)
        self.assertEqual(CLOUD.try_admin("GET", "/nowhere")[0], 404)


class Volumes(CloudCase):
    def setUp(self) -> None:
        super().setUp()
        self.ec2 = CLOUD.client("ec2")
        self.instance()

    def describe(self, **params: Any) -> dict[str, dict[str, Any]]:
        return {v["VolumeId"]: v for v in self.ec2.describe_volumes(**params)["Volumes"]}

    def filtered(self, name: str, value: str) -> set[str]:
        return set(self.describe(Filters=[{"Name": name, "Values": [value]}]))

    def test_encryption(self) -> None:
        key = "arn:aws:kms:us-east-1:123456789012:key/11111111-2222-3333-4444-555555555555"
        self.volume(encrypted=True, kms_key_id=key, size=20)
        volumes = self.describe()
        self.assertTrue(volumes[ROOT]["Encrypted"])
        self.assertIn(":key/", volumes[ROOT]["KmsKeyId"])
        self.assertEqual(volumes[VOLUME]["KmsKeyId"], key)
        self.assertEqual(volumes[VOLUME]["Size"], 20)
        CLOUD.admin("PATCH", f"/volume/{VOLUME}", {"encrypted": False})
        volume = self.describe(VolumeIds=[VOLUME])[VOLUME]
        self.assertFalse(volume["Encrypted"])
        self.assertNotIn("KmsKeyId", volume)

    def test_an_unencrypted_root(self) -> None:
        CLOUD.admin("POST", "/reset")
        self.instance(root_encrypted=False)
        self.assertFalse(self.describe()[ROOT]["Encrypted"])

    def test_filters_follow_attachment(self) -> None:
        self.volume(tags={"Purpose": "data"})
        self.assertEqual(self.describe()[VOLUME]["State"], "available")
        self.assertEqual(self.filtered("attachment.instance-id", INSTANCE), {ROOT})
        self.attach()
        self.assertEqual(self.describe()[VOLUME]["State"], "in-use")
        self.assertEqual(self.filtered("attachment.instance-id", INSTANCE), {ROOT, VOLUME})
        self.assertEqual(self.filtered("attachment.device", "/dev/sdf"), {VOLUME})
        self.assertEqual(self.filtered("volume-id", VOLUME), {VOLUME})
        self.assertEqual(self.filtered("tag:Purpose", "data"), {VOLUME})
        self.assertEqual(self.filtered("tag:Purpose", "other"), set())
        CLOUD.admin("POST", "/detach", {"volume": VOLUME})
        self.assertEqual(self.filtered("attachment.instance-id", INSTANCE), {ROOT})
        self.assertEqual(self.describe()[VOLUME]["Attachments"], [])

    def test_states_of_an_attachment(self) -> None:
        self.volume()
        for state in ("attaching", "attached", "detaching", "busy"):
            self.attach(state=state)
            (attachment,) = self.describe(VolumeIds=[VOLUME])[VOLUME]["Attachments"]
            self.assertEqual(attachment["State"], state)
            self.assertEqual(attachment["InstanceId"], INSTANCE)
            self.assertEqual(attachment["Device"], "/dev/sdf")
            instance = self.ec2.describe_instances()["Reservations"][0]["Instances"][0]
            mappings = {m["DeviceName"]: m["Ebs"] for m in instance["BlockDeviceMappings"]}
            self.assertEqual(mappings["/dev/sdf"]["VolumeId"], VOLUME)
            self.assertEqual(mappings["/dev/sdf"]["Status"], state)

    def test_an_unknown_volume(self) -> None:
        code, _, _ = self.aws_error(self.ec2.describe_volumes, VolumeIds=["vol-00000000000000009"])
        self.assertEqual(code, "InvalidVolume.NotFound")

    def test_wrong_input(self) -> None:
        self.volume(encrypted=False)
        attach = {"volume": VOLUME, "instance": INSTANCE, "device": "/dev/sda1"}
        self.assert_refused("POST", "/volume", {"id": VOLUME}, "exists")
        self.assert_refused("PATCH", "/volume/vol-9", {"size": 1}, "no volume vol-9")
        self.assert_refused("PATCH", f"/volume/{VOLUME}", {"kms_key_id": "arn"}, "needs encrypted")
        self.assert_refused("POST", "/attach", attach, f"holds {ROOT}")
        self.assert_refused("POST", "/attach", {**attach, "state": "on"}, "state must be one of")
        self.assert_refused("POST", "/attach", {**attach, "instance": "i-9"}, "no instance")
        self.assert_refused("POST", "/detach", {"volume": VOLUME}, "not attached")
        self.attach()
        self.assert_refused("POST", "/attach", {**attach, "device": "/dev/sdg"}, "is attached")


class Lifecycle(CloudCase):
    def setUp(self) -> None:
        super().setUp()
        self.client = CLOUD.client("autoscaling")
        self.instance()

    def group(self, **more: Any) -> None:
        body = {"name": "workers", "instance": INSTANCE, "hook": "launch", **more}
        CLOUD.admin("POST", "/group", body)

    def complete(self, **more: str) -> None:
        params = {
            "AutoScalingGroupName": "workers",
            "LifecycleHookName": "launch",
            "LifecycleActionResult": "CONTINUE",
            "InstanceId": INSTANCE,
            **more,
        }
        self.client.complete_lifecycle_action(**{k: v for k, v in params.items() if v})

    def heartbeat(self, **more: str) -> None:
        self.client.record_lifecycle_action_heartbeat(
            **{
                "AutoScalingGroupName": "workers",
                "LifecycleHookName": "launch",
                "InstanceId": INSTANCE,
                **more,
            }
        )

    def state(self) -> str:
        answer = self.client.describe_auto_scaling_instances(InstanceIds=[INSTANCE])
        return answer["AutoScalingInstances"][0]["LifecycleState"]

    def target(self) -> tuple[int, str]:
        return CLOUD.imds("/latest/meta-data/autoscaling/target-lifecycle-state")

    def test_a_member_shows_everywhere(self) -> None:
        self.group(heartbeat_timeout=600)
        self.assertEqual(self.state(), "Pending:Wait")
        self.assertEqual(self.target(), (200, "InService"))
        instance = CLOUD.client("ec2").describe_instances()["Reservations"][0]["Instances"][0]
        self.assertIn({"Key": "aws:autoscaling:groupName", "Value": "workers"}, instance["Tags"])
        (hook,) = self.client.describe_lifecycle_hooks(AutoScalingGroupName="workers")[
            "LifecycleHooks"
        ]
        self.assertEqual(hook["HeartbeatTimeout"], 600)
        self.assertEqual(hook["DefaultResult"], "ABANDON")
        (group,) = self.client.describe_auto_scaling_groups()["AutoScalingGroups"]
        self.assertEqual(group["Instances"][0]["InstanceId"], INSTANCE)

    def test_continue_puts_into_service_and_ends_the_action(self) -> None:
        self.group()
        self.complete()
        self.assertEqual(self.state(), "InService")
        answer = CLOUD.admin("GET", "/group/workers")
        self.assertEqual(answer["state"], "InService")
        self.assertEqual(answer["history"], ["Pending:Wait", "Pending:Proceed", "InService"])
        (completion,) = answer["completions"]
        self.assertEqual(completion["instance"], INSTANCE)
        self.assertEqual(completion["hook"], "launch")
        self.assertEqual(completion["result"], "CONTINUE")
        self.assert_no_action(self.complete)

    def test_abandon_terminates(self) -> None:
        self.group()
        self.complete(LifecycleActionResult="ABANDON")
        self.assertEqual(self.state(), "Terminating")
        self.assertEqual(self.target(), (200, "Terminated"))

    def test_a_token_stands_for_the_instance(self) -> None:
        self.group()
        wrong = "00000000-0000-0000-0000-000000000000"
        code, message, _ = self.aws_error(
            self.complete, LifecycleActionToken=wrong, InstanceId=""
        )
        self.assertEqual(message, f"No active Lifecycle Action found with token {wrong}")
        token = CLOUD.admin("GET", "/group/workers")["token"]
        self.complete(LifecycleActionToken=token, InstanceId="")
        self.assertEqual(self.state(), "InService")

    def assert_no_action(self, call: Any, **params: str) -> None:
        instance = params.get("InstanceId", INSTANCE)
        self.assertEqual(
            self.aws_error(call, **params),
            (
                "ValidationError",
                f"No active Lifecycle Action found with instance ID {instance}",
                400,
            ),
        )

    def test_no_active_action(self) -> None:
        self.group(hook=None)
        self.assert_no_action(self.complete)
        self.assert_no_action(self.heartbeat)
        self.group()
        self.assert_no_action(self.complete, LifecycleHookName="other")
        self.assert_no_action(self.complete, InstanceId="i-00000000000000009")
        self.assertEqual(CLOUD.admin("GET", "/group/workers")["completions"], [])

    def test_an_unknown_group(self) -> None:
        code, message, status = self.aws_error(self.complete, AutoScalingGroupName="nobody")
        self.assertEqual((code, status), ("ValidationError", 400))
        self.assertIn("AutoScalingGroup name not found", message)

    def test_params_are_checked(self) -> None:
        self.group()
        code, message, _ = self.aws_error(self.complete, LifecycleActionResult="MAYBE")
        self.assertEqual(code, "ValidationError")
        self.assertIn("[CONTINUE, ABANDON]", message)
        code, message, _ = self.aws_error(self.complete, InstanceId="")
        self.assertEqual(code, "ValidationError")
        # boto3 would not send a call without a hook.
        client = CLOUD.client("autoscaling", parameter_validation=False)
        code, message, _ = self.aws_error(
            client.complete_lifecycle_action, AutoScalingGroupName="workers"
        )
        self.assertIn("Value null at 'lifecycleHookName'", message)

    def test_heartbeats_hold_off_the_time_out(self) -> None:
        self.group(heartbeat_timeout=1)
        for _ in range(3):
            time.sleep(0.6)
            self.heartbeat()
        answer = CLOUD.admin("GET", "/group/workers")
        self.assertEqual((answer["state"], answer["heartbeats"]), ("Pending:Wait", 3))
        time.sleep(1.1)
        self.assertEqual(self.state(), "Terminating")
        self.assert_no_action(self.complete)

    def test_a_time_out_may_continue(self) -> None:
        self.group(heartbeat_timeout=1, default_result="CONTINUE")
        time.sleep(1.1)
        self.assertEqual(self.state(), "InService")

    def test_a_warm_pool_fires_the_hook_twice(self) -> None:
        self.group(state="Warmed:Pending:Wait")
        self.assertEqual(self.target(), (200, "Warmed:Stopped"))
        self.complete()
        self.assertEqual(self.state(), "Warmed:Stopped")
        self.group(state="Pending:Wait")
        self.complete()
        answer = CLOUD.admin("GET", "/group/workers")
        self.assertEqual(answer["state"], "InService")
        self.assertEqual(len(answer["completions"]), 2)

    def test_wrong_input(self) -> None:
        group = {"name": "workers", "instance": INSTANCE}
        self.assert_refused("POST", "/group", {**group, "instance": "i-9"}, "no instance")
        self.assert_refused("POST", "/group", {**group, "default_result": "x"}, "default_result")
        self.assert_refused("POST", "/group", {**group, "heartbeat_timeout": 0}, "at least 1")
        self.assert_refused("GET", "/group/nobody", None, "no group nobody")


class Signals(CloudCase):
    def setUp(self) -> None:
        super().setUp()
        self.client = CLOUD.client("cloudformation")

    def stack(self, **more: Any) -> None:
        CLOUD.admin("POST", "/stack", {"name": "patients", "resources": ["Host"], **more})

    def signal(self, **more: str) -> None:
        params = {
            "StackName": "patients",
            "LogicalResourceId": "Host",
            "UniqueId": INSTANCE,
            "Status": "SUCCESS",
            **more,
        }
        self.client.signal_resource(**params)

    def status(self) -> str:
        return self.client.describe_stacks(StackName="patients")["Stacks"][0]["StackStatus"]

    def test_success_completes_the_stack(self) -> None:
        self.stack()
        self.assertEqual(self.status(), "CREATE_IN_PROGRESS")
        self.signal()
        self.assertEqual(self.status(), "CREATE_COMPLETE")
        answer = CLOUD.admin("GET", "/stack/patients")
        self.assertEqual(answer["status"], "CREATE_COMPLETE")
        (signal,) = answer["signals"]
        self.assertEqual(signal["resource"], "Host")
        self.assertEqual(signal["unique_id"], INSTANCE)
        self.assertEqual(signal["status"], "SUCCESS")

    def test_a_complete_stack_cannot_be_signaled(self) -> None:
        self.stack(status="CREATE_COMPLETE")
        code, message, status = self.aws_error(self.signal)
        self.assertEqual((code, status), ("ValidationError", 400))
        self.assertRegex(
            message,
            r"^Stack arn:aws:cloudformation:us-east-1:\d{12}:stack/patients/\S+ is in"
            r" CREATE_COMPLETE state and cannot be signaled$",
        )
        self.assertEqual(CLOUD.admin("GET", "/stack/patients")["signals"], [])

    def test_failure_rolls_back_and_ends_signalling(self) -> None:
        self.stack(count=2)
        self.signal(Status="FAILURE")
        self.assertEqual(self.status(), "ROLLBACK_IN_PROGRESS")
        _, message, _ = self.aws_error(self.signal)
        self.assertIn("is in ROLLBACK_IN_PROGRESS state and cannot be signaled", message)

    def test_updates(self) -> None:
        self.stack(status="UPDATE_IN_PROGRESS")
        self.signal()
        self.assertEqual(self.status(), "UPDATE_COMPLETE")

    def test_a_repeated_id_counts_once(self) -> None:
        self.stack(count=2)
        for unique in (INSTANCE, INSTANCE, "second"):
            self.assertEqual(self.status(), "CREATE_IN_PROGRESS")
            self.signal(UniqueId=unique)
        self.assertEqual(self.status(), "CREATE_COMPLETE")

    def test_every_resource_needs_its_signals(self) -> None:
        self.stack(resources=["Host", "Other"])
        self.signal()
        self.assertEqual(self.status(), "CREATE_IN_PROGRESS")
        self.signal(LogicalResourceId="Other")
        self.assertEqual(self.status(), "CREATE_COMPLETE")

    def test_the_stack_id_works_as_its_name(self) -> None:
        self.stack()
        arn = self.client.describe_stacks()["Stacks"][0]["StackId"]
        self.signal(StackName=arn)
        self.assertEqual(self.status(), "CREATE_COMPLETE")

    def test_what_does_not_exist(self) -> None:
        self.stack()
        code, message, _ = self.aws_error(self.signal, StackName="nobody")
        self.assertEqual(code, "ValidationError")
        self.assertIn("nobody does not exist", message)
        code, message, _ = self.aws_error(self.signal, LogicalResourceId="Nothing")
        self.assertEqual(code, "ValidationError")
        self.assertIn("Resource Nothing does not exist", message)

    def test_params_are_checked(self) -> None:
        self.stack()
        self.client = CLOUD.client("cloudformation", parameter_validation=False)
        for params, text in (
            ({"UniqueId": "x" * 65}, "less than or equal to 64"),
            ({"UniqueId": ""}, "greater than or equal to 1"),
            ({"Status": "GOOD"}, "[SUCCESS, FAILURE]"),
        ):
            code, message, _ = self.aws_error(self.signal, **params)
            self.assertEqual(code, "ValidationError")
            self.assertIn(text, message)
        self.signal(UniqueId="x" * 64)

    def test_resources_are_described(self) -> None:
        self.stack()
        answer = self.client.describe_stack_resource(
            StackName="patients", LogicalResourceId="Host"
        )
        self.assertEqual(answer["StackResourceDetail"]["ResourceStatus"], "CREATE_IN_PROGRESS")
        events = self.client.describe_stack_events(StackName="patients")["StackEvents"]
        self.assertEqual([e["ResourceStatus"] for e in events], ["CREATE_IN_PROGRESS"])

    def test_wrong_input(self) -> None:
        self.stack()
        stack = {"name": "patients", "resources": ["Host"]}
        self.assert_refused("POST", "/stack", stack, "exists")
        self.assert_refused("POST", "/stack", {**stack, "resources": []}, "resources")
        self.assert_refused("POST", "/stack", {**stack, "count": 0}, "count")
        self.assert_refused("GET", "/stack/nobody", None, "no stack nobody")


class FaultSwitches(CloudCase):
    def setUp(self) -> None:
        super().setUp()
        self.ec2 = CLOUD.client("ec2")
        self.instance()

    def fault(self, **body: Any) -> int:
        return CLOUD.admin("POST", "/faults", body)["id"]

    def test_known_errors_of_ec2(self) -> None:
        for code, status in (
            ("UnauthorizedOperation", 403),
            ("RequestLimitExceeded", 503),
            ("InternalError", 500),
            ("Unavailable", 503),
        ):
            self.fault(service="ec2", action="DescribeInstances", kind="error", code=code, times=1)
            found, message, found_status = self.aws_error(self.ec2.describe_instances)
            self.assertEqual((found, found_status), (code, status))
            self.assertTrue(message)
        self.assertEqual(CLOUD.admin("GET", "/faults"), [])

    def test_the_body_of_an_ec2_error(self) -> None:
        self.fault(service="ec2", kind="error", code="UnauthorizedOperation")
        headers = {
            "Authorization": "AWS4-HMAC-SHA256 Credential=A/20260101/us-east-1/ec2/aws4_request, x",
            "Content-Type": "application/x-www-form-urlencoded",
        }
        body = b"Action=DescribeInstances&Version=2016-11-15"
        status, answer, _ = CLOUD.request("api", "POST", "/", body, headers)
        self.assertEqual(status, 403)
        self.assertRegex(
            answer.decode(),
            r"<Response><Errors><Error><Code>UnauthorizedOperation</Code><Message>You are not"
            r" authorized to perform this operation\.</Message></Error></Errors>"
            r"<RequestID>[-0-9a-f]+</RequestID></Response>$",
        )

    def test_errors_of_query_services(self) -> None:
        self.fault(service="autoscaling", kind="error", code="AccessDenied", message="no <hook>")
        self.fault(service="cloudformation", kind="error", code="Throttling", status=429)
        self.assertEqual(
            self.aws_error(CLOUD.client("autoscaling").describe_auto_scaling_groups),
            ("AccessDenied", "no <hook>", 403),
        )
        # The missing calls go through the same switches.
        call = CLOUD.client("cloudformation").signal_resource
        params = {"StackName": "x", "LogicalResourceId": "x", "UniqueId": "x", "Status": "SUCCESS"}
        self.assertEqual(self.aws_error(call, **params), ("Throttling", "Rate exceeded", 429))

    def test_a_fault_keeps_to_its_service_and_action(self) -> None:
        self.fault(service="ec2", action="DescribeVolumes", kind="error", code="InternalError")
        self.assertEqual(len(self.ec2.describe_instances()["Reservations"]), 1)
        self.assertEqual(self.aws_error(self.ec2.describe_volumes)[0], "InternalError")
        CLOUD.client("autoscaling").describe_auto_scaling_groups()

    def test_times(self) -> None:
        self.fault(service="ec2", kind="error", code="RequestLimitExceeded", times=2)
        for _ in range(2):
            self.aws_error(self.ec2.describe_instances)
        self.assertEqual(len(self.ec2.describe_instances()["Reservations"]), 1)

    def test_empty_answers(self) -> None:
        for service in ("ec2", "autoscaling", "cloudformation"):
            self.fault(service=service, kind="empty")
        self.assertEqual(self.ec2.describe_instances()["Reservations"], [])
        self.assertEqual(self.ec2.describe_volumes()["Volumes"], [])
        groups = CLOUD.client("autoscaling").describe_auto_scaling_groups()
        self.assertEqual(groups["AutoScalingGroups"], [])
        self.assertEqual(CLOUD.client("cloudformation").describe_stacks()["Stacks"], [])
        # Other calls are as they were.
        self.ec2.create_tags(Resources=[INSTANCE], Tags=[{"Key": "a", "Value": "b"}])

    def test_a_delay_comes_before_the_answer(self) -> None:
        self.fault(service="ec2", kind="delay", seconds=0.5, times=1)
        started = time.monotonic()
        self.assertEqual(len(self.ec2.describe_instances()["Reservations"]), 1)
        self.assertGreaterEqual(time.monotonic() - started, 0.5)
        self.assertTrue(CLOUD.admin("GET", "/calls")[-1]["fault"])

    def test_a_hang_never_answers_and_holds_up_nobody(self) -> None:
        self.fault(service="ec2", action="DescribeInstances", kind="hang")
        client = CLOUD.client("ec2", read_timeout=1)
        with self.assertRaises(ReadTimeoutError):
            client.describe_instances()
        self.assertEqual(len(self.ec2.describe_volumes()["Volumes"]), 1)
        call = CLOUD.admin("GET", "/calls")[0]
        self.assertEqual((call["action"], call["status"]), ("DescribeInstances", None))

    def test_metadata_faults_by_path(self) -> None:
        self.fault(service="imds", action="latest/meta-data/iam", kind="error", status=404)
        token = CLOUD.token()
        self.assertEqual(CLOUD.imds("/latest/meta-data/iam/info", token)[0], 404)
        self.assertEqual(CLOUD.imds("/latest/meta-data/instance-id", token)[0], 200)
        self.fault(service="imds", action="/latest/api/token", kind="error", status=503, times=1)
        status, _, _ = CLOUD.request("imds", "PUT", "/latest/api/token", headers={TTL: "60"})
        self.assertEqual(status, 503)
        self.fault(service="imds", action=None, kind="empty")
        self.assertEqual(CLOUD.imds("/latest/meta-data/instance-id", token), (200, ""))
        CLOUD.admin("DELETE", "/faults")
        self.assertEqual(CLOUD.imds("/latest/meta-data/iam/info", token)[0], 200)

    def test_faults_are_listed_and_removed(self) -> None:
        first = self.fault(service="ec2", kind="hang")
        second = self.fault(service="imds", kind="error", status=500, times=3)
        self.assertNotEqual(first, second)
        listed = CLOUD.admin("GET", "/faults")
        self.assertEqual([fault["id"] for fault in listed], [first, second])
        self.assertEqual(listed[1]["times"], 3)
        CLOUD.admin("DELETE", "/faults")
        self.assertEqual(CLOUD.admin("GET", "/faults"), [])

    def test_wrong_input(self) -> None:
        for body, text in (
            ({"service": "s3", "kind": "hang"}, "service must be one of"),
            ({"service": "ec2", "kind": "crash"}, "kind must be one of"),
            ({"service": "ec2", "kind": "error"}, "needs a code"),
            ({"service": "ec2", "kind": "delay"}, "needs seconds"),
            ({"service": "ec2", "kind": "empty", "action": "CreateTags"}, "only a Describe"),
            ({"service": "ec2", "kind": "hang", "times": 0}, "times"),
            ({"service": "ec2", "kind": "hang", "seconds": "1"}, "seconds must be a number"),
        ):
            self.assert_refused("POST", "/faults", body, text)


class Calls(CloudCase):
    def test_calls_are_recorded_without_secrets(self) -> None:
        self.instance()
        ec2 = CLOUD.client("ec2")
        ec2.describe_instances(InstanceIds=[INSTANCE])
        self.aws_error(ec2.describe_volumes, VolumeIds=["vol-00000000000000009"])
        ec2.run_instances(
            ImageId="ami-0123456789abcdef0", MinCount=1, MaxCount=1, UserData="password"
        )
        first, second, third = CLOUD.admin("GET", "/calls")
        self.assertEqual(first["service"], "ec2")
        self.assertEqual(first["action"], "DescribeInstances")
        self.assertEqual(first["params"], {"InstanceId.1": INSTANCE})
        self.assertEqual((first["status"], first["error"], first["fault"]), (200, None, False))
        self.assertRegex(first["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00$")
        self.assertEqual((second["status"], second["error"]), (400, "InvalidVolume.NotFound"))
        self.assertNotIn("UserData", third["params"])
        with open(LOG, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        self.assertEqual(lines[-3:], [first, second, third])
        self.assertNotIn("session-secret", json.dumps(lines))

    def test_the_missing_calls_are_recorded(self) -> None:
        client = CLOUD.client("cloudformation")
        params = {"StackName": "x", "LogicalResourceId": "y", "UniqueId": "z", "Status": "SUCCESS"}
        self.aws_error(client.signal_resource, **params)
        (call,) = CLOUD.admin("GET", "/calls")
        self.assertEqual(call["action"], "SignalResource")
        self.assertEqual(call["params"], params)
        self.assertEqual(call["error"], "ValidationError")

    def test_metadata_requests_are_apart(self) -> None:
        self.instance()
        CLOUD.imds("/latest/meta-data/instance-id")
        self.assertEqual(CLOUD.admin("GET", "/calls"), [])
        calls = CLOUD.admin("GET", "/calls?service=imds")
        self.assertEqual(
            [(call["action"], call["status"]) for call in calls],
            [("PUT latest/api/token", 200), ("GET latest/meta-data/instance-id", 200)],
        )

    def test_calls_are_forgotten_on_request(self) -> None:
        CLOUD.client("ec2").describe_instances()
        self.assertEqual(len(CLOUD.admin("GET", "/calls")), 1)
        CLOUD.admin("DELETE", "/calls")
        self.assertEqual(CLOUD.admin("GET", "/calls"), [])


class Api(CloudCase):
    def test_identity(self) -> None:
        self.assertEqual(CLOUD.client("sts").get_caller_identity()["Account"], "123456789012")

    def test_an_unsigned_call_is_refused(self) -> None:
        status, body, _ = CLOUD.request("api", "POST", "/", b"Action=DescribeInstances")
        self.assertEqual(status, 403)
        self.assertIn(b"MissingAuthenticationToken", body)

    def test_a_call_that_is_not_simulated_is_no_server_error(self) -> None:
        code, _, status = self.aws_error(CLOUD.client("ec2").get_instance_metadata_defaults)
        self.assertEqual((code, status), ("InvalidAction", 400))

    def test_security_groups_can_be_opened(self) -> None:
        self.instance()
        ec2 = CLOUD.client("ec2")
        instance = ec2.describe_instances()["Reservations"][0]["Instances"][0]
        group = instance["SecurityGroups"][0]["GroupId"]
        ec2.authorize_security_group_ingress(
            GroupId=group, IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="0.0.0.0/0"
        )
        rules = ec2.describe_security_group_rules(
            Filters=[{"Name": "group-id", "Values": [group]}]
        )["SecurityGroupRules"]
        self.assertIn(22, [rule.get("FromPort") for rule in rules if not rule["IsEgress"]])


class Files(CloudCase):
    def test_files_are_served_to_guests(self) -> None:
        body = bytes(range(256)) * 1000
        name = "hostagent_1.0.0~rc1+b2-1_amd64.deb"
        self.assertEqual(CLOUD.request("admin", "PUT", f"/files/{name}", body)[0], 200)
        status, answer, headers = CLOUD.request("api", "GET", f"/lab/files/{name}")
        self.assertEqual((status, headers["content-length"]), (200, str(len(body))))
        self.assertEqual(answer, body)
        self.assertEqual(CLOUD.admin("GET", "/calls"), [])

    def test_what_is_not_there(self) -> None:
        self.assertEqual(CLOUD.request("api", "GET", "/lab/files/none")[0], 404)
        self.assertEqual(CLOUD.request("admin", "PUT", "/files/.hidden", b"")[0], 400)


class Reset(CloudCase):
    def test_everything_is_gone(self) -> None:
        self.instance()
        self.volume()
        self.attach()
        CLOUD.admin("POST", "/stack", {"name": "patients", "resources": ["Host"]})
        CLOUD.admin("POST", "/group", {"name": "workers", "instance": INSTANCE})
        CLOUD.admin("POST", "/faults", {"service": "sts", "kind": "hang"})
        CLOUD.request("admin", "PUT", "/files/x", b"x")
        CLOUD.client("ec2").describe_instances()
        CLOUD.admin("POST", "/reset")
        self.assertEqual(CLOUD.admin("GET", "/calls"), [])
        self.assertEqual(CLOUD.admin("GET", "/faults"), [])
        ec2 = CLOUD.client("ec2")
        self.assertEqual(ec2.describe_instances()["Reservations"], [])
        self.assertEqual(ec2.describe_volumes()["Volumes"], [])
        self.assertEqual(ec2.describe_tags()["Tags"], [])
        groups = CLOUD.client("autoscaling").describe_auto_scaling_groups()
        self.assertEqual(groups["AutoScalingGroups"], [])
        self.assertEqual(CLOUD.client("cloudformation").describe_stacks()["Stacks"], [])
        self.assertEqual(CLOUD.try_admin("GET", "/group/workers")[0], 400)
        self.assertEqual(CLOUD.request("api", "GET", "/lab/files/x")[0], 404)
        self.assertEqual(CLOUD.imds("/latest/meta-data/instance-id")[0], 404)
        self.instance()
        self.volume()


if __name__ == "__main__":
    unittest.main()
