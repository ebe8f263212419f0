"""AWS calls that moto lacks, answered from the world."""

from typing import Callable

import wire
from server import Response
from wire import AwsError
from world import World


def complete_lifecycle_action(world: World, params: dict[str, str]) -> str:
    _require(params, "AutoScalingGroupName", "LifecycleHookName", "LifecycleActionResult")
    result = params["LifecycleActionResult"]
    if result not in ("CONTINUE", "ABANDON"):
        must = "satisfy enum value set: [CONTINUE, ABANDON]"
        raise _invalid("LifecycleActionResult", result, must)
    _active_group(world, params).complete(result)
    return ""


def record_lifecycle_action_heartbeat(world: World, params: dict[str, str]) -> str:
    _require(params, "AutoScalingGroupName", "LifecycleHookName")
    _active_group(world, params).heartbeat()
    return ""


def _active_group(world: World, params: dict[str, str]):
    instance = params.get("InstanceId", "")
    token = params.get("LifecycleActionToken", "")
    if not instance and not token:
        raise AwsError(
            "ValidationError", "Either InstanceId or LifecycleActionToken must be specified"
        )
    name = params["AutoScalingGroupName"]
    if name not in world.autoscaling.autoscaling_groups:
        raise AwsError(
            "ValidationError",
            f"AutoScalingGroup name not found - AutoScalingGroup {name} not found",
        )
    group = world.groups.get(name)
    # A hook that does not exist (yet) reads the same as one that is done: only the message tells.
    if not group or not group.find_action(params["LifecycleHookName"], instance, token):
        which = f"token {token}" if token else f"instance ID {instance}"
        raise AwsError("ValidationError", f"No active Lifecycle Action found with {which}")
    return group


def signal_resource(world: World, params: dict[str, str]) -> None:
    _require(params, "StackName", "LogicalResourceId", "UniqueId", "Status")
    if len(params["UniqueId"]) > 64:
        raise _invalid("UniqueId", params["UniqueId"], "have length less than or equal to 64")
    if params["Status"] not in ("SUCCESS", "FAILURE"):
        raise _invalid("Status", params["Status"], "satisfy enum value set: [SUCCESS, FAILURE]")
    stack = world.find_stack(params["StackName"])
    if not stack:
        raise AwsError("ValidationError", f"Stack {params['StackName']} does not exist")
    if not stack.can_be_signaled():
        raise AwsError(
            "ValidationError",
            f"Stack {stack.model.stack_id} is in {stack.status} state and cannot be signaled",
        )
    if params["LogicalResourceId"] not in stack.resources:
        raise AwsError(
            "ValidationError",
            f"Resource {params['LogicalResourceId']} does not exist for stack {stack.model.name}",
        )
    stack.signal(params["LogicalResourceId"], params["UniqueId"], params["Status"])


# Each returns the inside of its result element, or None if the action has no output at all.
CALLS: dict[tuple[str, str], Callable[[World, dict[str, str]], str | None]] = {
    ("autoscaling", "CompleteLifecycleAction"): complete_lifecycle_action,
    ("autoscaling", "RecordLifecycleActionHeartbeat"): record_lifecycle_action_heartbeat,
    ("cloudformation", "SignalResource"): signal_resource,
}


def answer(world: World, service: str, action: str, params: dict[str, str]) -> Response:
    with world.lock:
        return wire.success(service, action, CALLS[service, action](world, params))


def _require(params: dict[str, str], *names: str) -> None:
    for name in names:
        if name not in params:
            raise _invalid(name, None, "not be null")
        if not params[name]:
            raise _invalid(name, "", "have length greater than or equal to 1")


def _invalid(name: str, value: str | None, must: str) -> AwsError:
    shown = "null" if value is None else f"'{value}'"
    member = name[0].lower() + name[1:]
    return AwsError(
        "ValidationError",
        f"1 validation error detected: Value {shown} at '{member}' failed to satisfy constraint: "
        f"Member must {must}",
    )
