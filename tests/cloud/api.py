"""The AWS API port: call log, faults and the calls moto lacks, in front of moto's own server."""

import io
import json
import re
import sys
from typing import Any
from urllib.parse import parse_qsl, unquote

import missing
import wire
from calls import CallLog
from faults import Faults
from server import Request, Response
from wire import AwsError
from world import World

SCOPE = re.compile(r"Credential=[^/\s]+/\d{8}/([^/\s]+)/([^/\s]+)/aws4_request")
ERROR_CODE = re.compile(rb"<Code>([^<]*)</Code>")
JSON_ERROR_CODE = re.compile(rb'"__type":\s*"([^"]*)"')
# Credentials of a signature made in the query, and user-data, which may hold a host's secrets.
SECRET_PARAMS = re.compile(
    r"(?i)^(X-Amz-(Credential|Signature|Security-Token)|AWSAccessKeyId|Signature|SecurityToken"
    r"|.*UserData.*|.*Password.*|.*Secret.*)$"
)
# moto's own control pages and metadata service: neither exists at AWS's API endpoints.
MOTO_PAGES = ("/moto-api", "/latest/")


class Api:
    def __init__(self, world: World, faults: Faults, calls: CallLog, moto: Any, port: int) -> None:
        self._world = world
        self._faults = faults
        self._calls = calls
        # moto's WSGI application, which finds the service by the credential scope.
        self._moto = moto
        self._port = port

    def handle(self, request: Request) -> Response | None:
        if request.path.startswith("/lab/files/"):
            return self._file(request)
        scope = SCOPE.search(request.header("Authorization"))
        if not scope or request.path.startswith(MOTO_PAGES):
            problem = AwsError(
                "MissingAuthenticationToken", "Request is missing Authentication Token", 403
            )
            self._calls.add("", _operation(request, {}), {}, 403, problem.code, False)
            return wire.error("", problem)
        service = scope[2].lower()
        params = _parse(request)
        action = _operation(request, params)
        shown = {key: value for key, value in params.items() if not SECRET_PARAMS.match(key)}
        touched, fault = self._faults.apply(service, action)
        if fault and fault.kind == "hang":
            self._calls.add(service, action, shown, None, None, True)
            request.wait_for_hangup()
            return None
        if fault and fault.kind == "error":
            response = wire.error(service, AwsError(fault.code, fault.message, fault.status))
        elif fault:
            response = wire.empty(service, action)
        else:
            response = self._answer(request, service, action, params)
        self._calls.add(service, action, shown, response.status, _error_code(response), touched)
        return response

    def _answer(
        self, request: Request, service: str, action: str, params: dict[str, Any]
    ) -> Response:
        try:
            if (service, action) in missing.CALLS:
                return missing.answer(self._world, service, action, params)
            if service == "autoscaling":
                with self._world.lock:
                    self._world.expire_lifecycle_actions()
            return self._ask_moto(request)
        except AwsError as problem:
            return wire.error(service, problem)
        except NotImplementedError:
            # Not a 5xx: clients would retry what will never work.
            print(f"cloud: moto has no {service} {action}", file=sys.stderr)
            message = f"The action {action} is not simulated."
            return wire.error(service, AwsError("InvalidAction", message))

    def _ask_moto(self, request: Request) -> Response:
        environ: dict[str, Any] = {
            "REQUEST_METHOD": request.method,
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote(request.path, "latin-1"),
            "QUERY_STRING": request.query,
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": str(self._port),
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "CONTENT_TYPE": request.header("Content-Type"),
            "CONTENT_LENGTH": str(len(request.body)),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(request.body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        for name, value in request.headers.items():
            # The body is complete here, whatever it travelled as.
            if name not in ("content-type", "content-length", "transfer-encoding"):
                environ["HTTP_" + name.upper().replace("-", "_")] = value
        start: list[Any] = []

        def start_response(status: str, headers: list[Any], error: Any = None) -> None:
            start[:] = [status, headers]

        chunks = self._moto(environ, start_response)
        try:
            body = b"".join(chunks)
        finally:
            if hasattr(chunks, "close"):
                chunks.close()
        status, headers = start
        content_type = "text/xml"
        kept = []
        for name, value in headers:
            if name.lower() == "content-type":
                content_type = value
            elif name.lower() not in ("content-length", "date", "server", "connection"):
                kept.append((name, value))
        return Response(int(status.split()[0]), body, content_type, kept)

    def _file(self, request: Request) -> Response:
        name = unquote(request.path.removeprefix("/lab/files/"))
        if request.method not in ("GET", "HEAD"):
            return Response(405, b"only GET\n")
        with self._world.lock:
            body = self._world.files.get(name)
        if body is None:
            return Response(404, b"no such file\n")
        return Response(200, body, "application/octet-stream")


def _parse(request: Request) -> dict[str, Any]:
    """The parameters of a call: form, query, or a JSON body."""
    params: dict[str, Any] = dict(parse_qsl(request.query, keep_blank_values=True))
    kind = request.header("Content-Type").split(";")[0]
    if kind == "application/x-www-form-urlencoded":
        text = request.body.decode("utf-8", "replace")
        params.update(parse_qsl(text, keep_blank_values=True))
    elif "json" in kind and request.body:
        try:
            body = json.loads(request.body)
        except ValueError:
            body = None
        if isinstance(body, dict):
            params.update(body)
    params.pop("Version", None)
    return params


def _operation(request: Request, params: dict[str, Any]) -> str:
    """The action, or what stands for it in services without one: method and path."""
    target = request.header("X-Amz-Target")
    if "Action" in params:
        return params.pop("Action")
    return target.rpartition(".")[2] if target else f"{request.method} {request.path}"


def _error_code(response: Response) -> str | None:
    if response.status < 400:
        return None
    code = ERROR_CODE.search(response.body) or JSON_ERROR_CODE.search(response.body)
    return code[1].decode() if code else "Unknown"
