#!/usr/bin/env python3
"""Simulates EC2, Auto Scaling, CloudFormation and the instance metadata service for lab guests.

Prints the three ports as one JSON line, and ends when its standard input does. See README.md.
"""

import argparse
import json
import os
import sys
import threading
import traceback

from server import Server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", metavar="FILE", help="append every call as a line of JSON")
    arguments = parser.parse_args()

    imds_server, api_server, admin_server = Server(), Server(), Server()
    # The ports accept connections from here on, and the kernel queues them. Loading moto takes
    # seconds, in which the caller can already start its guest.
    ports = {"imds": imds_server.port, "api": api_server.port, "admin": admin_server.port}
    print(json.dumps(ports), flush=True)
    # moto prints now and then; nobody reads standard output after this line.
    sys.stdout = sys.stderr
    # Before moto is loaded, so that nothing survives a parent that dies meanwhile.
    threading.Thread(target=exit_with_parent, daemon=True).start()

    # moto reads these when it is imported.
    os.environ["MOTO_DISABLE_GLOBAL_CORS"] = "true"
    os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    from admin import Admin
    from api import Api
    from calls import CallLog
    from faults import Faults
    from imds import Imds
    from world import World

    world, faults, calls = World(), Faults(), CallLog(arguments.log)
    imds = Imds(world, faults, calls)
    moto = DomainDispatcherApplication(create_backend_app)
    imds_server.handler = imds.handle
    api_server.handler = Api(world, faults, calls, moto, api_server.port).handle
    admin_server.handler = Admin(world, faults, calls, imds).handle

    servers = [
        threading.Thread(target=server.serve_forever, daemon=True)
        for server in (imds_server, api_server, admin_server)
    ]
    for thread in servers:
        thread.start()
    for thread in servers:
        thread.join()


def exit_with_parent() -> None:
    while sys.stdin.buffer.read(65536):
        pass
    # Not sys.exit: requests that hang on purpose must not keep the process alive.
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        os._exit(1)
