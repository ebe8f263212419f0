"""EC2, as boto3 sees it."""

from typing import Any

from support import CLOUD, INSTANCE, ROOT, VOLUME, CloudCase


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
