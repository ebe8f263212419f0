"""The admin port: the lab sets the world up and reads back what happened in it, as JSON."""

import json
import re
from dataclasses import dataclass
from typing import Any, Callable
from urllib.parse import parse_qs, unquote

from calls import CallLog
from faults import Faults
from imds import Imds
from server import Request, Response
from world import World, WorldError

FILE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._+~-]*$")
ID_PATTERNS = {
    "instance": re.compile(r"^i-[0-9a-f]{8,17}$"),
    "volume": re.compile(r"^vol-[0-9a-f]{8,17}$"),
}
REQUIRED = object()


class BadInput(Exception):
    pass


@dataclass(frozen=True)
class Key:
    """One key of a body: its type, whether it may be null, and what stands for it when absent."""

    type: type
    default: Any = REQUIRED
    nullable: bool = False

    def check(self, name: str, value: Any) -> Any:
        if value is None and self.nullable:
            return None
        # bool is an int in Python, and never meant as one here.
        good = isinstance(value, self.type) and isinstance(value, bool) == (self.type is bool)
        if not good and not (self.type is float and type(value) is int):
            null = " or null" if self.nullable else ""
            raise BadInput(f"{name} must be {JSON_TYPES[self.type]}{null}")
        return value


JSON_TYPES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a boolean",
    dict: "an object",
    list: "an array",
}

INSTANCE = {
    "id": Key(str),
    "type": Key(str, "m5.large"),
    "tenancy": Key(str, "default"),
    "user_data": Key(str, None, nullable=True),
    "tags": Key(dict, {}),
    "metadata_tags": Key(bool, False),
    "root_volume": Key(str, "vol-0aaaaaaaaaaaaaaa0"),
    "root_encrypted": Key(bool, True),
    "http_tokens": Key(str, "required"),
    "public_key": Key(str, None, nullable=True),
    "hop_limit": Key(int, 1),
    "image": Key(str, "ami-0123456789abcdef0"),
    "role": Key(str, "hostagent", nullable=True),
    "mac": Key(str, "52:54:00:12:34:56"),
    "local_ipv4": Key(str, "169.254.169.15"),
}
INSTANCE_CHANGE = {
    "tenancy": Key(str),
    "tags": Key(dict),
    "user_data": Key(str, nullable=True),
    "metadata_tags": Key(bool),
    "state": Key(str),
}
VOLUME = {
    "id": Key(str),
    "size": Key(int, 8),
    "encrypted": Key(bool, True),
    "kms_key_id": Key(str, None, nullable=True),
    "tags": Key(dict, {}),
}
VOLUME_CHANGE = {
    "size": Key(int),
    "encrypted": Key(bool),
    "kms_key_id": Key(str, nullable=True),
    "tags": Key(dict),
}
ATTACH = {
    "volume": Key(str),
    "instance": Key(str),
    "device": Key(str),
    "state": Key(str, "attached"),
    "at_launch": Key(bool, False),
}
DETACH = {"volume": Key(str)}
STACK = {
    "name": Key(str),
    "status": Key(str, "CREATE_IN_PROGRESS"),
    "resources": Key(list),
    "count": Key(int, 1),
}
GROUP = {
    "name": Key(str),
    "instance": Key(str),
    "state": Key(str, "Pending:Wait"),
    "hook": Key(str, None, nullable=True),
    "heartbeat_timeout": Key(int, 3600),
    "default_result": Key(str, "ABANDON"),
}
FAULT = {
    "service": Key(str),
    "action": Key(str, None, nullable=True),
    "kind": Key(str),
    "code": Key(str, None, nullable=True),
    "status": Key(int, None, nullable=True),
    "message": Key(str, None, nullable=True),
    "seconds": Key(float, None, nullable=True),
    "times": Key(int, None, nullable=True),
}


class Admin:
    def __init__(self, world: World, faults: Faults, calls: CallLog, imds: Imds) -> None:
        self._world = world
        self._faults = faults
        self._calls = calls
        self._imds = imds
        # Method, path with at most one {name}, and what answers it.
        self._routes: list[tuple[str, str, Callable[[Request, str], Any]]] = [
            ("POST", "/reset", self._reset),
            ("POST", "/instance", self._create_instance),
            ("PATCH", "/instance/{name}", self._change_instance),
            ("POST", "/volume", self._create_volume),
            ("PATCH", "/volume/{name}", self._change_volume),
            ("POST", "/attach", self._attach),
            ("POST", "/detach", self._detach),
            ("POST", "/stack", self._create_stack),
            ("GET", "/stack/{name}", self._show_stack),
            ("POST", "/group", self._put_group),
            ("GET", "/group/{name}", self._show_group),
            ("POST", "/faults", self._add_fault),
            ("GET", "/faults", lambda request, name: self._faults.list()),
            ("DELETE", "/faults", lambda request, name: self._faults.clear()),
            ("GET", "/calls", self._show_calls),
            ("DELETE", "/calls", lambda request, name: self._calls.clear()),
            ("PUT", "/files/{name}", self._put_file),
        ]

    def handle(self, request: Request) -> Response:
        for method, pattern, function in self._routes:
            match = re.fullmatch(pattern.replace("{name}", "([^/]+)"), request.path)
            if method != request.method or not match:
                continue
            name = unquote(match[1]) if match.groups() else ""
            try:
                with self._world.lock:
                    answer = function(request, name)
            except (BadInput, WorldError, ValueError) as error:
                return _json(400, {"error": str(error)})
            return _json(200, {} if answer is None else answer)
        return _json(404, {"error": f"no route {request.method} {request.path}"})

    def _reset(self, request: Request, name: str) -> None:
        _read(request, {})
        self._world.reset()
        self._faults.clear()
        self._calls.clear()
        self._imds.reset()

    def _create_instance(self, request: Request, name: str) -> None:
        body = _read(request, INSTANCE)
        _check_id("instance", body["id"])
        _check_id("volume", body["root_volume"])
        _check_tags(body["tags"])
        self._world.create_instance(**body)

    def _change_instance(self, request: Request, name: str) -> None:
        body = _read(request, INSTANCE_CHANGE, partial=True)
        _check_tags(body.get("tags", {}), removable=True)
        changes = {key: value for key, value in body.items() if key != "user_data"}
        self._world.change_instance(name, **changes)
        if "user_data" in body:
            self._world.set_user_data(name, body["user_data"])

    def _create_volume(self, request: Request, name: str) -> None:
        body = _read(request, VOLUME)
        _check_id("volume", body["id"])
        _check_tags(body["tags"])
        self._world.create_volume(**body)

    def _change_volume(self, request: Request, name: str) -> None:
        body = _read(request, VOLUME_CHANGE, partial=True)
        _check_tags(body.get("tags", {}), removable=True)
        self._world.change_volume(name, **body)

    def _attach(self, request: Request, name: str) -> None:
        self._world.attach(**_read(request, ATTACH))

    def _detach(self, request: Request, name: str) -> None:
        self._world.detach(**_read(request, DETACH))

    def _create_stack(self, request: Request, name: str) -> None:
        body = _read(request, STACK)
        if not body["resources"] or not all(isinstance(r, str) and r for r in body["resources"]):
            raise BadInput("resources must be an array of names")
        if body["count"] < 1:
            raise BadInput("count must be at least 1")
        self._world.create_stack(**body)

    def _show_stack(self, request: Request, name: str) -> dict[str, Any]:
        stack = self._world.stack(name)
        return {"status": stack.status, "signals": stack.signals}

    def _put_group(self, request: Request, name: str) -> None:
        body = _read(request, GROUP)
        if body["heartbeat_timeout"] < 1:
            raise BadInput("heartbeat_timeout must be at least 1")
        self._world.put_group(**body)

    def _show_group(self, request: Request, name: str) -> dict[str, Any]:
        self._world.expire_lifecycle_actions()
        group = self._world.group(name)
        return {
            "state": group.state,
            "completions": group.completions,
            "heartbeats": group.heartbeats,
            "history": group.history,
            "token": group.action.token if group.action else None,
        }

    def _add_fault(self, request: Request, name: str) -> dict[str, int]:
        return {"id": self._faults.add(**_read(request, FAULT))}

    def _show_calls(self, request: Request, name: str) -> list[dict[str, Any]]:
        return self._calls.list(parse_qs(request.query).get("service", [None])[0])

    def _put_file(self, request: Request, name: str) -> None:
        if not FILE_NAME.match(name):
            raise BadInput("a file name has letters, digits and . _ + ~ -")
        self._world.files[name] = request.body


def _read(request: Request, keys: dict[str, Key], partial: bool = False) -> dict[str, Any]:
    """The body, checked; with `partial` only the keys that are there."""
    try:
        body = json.loads(request.body or b"{}")
    except ValueError as error:
        raise BadInput(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadInput("the body must be an object")
    unknown = sorted(set(body) - set(keys))
    if unknown:
        raise BadInput(f"unknown key {', '.join(unknown)}")
    result = {}
    for name, key in keys.items():
        if name in body:
            result[name] = key.check(name, body[name])
        elif not partial:
            if key.default is REQUIRED:
                raise BadInput(f"{name} is missing")
            result[name] = key.default
    return result


def _check_id(kind: str, value: str) -> None:
    if not ID_PATTERNS[kind].match(value):
        raise BadInput(f"{value!r} is no {kind} id")


def _check_tags(tags: dict[str, Any], removable: bool = False) -> None:
    for key, value in tags.items():
        if not isinstance(value, str) and not (removable and value is None):
            raise BadInput(f"tag {key} must be a string")


def _json(status: int, value: Any) -> Response:
    return Response(status, json.dumps(value).encode(), "application/json")
