"""The simulated account: instances, volumes, groups and stacks, set up inside moto's own models.

moto picks ids itself and ignores some of what a launch asks for. Here its models are created the
usual way and then told the rest, so that every moto call that reads them agrees with the scenario.
"""

import json
import re
import secrets
import threading
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any
from unittest import mock

from moto.autoscaling.models import InstanceState as GroupMember
from moto.autoscaling.models import autoscaling_backends
from moto.cloudformation.models import cloudformation_backends
from moto.core.types import Base64EncodedString
from moto.ec2.models import ec2_backends
from moto.moto_api._internal.models import moto_api_backend

from lifecycle import Group
from stack import Stack

ACCOUNT = "123456789012"
REGION = "us-east-1"
ZONE = "us-east-1a"
DEFAULT_KMS_KEY = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/5f1c8a52-0d3e-4b6f-9a57-2c81e0f4d9b3"

STATE_CODES = {
    "pending": 0,
    "running": 16,
    "shutting-down": 32,
    "terminated": 48,
    "stopping": 64,
    "stopped": 80,
}
TENANCIES = ("default", "dedicated", "host")
ATTACHMENT_STATES = ("attaching", "attached", "detaching", "detached", "busy")
# With tags in the metadata service, EC2 refuses keys that cannot be a path component.
METADATA_TAG_CHARACTERS = set(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-=.,_:@"
)


MAC = re.compile(r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")


class WorldError(Exception):
    """The scenario asks for something that cannot be."""


@dataclass
class Guest:
    """What the metadata service knows of an instance, beyond moto's model of it."""

    model: Any
    mac: str
    role: str | None
    public_key: str | None
    user_data: str | None
    # Volumes that were there at launch, in the order of their attachment; the metadata service
    # never mentions the ones that came later.
    launch_volumes: list[str]
    access_key: str = field(default_factory=lambda: "ASIA" + secrets.token_hex(8).upper())
    secret_key: str = field(default_factory=lambda: secrets.token_urlsafe(30))
    session_token: str = field(default_factory=lambda: secrets.token_urlsafe(200))

    @property
    def metadata_tags(self) -> bool:
        return self.model.metadata_options.instance_metadata_tags == "enabled"


class World:
    def __init__(self) -> None:
        # Held by everything that reads or changes the world outside of moto's own request handling.
        self.lock = threading.RLock()
        self.guests: dict[str, Guest] = {}
        self.groups: dict[str, Group] = {}
        self.stacks: dict[str, Stack] = {}
        self.files: dict[str, bytes] = {}

    @property
    def ec2(self) -> Any:
        return ec2_backends[ACCOUNT][REGION]

    @property
    def autoscaling(self) -> Any:
        return autoscaling_backends[ACCOUNT][REGION]

    @property
    def cloudformation(self) -> Any:
        return cloudformation_backends[ACCOUNT][REGION]

    def reset(self) -> None:
        with self.lock:
            moto_api_backend.reset()
            self.guests.clear()
            self.groups.clear()
            self.stacks.clear()
            self.files.clear()

    # Instances

    def create_instance(
        self,
        id: str,
        type: str,
        tenancy: str,
        user_data: str | None,
        tags: dict[str, str],
        metadata_tags: bool,
        root_volume: str,
        root_encrypted: bool,
        http_tokens: str,
        public_key: str | None,
        hop_limit: int,
        image: str,
        role: str | None,
        mac: str,
        local_ipv4: str,
    ) -> None:
        """Launch an instance, in place of the one with this id if there is one."""
        old = self.guests.get(id)
        if old and self.group_of(id):
            raise WorldError(f"instance {id} is in a group")
        if root_volume in self.ec2.volumes and not (old and old.launch_volumes[0] == root_volume):
            raise WorldError(f"volume {root_volume} exists")
        if http_tokens not in ("optional", "required"):
            raise WorldError("http_tokens must be optional or required")
        _check_choice("tenancy", tenancy, TENANCIES)
        if not MAC.match(mac):
            raise WorldError(f"{mac!r} is no MAC address")
        IPv4Address(local_ipv4)
        if metadata_tags:
            _check_metadata_tags(tags)
        if old:
            self._remove_instance(id)
        subnet = self.ec2.get_default_subnets()[ZONE]
        metadata_options = {
            "HttpTokens": http_tokens,
            "HttpPutResponseHopLimit": hop_limit,
            "InstanceMetadataTags": "enabled" if metadata_tags else "disabled",
        }
        # Ids are drawn while the models are wired to each other: naming them there is what makes
        # attachments, network interfaces and tags agree on them.
        with (
            mock.patch("moto.ec2.models.instances.random_instance_id", lambda: id),
            mock.patch(
                "moto.ec2.models.elastic_block_store.random_volume_id", lambda: root_volume
            ),
        ):
            reservation = self.ec2.run_instances(
                image_id=image,
                count=1,
                user_data=_encode(user_data),
                security_group_names=["default"],
                instance_type=type,
                is_instance_type_default=False,
                region_name=REGION,
                subnet_id=subnet.id,
                associate_public_ip=False,
                metadata_options=metadata_options,
                tags={},
            )
        model = reservation.instances[0]
        model.placement.tenancy = tenancy
        model.virtualization_type = "hvm"
        model.kernel_id = None
        if role:
            model.iam_instance_profile = {
                "Arn": f"arn:aws:iam::{ACCOUNT}:instance-profile/{role}",
                "Id": "AIPA" + secrets.token_hex(8).upper(),
            }
        nic = model.nics[0]
        nic.mac_address = mac
        nic.private_ip_address = local_ipv4
        nic.private_ip_addresses[0]["PrivateIpAddress"] = local_ipv4
        nic.private_dns_name = model.private_dns_name
        _set_encryption(self.ec2.get_volume(root_volume), root_encrypted, None)
        self._set_tags(id, tags)
        self.guests[id] = Guest(
            model=model,
            mac=mac,
            role=role,
            public_key=public_key,
            user_data=user_data,
            launch_volumes=[root_volume],
        )

    def _remove_instance(self, id: str) -> None:
        """Make an instance vanish without a trace, its root volume too; others are detached."""
        guest = self.guests.pop(id)
        for volume in list(self.ec2.volumes.values()):
            if volume.attachment and volume.attachment.instance.id == id:
                self.detach(volume.id)
        root = guest.launch_volumes[0]
        self.ec2.volumes.pop(root, None)
        for nic in guest.model.nics.values():
            self.ec2.enis.pop(nic.id, None)
        for key, reservation in list(self.ec2.reservations.items()):
            if guest.model in reservation.instances:
                del self.ec2.reservations[key]
        self.ec2.tags.pop(id, None)
        self.ec2.tags.pop(root, None)

    def change_instance(
        self,
        id: str,
        tenancy: str | None = None,
        tags: dict[str, str | None] | None = None,
        metadata_tags: bool | None = None,
        state: str | None = None,
    ) -> None:
        guest = self.guest(id)
        if tenancy is not None:
            _check_choice("tenancy", tenancy, TENANCIES)
        if state is not None:
            _check_choice("state", state, tuple(STATE_CODES))
        enabled = guest.metadata_tags if metadata_tags is None else metadata_tags
        if enabled:
            left = {**self.ec2.tags.get(id, {}), **(tags or {})}
            _check_metadata_tags({key: value for key, value in left.items() if value is not None})
        if tenancy is not None:
            guest.model.placement.tenancy = tenancy
        if tags is not None:
            self._set_tags(id, tags)
        guest.model.metadata_options.instance_metadata_tags = "enabled" if enabled else "disabled"
        if state is not None:
            guest.model._state.name = state
            guest.model._state.code = STATE_CODES[state]

    def set_user_data(self, id: str, user_data: str | None) -> None:
        guest = self.guest(id)
        guest.user_data = user_data
        guest.model.user_data = _encode(user_data)

    def guest(self, id: str) -> Guest:
        if id not in self.guests:
            raise WorldError(f"no instance {id}")
        return self.guests[id]

    def current_guest(self) -> Guest | None:
        """The instance that the metadata service speaks for: the last one created."""
        return next(reversed(self.guests.values()), None)

    def tags(self, id: str) -> dict[str, str]:
        return dict(self.ec2.tags.get(id, {}))

    def _set_tags(self, id: str, tags: dict[str, str | None]) -> None:
        # Straight into the store: CreateTags refuses the aws: tags that AWS itself sets.
        for key, value in tags.items():
            if value is None:
                self.ec2.tags[id].pop(key, None)
            else:
                self.ec2.tags[id][key] = value

    # Volumes

    def create_volume(
        self, id: str, size: int, encrypted: bool, kms_key_id: str | None, tags: dict[str, str]
    ) -> None:
        if id in self.ec2.volumes:
            raise WorldError(f"volume {id} exists")
        with mock.patch("moto.ec2.models.elastic_block_store.random_volume_id", lambda: id):
            volume = self.ec2.create_volume(size=size, zone_name=ZONE)
        try:
            _set_encryption(volume, encrypted, kms_key_id)
        except WorldError:
            del self.ec2.volumes[id]
            raise
        self._set_tags(id, tags)

    def change_volume(
        self,
        id: str,
        size: int | None = None,
        encrypted: bool | None = None,
        kms_key_id: str | None = None,
        tags: dict[str, str | None] | None = None,
    ) -> None:
        volume = self._volume(id)
        if encrypted is not None or kms_key_id is not None:
            _set_encryption(
                volume, volume.encrypted if encrypted is None else encrypted, kms_key_id
            )
        if size is not None:
            volume.size = size
        self._set_tags(id, tags or {})

    def attach(self, volume: str, instance: str, device: str, state: str, at_launch: bool) -> None:
        _check_choice("state", state, ATTACHMENT_STATES)
        model = self._volume(volume)
        guest = self.guest(instance)
        mapping = guest.model.block_device_mapping
        old = model.attachment
        if old and (old.instance.id, old.device) != (instance, device):
            raise WorldError(f"{volume} is attached to {old.instance.id} as {old.device}")
        if device in mapping and mapping[device].volume_id != volume:
            raise WorldError(f"{device} of {instance} holds {mapping[device].volume_id}")
        if not old:
            self.ec2.attach_volume(volume, instance, device)
        # A repeated attach only moves the state, as it does while EC2 attaches.
        model.attachment.status = state
        mapping[device].status = state
        if at_launch and volume not in guest.launch_volumes:
            guest.launch_volumes.append(volume)

    def detach(self, volume: str) -> None:
        attachment = self._volume(volume).attachment
        if not attachment:
            raise WorldError(f"{volume} is not attached")
        self.ec2.detach_volume(volume, attachment.instance.id, attachment.device)

    def _volume(self, id: str) -> Any:
        if id not in self.ec2.volumes:
            raise WorldError(f"no volume {id}")
        return self.ec2.volumes[id]

    # Auto Scaling

    def put_group(
        self,
        name: str,
        instance: str,
        state: str,
        hook: str | None,
        heartbeat_timeout: int,
        default_result: str,
    ) -> None:
        """Create a group with one member, or move an existing one to a new state."""
        guest = self.guest(instance)
        _check_choice("default_result", default_result, ("CONTINUE", "ABANDON"))
        if name in self.groups and self.groups[name].instance != instance:
            raise WorldError(f"group {name} has {self.groups[name].instance}")
        if name not in self.groups:
            model = self.autoscaling.create_auto_scaling_group(
                name=name,
                availability_zones=[ZONE],
                # Without capacity moto launches nothing of its own; the member is added below.
                desired_capacity=0,
                min_size=0,
                max_size=1,
                instance_id=instance,
                launch_config_name="",
                launch_template={},
                vpc_zone_identifier=None,
                default_cooldown=None,
                health_check_period=None,
                health_check_type=None,
                load_balancers=[],
                target_group_arns=[],
                placement_group=None,
                termination_policies=[],
                tags=[],
            )
            member = GroupMember(guest.model, autoscaling_group=model)
            model.instance_states.append(member)
            model.desired_capacity = 1
            self.groups[name] = Group(name=name, instance=instance, member=member)
            self._set_tags(instance, {"aws:autoscaling:groupName": name})
        if hook:
            self.autoscaling.create_lifecycle_hook(
                name=hook,
                as_name=name,
                transition=(
                    "autoscaling:EC2_INSTANCE_TERMINATING"
                    if "Terminating" in state
                    else "autoscaling:EC2_INSTANCE_LAUNCHING"
                ),
                timeout=heartbeat_timeout,
                result=default_result,
            )
        self.groups[name].enter(state, hook, heartbeat_timeout, default_result)

    def group(self, name: str) -> Group:
        if name not in self.groups:
            raise WorldError(f"no group {name}")
        return self.groups[name]

    def group_of(self, instance: str) -> Group | None:
        return next((g for g in self.groups.values() if g.instance == instance), None)

    def expire_lifecycle_actions(self) -> None:
        for group in self.groups.values():
            group.expire(time.monotonic())

    # CloudFormation

    def create_stack(self, name: str, status: str, resources: list[str], count: int) -> None:
        if name in self.stacks:
            raise WorldError(f"stack {name} exists")
        template = json.dumps({"Resources": {}})
        model = self.cloudformation.create_stack(name=name, template=template, parameters={})
        model.status = status
        # moto finished the empty stack at once; that event never happened.
        del model.events[1:]
        for resource in resources:
            # Put there by hand, because moto would create what a template asks for, for example
            # launch another instance.
            model.resource_map._resource_json_map[resource] = {}
            model.resource_map._parsed_resources[resource] = SimpleNamespace(
                logical_resource_id=resource,
                physical_resource_id=f"{name}-{resource}",
                # What a host of a group signals: the group, never the instance.
                cf_resource_type="AWS::AutoScaling::AutoScalingGroup",
            )
        self.stacks[name] = Stack(model=model, resources=list(resources), count=count)

    def stack(self, name: str) -> Stack:
        if name not in self.stacks:
            raise WorldError(f"no stack {name}")
        return self.stacks[name]

    def find_stack(self, name_or_id: str) -> Stack | None:
        for stack in self.stacks.values():
            if name_or_id in (stack.model.name, stack.model.stack_id):
                return stack
        return None


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise WorldError(f"{name} must be one of {', '.join(choices)}")


def _check_metadata_tags(tags: dict[str, str]) -> None:
    for key in tags:
        if not set(key) <= METADATA_TAG_CHARACTERS or key in (".", "..", "_index"):
            raise WorldError(f"tag key {key!r} is not allowed with metadata_tags")


def _set_encryption(volume: Any, encrypted: bool, kms_key_id: str | None) -> None:
    if kms_key_id and not encrypted:
        raise WorldError("kms_key_id needs encrypted")
    volume.encrypted = encrypted
    volume.kms_key_id = (kms_key_id or volume.kms_key_id or DEFAULT_KMS_KEY) if encrypted else None


def _encode(user_data: str | None) -> Base64EncodedString | None:
    return None if user_data is None else Base64EncodedString.from_raw_string(user_data)
