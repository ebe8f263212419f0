"""Auto Scaling's hooks and CloudFormation's signals, as boto3 sees them."""

import time
from typing import Any

from support import CLOUD, INSTANCE, CloudCase


class Lifecycle(CloudCase):
    def setUp(self) -> None:
        super().setUp()
        self.client = CLOUD.client("autoscaling")
        self.instance()

    def group(self, **more: Any) -> None:
        body = {"name": "workers", "instance": INSTANCE, "hook": "launch", **more}
        CLOUD.admin("POST", "/group", body)

    def complete(self, **more: str) -> None:
        params = {
            "AutoScalingGroupName": "workers",
            "LifecycleHookName": "launch",
            "LifecycleActionResult": "CONTINUE",
            "InstanceId": INSTANCE,
            **more,
        }
        self.client.complete_lifecycle_action(**{k: v for k, v in params.items() if v})

    def heartbeat(self, **more: str) -> None:
        self.client.record_lifecycle_action_heartbeat(
            **{
                "AutoScalingGroupName": "workers",
                "LifecycleHookName": "launch",
                "InstanceId": INSTANCE,
                **more,
            }
        )

    def state(self) -> str:
        answer = self.client.describe_auto_scaling_instances(InstanceIds=[INSTANCE])
        return answer["AutoScalingInstances"][0]["LifecycleState"]

    def target(self) -> tuple[int, str]:
        return CLOUD.imds("/latest/meta-data/autoscaling/target-lifecycle-state")

    def test_a_member_shows_everywhere(self) -> None:
        self.group(heartbeat_timeout=600)
        self.assertEqual(self.state(), "Pending:Wait")
        self.assertEqual(self.target(), (200, "InService"))
        instance = CLOUD.client("ec2").describe_instances()["Reservations"][0]["Instances"][0]
        self.assertIn({"Key": "aws:autoscaling:groupName", "Value": "workers"}, instance["Tags"])
        (hook,) = self.client.describe_lifecycle_hooks(AutoScalingGroupName="workers")[
            "LifecycleHooks"
        ]
        self.assertEqual(hook["HeartbeatTimeout"], 600)
        self.assertEqual(hook["DefaultResult"], "ABANDON")
        (group,) = self.client.describe_auto_scaling_groups()["AutoScalingGroups"]
        self.assertEqual(group["Instances"][0]["InstanceId"], INSTANCE)

    def test_continue_puts_into_service_and_ends_the_action(self) -> None:
        self.group()
        self.complete()
        self.assertEqual(self.state(), "InService")
        answer = CLOUD.admin("GET", "/group/workers")
        self.assertEqual(answer["state"], "InService")
        self.assertEqual(answer["history"], ["Pending:Wait", "Pending:Proceed", "InService"])
        (completion,) = answer["completions"]
        self.assertEqual(completion["instance"], INSTANCE)
        self.assertEqual(completion["hook"], "launch")
        self.assertEqual(completion["result"], "CONTINUE")
        self.assert_no_action(self.complete)

    def test_abandon_terminates(self) -> None:
        self.group()
        self.complete(LifecycleActionResult="ABANDON")
        self.assertEqual(self.state(), "Terminating")
        self.assertEqual(self.target(), (200, "Terminated"))

    def test_a_token_stands_for_the_instance(self) -> None:
        self.group()
        wrong = "00000000-0000-0000-0000-000000000000"
        code, message, _ = self.aws_error(
            self.complete, LifecycleActionToken=wrong, InstanceId=""
        )
        self.assertEqual(message, f"No active Lifecycle Action found with token {wrong}")
        token = CLOUD.admin("GET", "/group/workers")["token"]
        self.complete(LifecycleActionToken=token, InstanceId="")
        self.assertEqual(self.state(), "InService")

    def assert_no_action(self, call: Any, **params: str) -> None:
        instance = params.get("InstanceId", INSTANCE)
        self.assertEqual(
            self.aws_error(call, **params),
            (
                "ValidationError",
                f"No active Lifecycle Action found with instance ID {instance}",
                400,
            ),
        )

    def test_no_active_action(self) -> None:
        self.group(hook=None)
        self.assert_no_action(self.complete)
        self.assert_no_action(self.heartbeat)
        self.group()
        self.assert_no_action(self.complete, LifecycleHookName="other")
        self.assert_no_action(self.complete, InstanceId="i-00000000000000009")
        self.assertEqual(CLOUD.admin("GET", "/group/workers")["completions"], [])

    def test_an_unknown_group(self) -> None:
        code, message, status = self.aws_error(self.complete, AutoScalingGroupName="nobody")
        self.assertEqual((code, status), ("ValidationError", 400))
        self.assertIn("AutoScalingGroup name not found", message)

    def test_params_are_checked(self) -> None:
        self.group()
        code, message, _ = self.aws_error(self.complete, LifecycleActionResult="MAYBE")
        self.assertEqual(code, "ValidationError")
        self.assertIn("[CONTINUE, ABANDON]", message)
        code, message, _ = self.aws_error(self.complete, InstanceId="")
        self.assertEqual(code, "ValidationError")
        # boto3 would not send a call without a hook.
        client = CLOUD.client("autoscaling", parameter_validation=False)
        code, message, _ = self.aws_error(
            client.complete_lifecycle_action, AutoScalingGroupName="workers"
        )
        self.assertIn("Value null at 'lifecycleHookName'", message)

    def test_heartbeats_hold_off_the_time_out(self) -> None:
        self.group(heartbeat_timeout=1)
        for _ in range(3):
            time.sleep(0.6)
            self.heartbeat()
        answer = CLOUD.admin("GET", "/group/workers")
        self.assertEqual((answer["state"], answer["heartbeats"]), ("Pending:Wait", 3))
        time.sleep(1.1)
        self.assertEqual(self.state(), "Terminating")
        self.assert_no_action(self.complete)

    def test_a_time_out_may_continue(self) -> None:
        self.group(heartbeat_timeout=1, default_result="CONTINUE")
        time.sleep(1.1)
        self.assertEqual(self.state(), "InService")

    def test_a_warm_pool_fires_the_hook_twice(self) -> None:
        self.group(state="Warmed:Pending:Wait")
        self.assertEqual(self.target(), (200, "Warmed:Stopped"))
        self.complete()
        self.assertEqual(self.state(), "Warmed:Stopped")
        self.group(state="Pending:Wait")
        self.complete()
        answer = CLOUD.admin("GET", "/group/workers")
        self.assertEqual(answer["state"], "InService")
        self.assertEqual(len(answer["completions"]), 2)

    def test_wrong_input(self) -> None:
        group = {"name": "workers", "instance": INSTANCE}
        self.assert_refused("POST", "/group", {**group, "instance": "i-9"}, "no instance")
        self.assert_refused("POST", "/group", {**group, "default_result": "x"}, "default_result")
        self.assert_refused("POST", "/group", {**group, "heartbeat_timeout": 0}, "at least 1")
        self.assert_refused("GET", "/group/nobody", None, "no group nobody")


class Signals(CloudCase):
    def setUp(self) -> None:
        super().setUp()
        self.client = CLOUD.client("cloudformation")

    def stack(self, **more: Any) -> None:
        CLOUD.admin("POST", "/stack", {"name": "patients", "resources": ["Host"], **more})

    def signal(self, **more: str) -> None:
        params = {
            "StackName": "patients",
            "LogicalResourceId": "Host",
            "UniqueId": INSTANCE,
            "Status": "SUCCESS",
            **more,
        }
        self.client.signal_resource(**params)

    def status(self) -> str:
        return self.client.describe_stacks(StackName="patients")["Stacks"][0]["StackStatus"]

    def test_success_completes_the_stack(self) -> None:
        self.stack()
        self.assertEqual(self.status(), "CREATE_IN_PROGRESS")
        self.signal()
        self.assertEqual(self.status(), "CREATE_COMPLETE")
        answer = CLOUD.admin("GET", "/stack/patients")
        self.assertEqual(answer["status"], "CREATE_COMPLETE")
        (signal,) = answer["signals"]
        self.assertEqual(signal["resource"], "Host")
        self.assertEqual(signal["unique_id"], INSTANCE)
        self.assertEqual(signal["status"], "SUCCESS")

    def test_a_complete_stack_cannot_be_signaled(self) -> None:
        self.stack(status="CREATE_COMPLETE")
        code, message, status = self.aws_error(self.signal)
        self.assertEqual((code, status), ("ValidationError", 400))
        self.assertRegex(
            message,
            r"^Stack arn:aws:cloudformation:us-east-1:\d{12}:stack/patients/\S+ is in"
            r" CREATE_COMPLETE state and cannot be signaled$",
        )
        self.assertEqual(CLOUD.admin("GET", "/stack/patients")["signals"], [])

    def test_failure_rolls_back_and_ends_signalling(self) -> None:
        self.stack(count=2)
        self.signal(Status="FAILURE")
        self.assertEqual(self.status(), "ROLLBACK_IN_PROGRESS")
        _, message, _ = self.aws_error(self.signal)
        self.assertIn("is in ROLLBACK_IN_PROGRESS state and cannot be signaled", message)

    def test_updates(self) -> None:
        self.stack(status="UPDATE_IN_PROGRESS")
        self.signal()
        self.assertEqual(self.status(), "UPDATE_COMPLETE")

    def test_a_repeated_id_counts_once(self) -> None:
        self.stack(count=2)
        for unique in (INSTANCE, INSTANCE, "second"):
            self.assertEqual(self.status(), "CREATE_IN_PROGRESS")
            self.signal(UniqueId=unique)
        self.assertEqual(self.status(), "CREATE_COMPLETE")

    def test_every_resource_needs_its_signals(self) -> None:
        self.stack(resources=["Host", "Other"])
        self.signal()
        self.assertEqual(self.status(), "CREATE_IN_PROGRESS")
        self.signal(LogicalResourceId="Other")
        self.assertEqual(self.status(), "CREATE_COMPLETE")

    def test_the_stack_id_works_as_its_name(self) -> None:
        self.stack()
        arn = self.client.describe_stacks()["Stacks"][0]["StackId"]
        self.signal(StackName=arn)
        self.assertEqual(self.status(), "CREATE_COMPLETE")

    def test_what_does_not_exist(self) -> None:
        self.stack()
        code, message, _ = self.aws_error(self.signal, StackName="nobody")
        self.assertEqual(code, "ValidationError")
        self.assertIn("nobody does not exist", message)
        code, message, _ = self.aws_error(self.signal, LogicalResourceId="Nothing")
        self.assertEqual(code, "ValidationError")
        self.assertIn("Resource Nothing does not exist", message)

    def test_params_are_checked(self) -> None:
        self.stack()
        self.client = CLOUD.client("cloudformation", parameter_validation=False)
        for params, text in (
            ({"UniqueId": "x" * 65}, "less than or equal to 64"),
            ({"UniqueId": ""}, "greater than or equal to 1"),
            ({"Status": "GOOD"}, "[SUCCESS, FAILURE]"),
        ):
            code, message, _ = self.aws_error(self.signal, **params)
            self.assertEqual(code, "ValidationError")
            self.assertIn(text, message)
        self.signal(UniqueId="x" * 64)

    def test_resources_are_described(self) -> None:
        self.stack()
        answer = self.client.describe_stack_resource(
            StackName="patients", LogicalResourceId="Host"
        )
        self.assertEqual(answer["StackResourceDetail"]["ResourceStatus"], "CREATE_IN_PROGRESS")
        events = self.client.describe_stack_events(StackName="patients")["StackEvents"]
        self.assertEqual([e["ResourceStatus"] for e in events], ["CREATE_IN_PROGRESS"])

    def test_wrong_input(self) -> None:
        self.stack()
        stack = {"name": "patients", "resources": ["Host"]}
        self.assert_refused("POST", "/stack", stack, "exists")
        self.assert_refused("POST", "/stack", {**stack, "resources": []}, "resources")
        self.assert_refused("POST", "/stack", {**stack, "count": 0}, "count")
        self.assert_refused("GET", "/stack/nobody", None, "no stack nobody")
