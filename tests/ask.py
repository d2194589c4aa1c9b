"""Run a stage in a warm process (crash.py) as if it were started here: its files, its exit code.

    python3 -S -E tests/ask.py SOCKET STAGE.py FLAGS..

A file of its own: it is started hundreds of times, and imports next to nothing."""
import json
import os
import socket
import sys


def ask(path, argv, handles, cwd, fault=None):
    """Yield the stage's process id, then its exit code; handles: its three standard files."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        request = {"argv": argv, "cwd": cwd, "fault": fault}
        socket.send_fds(connection, [json.dumps(request).encode()], handles)
        with connection.makefile() as lines:
            yield from map(int, lines)


if __name__ == "__main__":
    *_, code = ask(sys.argv[1], sys.argv[2:], [0, 1, 2], os.getcwd())
    sys.exit(code & 255)
