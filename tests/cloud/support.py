"""What the tests talk to the simulated cloud with: one cloud, and a clean state for every test."""

import atexit
import http.client
import json
import os
import subprocess
import sys
import tempfile
import unittest
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

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


def start() -> tuple[Cloud, str]:
    """Starts the cloud that all tests share, and ends it with them."""
    handle, log = tempfile.mkstemp(suffix=".jsonl")
    os.close(handle)
    cloud = Cloud("--log", log)
    atexit.register(os.unlink, log)
    atexit.register(cloud.close)
    return cloud, log


CLOUD, LOG = start()


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
