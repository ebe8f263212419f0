"""The record of every call that reached the simulation."""

import json
import threading
from datetime import datetime, timezone
from typing import Any


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class CallLog:
    """Calls in the order they were answered, in memory and perhaps in a file of JSON lines."""

    def __init__(self, path: str | None) -> None:
        self._lock = threading.Lock()
        self._calls: list[dict[str, Any]] = []
        self._file = open(path, "a", buffering=1, encoding="utf-8") if path else None

    def add(
        self,
        service: str,
        action: str,
        params: dict[str, Any],
        status: int | None,
        error: str | None,
        fault: bool,
    ) -> None:
        """`status` is None for a call that never got an answer."""
        record = {
            "time": now(),
            "service": service,
            "action": action,
            "params": params,
            "status": status,
            "error": error,
            "fault": fault,
        }
        with self._lock:
            self._calls.append(record)
            if self._file:
                self._file.write(json.dumps(record) + "\n")

    def list(self, service: str | None) -> list[dict[str, Any]]:
        """The calls of one service; without a name, all but the metadata service's.

        A booting guest makes hundreds of metadata requests, which would bury the few API calls
        that a scenario asserts on.
        """
        with self._lock:
            if service is None:
                return [call for call in self._calls if call["service"] != "imds"]
            return [call for call in self._calls if call["service"] == service]

    def clear(self) -> None:
        with self._lock:
            self._calls.clear()
