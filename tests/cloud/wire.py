"""Bodies of the two XML protocols: `ec2` and `query` (everything else the lab uses)."""

import uuid
from xml.sax.saxutils import escape

from server import Response

NAMESPACES = {
    "ec2": "http://ec2.amazonaws.com/doc/2016-11-15/",
    "autoscaling": "http://autoscaling.amazonaws.com/doc/2011-01-01/",
    "cloudformation": "http://cloudformation.amazonaws.com/doc/2010-05-15/",
    "sts": "https://sts.amazonaws.com/doc/2011-06-15/",
}

# Where an empty Describe answer has its (empty) list. A missing list reads as empty too, so an
# action that is not named here still works.
EMPTY_LISTS = {
    "DescribeInstances": "reservationSet",
    "DescribeInstanceStatus": "instanceStatusSet",
    "DescribeVolumes": "volumeSet",
    "DescribeTags": "tagSet",
    "DescribeImages": "imagesSet",
    "DescribeSecurityGroups": "securityGroupInfo",
    "DescribeSecurityGroupRules": "securityGroupRuleSet",
    "DescribeNetworkInterfaces": "networkInterfaceSet",
    "DescribeAutoScalingInstances": "AutoScalingInstances",
    "DescribeAutoScalingGroups": "AutoScalingGroups",
    "DescribeLifecycleHooks": "LifecycleHooks",
    "DescribeStacks": "Stacks",
    "DescribeStackResources": "StackResources",
    "DescribeStackEvents": "StackEvents",
}


class AwsError(Exception):
    """An error that the caller of an AWS API gets to see."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status


def _xml(status: int, body: str) -> Response:
    return Response(status, body.encode(), "text/xml;charset=UTF-8")


def error(service: str, problem: AwsError) -> Response:
    code, message, request = escape(problem.code), escape(problem.message), uuid.uuid4()
    if service == "ec2":
        return _xml(
            problem.status,
            '<?xml version="1.0" encoding="UTF-8"?>\n<Response><Errors><Error>'
            f"<Code>{code}</Code><Message>{message}</Message></Error></Errors>"
            f"<RequestID>{request}</RequestID></Response>",
        )
    kind = "Receiver" if problem.status >= 500 else "Sender"
    namespace = NAMESPACES.get(service)
    attribute = f' xmlns="{namespace}"' if namespace else ""
    return _xml(
        problem.status,
        f"<ErrorResponse{attribute}><Error><Type>{kind}</Type><Code>{code}</Code>"
        f"<Message>{message}</Message></Error><RequestId>{request}</RequestId></ErrorResponse>",
    )


def success(service: str, action: str, result: str | None) -> Response:
    """The answer of a query service; `result` is None for an action without output."""
    inner = "" if result is None else f"<{action}Result>{result}</{action}Result>"
    return _xml(
        200,
        f'<{action}Response xmlns="{NAMESPACES[service]}">{inner}<ResponseMetadata>'
        f"<RequestId>{uuid.uuid4()}</RequestId></ResponseMetadata></{action}Response>",
    )


def empty(service: str, action: str) -> Response:
    """A valid answer in which there is nothing."""
    name = EMPTY_LISTS.get(action)
    result = f"<{name}/>" if name else ""
    if service != "ec2":
        return success(service, action, result)
    return _xml(
        200,
        f'<?xml version="1.0" encoding="UTF-8"?>\n<{action}Response xmlns="{NAMESPACES["ec2"]}">'
        f"<requestId>{uuid.uuid4()}</requestId>{result}</{action}Response>",
    )
