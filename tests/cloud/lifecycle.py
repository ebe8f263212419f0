"""One Auto Scaling group with one member, and the lifecycle action that may be pending on it."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from calls import now

# AWS ends an action after 100 heartbeat time-outs or 48 hours, heartbeats or not.
MAX_HEARTBEATS = 100
MAX_SECONDS = 48 * 3600

# State that waits for a hook -> states that follow a CONTINUE.
AFTER_CONTINUE = {
    "Pending:Wait": ["Pending:Proceed", "InService"],
    "Warmed:Pending:Wait": ["Warmed:Pending:Proceed", "Warmed:Stopped"],
    "Terminating:Wait": ["Terminating:Proceed", "Terminated"],
    "Warmed:Terminating:Wait": ["Warmed:Terminating:Proceed", "Warmed:Terminated"],
}
# ... and an ABANDON. A termination cannot be stopped, so there it only ends the waiting.
AFTER_ABANDON = {
    "Pending:Wait": ["Terminating"],
    "Warmed:Pending:Wait": ["Warmed:Terminating"],
    "Terminating:Wait": AFTER_CONTINUE["Terminating:Wait"],
    "Warmed:Terminating:Wait": AFTER_CONTINUE["Warmed:Terminating:Wait"],
}


@dataclass
class Action:
    hook: str
    heartbeat_timeout: int
    default_result: str
    started: float
    deadline: float
    token: str = field(default_factory=lambda: str(uuid.uuid4()))


@dataclass
class Group:
    name: str
    instance: str
    # moto's model of the membership, which holds the state that Describe calls show.
    member: Any
    action: Action | None = None
    completions: list[dict[str, str]] = field(default_factory=list)
    heartbeats: int = 0
    history: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        return self.member.lifecycle_state

    def enter(
        self, state: str, hook: str | None, heartbeat_timeout: int, default_result: str
    ) -> None:
        self._move([state])
        self.action = None
        if hook and state in AFTER_CONTINUE:
            started = time.monotonic()
            self.action = Action(
                hook, heartbeat_timeout, default_result, started, started + heartbeat_timeout
            )

    def find_action(self, hook: str, instance: str, token: str) -> Action | None:
        """The pending action, if this is the one that the caller means."""
        self.expire(time.monotonic())
        if self.action is None or self.action.hook != hook:
            return None
        # AWS looks at the token first, and ignores the instance when there is one.
        matches = token == self.action.token if token else instance == self.instance
        return self.action if matches else None

    def complete(self, result: str) -> None:
        """End the pending action with what the caller asked for."""
        self.completions.append(
            {"instance": self.instance, "hook": self.action.hook, "result": result, "time": now()}
        )
        self._finish(result)

    def heartbeat(self) -> None:
        self.heartbeats += 1
        limit = min(self.action.heartbeat_timeout * MAX_HEARTBEATS, MAX_SECONDS)
        self.action.deadline = min(
            time.monotonic() + self.action.heartbeat_timeout, self.action.started + limit
        )

    def expire(self, at: float) -> None:
        """Apply the hook's default result once its time is over."""
        if self.action and at >= self.action.deadline:
            self._finish(self.action.default_result)

    def target_state(self) -> str | None:
        """The target that the metadata service shows, None before there is one."""
        state = self.state
        warm = "Warmed:" if state.startswith("Warmed:") else ""
        name = state.removeprefix("Warmed:").split(":")[0]
        if name == "Pending":
            return "Warmed:Stopped" if warm else "InService"
        if name in ("Terminating", "Terminated"):
            return warm + "Terminated"
        if name in ("Detaching", "Detached"):
            return "Detached"
        if name in ("EnteringStandby", "Standby"):
            return "Standby"
        if name == "InService" or warm:
            return state
        return None

    def _finish(self, result: str) -> None:
        self.action = None
        follow = AFTER_CONTINUE if result == "CONTINUE" else AFTER_ABANDON
        self._move(follow[self.state])

    def _move(self, states: list[str]) -> None:
        self.history.extend(states)
        self.member.lifecycle_state = states[-1]
