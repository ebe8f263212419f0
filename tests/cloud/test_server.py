"""The program itself: its process, its HTTP, its record of calls, its administration."""

import http.client
import json
import socket
import time
import unittest

from support import CLOUD, INSTANCE, LOG, TTL, Cloud, CloudCase


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
