"""One CloudFormation stack whose resources wait for signals."""

from dataclasses import dataclass, field
from typing import Any

from calls import now

# Signals are taken only here; a stack that rolls back is in progress too, but cannot be signaled.
AFTER_SUCCESS = {
    "CREATE_IN_PROGRESS": "CREATE_COMPLETE",
    "UPDATE_IN_PROGRESS": "UPDATE_COMPLETE",
}
AFTER_FAILURE = {
    "CREATE_IN_PROGRESS": "ROLLBACK_IN_PROGRESS",
    "UPDATE_IN_PROGRESS": "UPDATE_ROLLBACK_IN_PROGRESS",
}


@dataclass
class Stack:
    # moto's stack, which holds the status that Describe calls show.
    model: Any
    resources: list[str]
    # Signals with different ids that each resource needs.
    count: int
    signals: list[dict[str, str]] = field(default_factory=list)

    @property
    def status(self) -> str:
        return self.model.status

    def can_be_signaled(self) -> bool:
        return self.status in AFTER_SUCCESS

    def signal(self, resource: str, unique_id: str, status: str) -> None:
        self.signals.append(
            {"resource": resource, "unique_id": unique_id, "status": status, "time": now()}
        )
        if status == "FAILURE":
            self._set_status(AFTER_FAILURE[self.status])
        elif all(self._successes(resource) >= self.count for resource in self.resources):
            self._set_status(AFTER_SUCCESS[self.status])

    def _successes(self, resource: str) -> int:
        return len({s["unique_id"] for s in self.signals if s["resource"] == resource})

    def _set_status(self, status: str) -> None:
        self.model.status = status
        self.model._add_stack_event(status)
