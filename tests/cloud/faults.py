"""Faults that a scenario switches on: errors, empty answers, delays, silence."""

import itertools
import threading
import time
from dataclasses import asdict, dataclass

SERVICES = ("ec2", "autoscaling", "cloudformation", "sts", "imds")
KINDS = ("error", "empty", "delay", "hang")

# Status and message as AWS sends them, for the codes that scenarios ask for most.
KNOWN_CODES = {
    "UnauthorizedOperation": (403, "You are not authorized to perform this operation."),
    "AccessDenied": (403, "User is not authorized to perform this action."),
    "AuthFailure": (401, "AWS was not able to validate the provided access credentials"),
    "ExpiredToken": (403, "The security token included in the request is expired"),
    "InvalidClientTokenId": (403, "The security token included in the request is invalid."),
    "RequestExpired": (400, "Request has expired."),
    "RequestLimitExceeded": (503, "Request limit exceeded."),
    "Throttling": (400, "Rate exceeded"),
    "InternalError": (500, "An internal error has occurred"),
    "InternalFailure": (500, "An internal error has occurred"),
    "ServiceUnavailable": (503, "Service is unavailable. Please try again shortly."),
    "Unavailable": (503, "The server is overloaded and can't handle the request."),
    "ValidationError": (400, "The request is not valid."),
}


@dataclass
class Fault:
    id: int
    service: str
    # An action, for the metadata service the beginning of a path; None is all of the service.
    action: str | None
    kind: str
    code: str
    status: int
    message: str
    seconds: float
    # How many calls it still applies to; None is without end.
    times: int | None

    def matches(self, service: str, action: str) -> bool:
        if self.service != service:
            return False
        if self.kind == "empty" and service != "imds" and not action.startswith("Describe"):
            return False
        if self.action is None:
            return True
        if service == "imds":
            return action.startswith(self.action.lstrip("/"))
        return action == self.action


class Faults:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._ids = itertools.count(1)

    def add(
        self,
        service: str,
        action: str | None,
        kind: str,
        code: str | None,
        status: int | None,
        message: str | None,
        seconds: float | None,
        times: int | None,
    ) -> int:
        if service not in SERVICES:
            raise ValueError(f"service must be one of {', '.join(SERVICES)}")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}")
        if kind == "error" and code is None and not (service == "imds" and status is not None):
            raise ValueError("an error needs a code (for imds: a status)")
        if kind == "delay" and seconds is None:
            raise ValueError("a delay needs seconds")
        describes = action is None or action.startswith("Describe")
        if kind == "empty" and service != "imds" and not describes:
            raise ValueError("only a Describe call has an empty answer")
        if times is not None and times < 1:
            raise ValueError("times must be at least 1")
        known_status, known_message = KNOWN_CODES.get(code or "", (400, code or ""))
        fault = Fault(
            id=next(self._ids),
            service=service,
            action=action,
            kind=kind,
            code=code or "",
            status=status if status is not None else known_status,
            message=message if message is not None else known_message,
            seconds=seconds or 0,
            times=times,
        )
        with self._lock:
            self._faults.append(fault)
        return fault.id

    def list(self) -> list[dict]:
        with self._lock:
            return [asdict(fault) for fault in self._faults]

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def apply(self, service: str, action: str) -> tuple[bool, Fault | None]:
        """Wait out the delays that match, and return the first other fault that does.

        The first value says whether any fault, a delay too, touched this call.
        """
        delay = 0.0
        touched = False
        found = None
        with self._lock:
            for fault in list(self._faults):
                if not fault.matches(service, action):
                    continue
                touched = True
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times == 0:
                        self._faults.remove(fault)
                if fault.kind != "delay":
                    found = fault
                    break
                delay += fault.seconds
        # Outside the lock: a slow call must not hold up the others.
        if delay:
            time.sleep(delay)
        return touched, found
