"""Run a stage in a warm process (crash.py) as if it were started here: its files, its exit code.

    python3 -S -E tests/ask.py SOCKET STAGE.py FLAGS..

A file of its own: it is started hundreds of times, and imports next to nothing."""
import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    request = {"argv": sys.argv[2:], "cwd": os.getcwd(), "fault": None}
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    with connection.makefile() as lines:
        lines.readline()  # the process id
        code = int(lines.readline().split()[0])
sys.exit(code & 255)
