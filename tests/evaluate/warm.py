"""Workers of the tests start as forks of a process that has imported what they import: that is most of their start.

    python warm.py serve SOCKET                          until its stdin ends
    python -IS warm.py ask SOCKET -m MODULE              a worker: its stdin, stdout, stderr, environment and exit code

A fork begins with `runpy` on the module, as `python -m` does; vLLM's stand-in is imported by the fork alone.
"""

import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress

LONGEST = 1 << 20


def serve(path):
    import torch
    from transformers import AutoTokenizer, DeepseekV32ForCausalLM  # noqa: F401

    import evalkit.compare.passes.capture
    import evalkit.evaluate.engines.worker
    import evalkit.model.load  # noqa: F401

    torch.set_num_threads(1)  # a fork has none of its parent's threads
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    print("ready", flush=True)
    asked, ended = {}, {}  # children by their connection and by what tells of their end
    while True:
        ready, _, _ = select.select([sys.stdin, listening, *asked, *ended], [], [])
        for one in ready:
            if one is sys.stdin:
                for child in asked.values():
                    os.kill(child, signal.SIGKILL)
                return
            if one is listening:
                connection, _ = listening.accept()
                child = fork(connection)
                asked[connection] = child
                ended[os.pidfd_open(child)] = connection
            elif one in ended:
                connection = ended.pop(one)
                os.close(one)
                _, status = os.waitpid(asked.pop(connection), 0)
                with suppress(OSError):
                    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                connection.close()
            elif one in asked:  # who asked was killed; the end of the fork is told next
                os.kill(asked[one], signal.SIGKILL)


def fork(connection):
    """A worker with the streams and the environment of who asked for it; returns its number."""
    said, streams, _, _ = socket.recv_fds(connection, LONGEST, 3)
    child = os.fork()
    if child:
        for stream in streams:
            os.close(stream)
        return child
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
    asked = json.loads(said)
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[:0] = asked["environment"].get("PYTHONPATH", "").split(os.pathsep)
    code = 1
    try:
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:  # noqa: BLE001  as an interpreter ends with it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ask(path, module):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    message = json.dumps({"module": module, "environment": dict(os.environ)}).encode()
    socket.send_fds(connection, [message], [0, 1, 2])
    for stream in (0, 1):
        os.close(stream)  # or the worker's end would not be seen
    code = int(connection.recv(16) or b"1")
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        ask(sys.argv[2], sys.argv[4])
