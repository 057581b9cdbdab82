"""Gives up what a program written by a model must not have, then becomes Python running it. Standard library alone.

    python -I -S code_launch.py LIMITS.json PROGRAM.py DESCRIPTOR

In order: no network (a new network namespace, where the kernel allows), processes of its own (a new process namespace,
whose first process waits for the program, so that all it has left behind ends with it), no privileges to gain
(no_new_privs), another user (where this one is root), limits, exec. To the descriptor it writes a line ``missing: ...``
for each step that could not be taken, and ``ready`` last, before exec closes it; any other last line is why the program
was not run. Not covered: reading files that the program's user may read, talking to processes over files, and holes in
the kernel.
"""

import ctypes
import json
import os
import resource
import sys
from typing import NoReturn

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC, CLONE_NEWNS = 0x10000000, 0x40000000, 0x08000000, 0x00020000
CLONE_NEWPID = 0x20000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38


def main() -> None:
    os.set_inheritable(int(sys.argv[3]), False)
    with open(sys.argv[1], encoding="utf-8") as f:
        limits = json.load(f)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
    root = os.geteuid() == 0
    spaces = CLONE_NEWNET | CLONE_NEWIPC | (0 if root else CLONE_NEWUSER)
    if libc.unshare(spaces) != 0 and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) != 0:
        say(f"missing: network namespace ({os.strerror(ctypes.get_errno())})")
    if libc.unshare(CLONE_NEWPID) == 0:
        wait_for_child(libc)  # this process, outside
        wait_for_child(libc)  # the namespace's first: when it ends, the kernel ends the others
    else:
        say(f"missing: process namespace ({os.strerror(ctypes.get_errno())})")
    interpreter = sys.executable
    if root and limits["prefix"]:
        interpreter = visible(libc, limits["prefix"], os.path.join(os.path.dirname(sys.argv[1]), "python"))
    if root:
        try:
            os.setgroups([])
            os.setgid(limits["user"])
            os.setuid(limits["user"])
        except OSError as e:
            give_up(f"root cannot become another user: {e.strerror}")  # as root, nothing below would hold
    else:
        say("missing: a user of its own (only root can become another one)")
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        say("missing: no_new_privs")
    libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
    for name, value in (
        ("RLIMIT_CPU", limits["cpu_s"]),
        ("RLIMIT_AS", limits["memory_bytes"]),
        ("RLIMIT_FSIZE", limits["file_bytes"]),
        ("RLIMIT_NPROC", limits["processes"]),
        ("RLIMIT_NOFILE", limits["files"]),
        ("RLIMIT_CORE", 0),
    ):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (OSError, ValueError) as e:
            give_up(f"{name} cannot be set: {e}")
    environment = {"PATH": "/usr/bin:/bin", "HOME": os.getcwd()}
    if interpreter != sys.executable:
        environment["LD_LIBRARY_PATH"] = os.path.join(os.path.dirname(os.path.dirname(interpreter)), "lib")
    try:
        with open(sys.argv[2], "rb"):
            say("ready")
        os.execve(interpreter, [interpreter, "-I", "-S", sys.argv[2]], environment)
    except OSError as e:
        give_up(str(e))


def say(line: str) -> None:
    """Tell whoever launched this, over a descriptor that the program will not have."""
    os.write(int(sys.argv[3]), f"{line}\n".encode())


def give_up(why: str) -> NoReturn:
    say(why)
    os._exit(1)


def wait_for_child(libc: ctypes.CDLL) -> None:
    """Go on in a child that ends with this process, which ends as the child does."""
    child = os.fork()
    if child == 0:
        libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
        return
    os.close(int(sys.argv[3]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def visible(libc: ctypes.CDLL, prefix: str, target: str) -> str:
    """Python's folder under a path that every user may go (below /root they may not), seen by this process alone."""
    private = libc.unshare(CLONE_NEWNS) == 0 and libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
    if not private or libc.mount(prefix.encode(), target.encode(), None, MS_BIND | MS_REC, None) != 0:
        give_up(f"no interpreter that every user may run: {os.strerror(ctypes.get_errno())}")
    return os.path.join(target, os.path.relpath(sys.executable, prefix))


if __name__ == "__main__":
    main()
