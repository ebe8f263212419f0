"""The metadata service, as a guest sees it."""

import json
import time
from typing import Any

from support import CLOUD, INSTANCE, MAC, TTL, CloudCase


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
