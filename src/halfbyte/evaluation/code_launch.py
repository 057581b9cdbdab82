"""Gives up what a program written by a model must not have, then becomes Python running it. Standard library alone.

    python -I -S code_launch.py LIMITS.json PROGRAM.py

In order: no network (a new network namespace, where the kernel allows), processes of its own (a new process namespace,
whose first process waits for the program, so that all it has left behind ends with it), no privileges to gain
(no_new_privs), another user (where this one is root), limits, exec. Each step that could not be taken is a line on
stderr that starts with ``missing:``. Not covered: reading files that everyone may read, talking to processes over
files, and holes in the kernel.
"""

import ctypes
import json
import os
import resource
import sys

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC, CLONE_NEWNS = 0x10000000, 0x40000000, 0x08000000, 0x00020000
CLONE_NEWPID = 0x20000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as f:
        limits = json.load(f)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
    root = os.geteuid() == 0
    spaces = CLONE_NEWNET | CLONE_NEWIPC | (0 if root else CLONE_NEWUSER)
    if libc.unshare(spaces) != 0 and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) != 0:
        print(f"missing: network namespace ({os.strerror(ctypes.get_errno())})", file=sys.stderr)
    if libc.unshare(CLONE_NEWPID) == 0:
        wait_for_child(libc)  # this process, outside
        wait_for_child(libc)  # the namespace's first: when it ends, the kernel ends the others
    else:
        print(f"missing: process namespace ({os.strerror(ctypes.get_errno())})", file=sys.stderr)
    interpreter = sys.executable
    if root and limits["prefix"]:
        interpreter = visible(libc, limits["prefix"], os.path.join(os.path.dirname(sys.argv[1]), "python"))
    if root:
        try:
            os.setgroups([])
            os.setgid(limits["user"])
            os.setuid(limits["user"])
        except OSError as e:
            print(f"missing: unprivileged user ({e.strerror})", file=sys.stderr)
            os._exit(97)  # as root, nothing below would hold
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        print("missing: no_new_privs", file=sys.stderr)
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
            print(f"missing: {name} ({e})", file=sys.stderr)
            os._exit(97)
    environment = {"PATH": "/usr/bin:/bin", "HOME": os.getcwd()}
    if interpreter != sys.executable:
        environment["LD_LIBRARY_PATH"] = os.path.join(os.path.dirname(os.path.dirname(interpreter)), "lib")
    os.execve(interpreter, [interpreter, "-I", "-S", sys.argv[2]], environment)


def wait_for_child(libc: ctypes.CDLL) -> None:
    """Go on in a child that ends with this process, which ends as the child does."""
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
        return
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def visible(libc: ctypes.CDLL, prefix: str, target: str) -> str:
    """Python's folder under a path that every user may go (below /root they may not), seen by this process alone."""
    private = libc.unshare(CLONE_NEWNS) == 0 and libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
    if not private or libc.mount(prefix.encode(), target.encode(), None, MS_BIND | MS_REC, None) != 0:
        print(f"missing: an interpreter that every user may run ({os.strerror(ctypes.get_errno())})", file=sys.stderr)
        os._exit(97)
    return os.path.join(target, os.path.relpath(sys.executable, prefix))


if __name__ == "__main__":
    main()
