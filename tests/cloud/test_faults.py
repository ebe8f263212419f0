"""The faults that can be switched on."""

import time
from typing import Any

from botocore.exceptions import ReadTimeoutError
from support import CLOUD, INSTANCE, TTL, CloudCase


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
