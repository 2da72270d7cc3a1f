"""Runs a Python program behind walls. Started as a script of its own, with the standard library alone.

    jail ── fork ── walls ── fork ── init (pid 1) ── fork ── the program
      outside, watches  | new user, mount, pid, network, ipc and host-name namespaces

`jail` ends `walls`, which takes init with it, which takes every process inside with it: the kernel sees to both.
The root directory inside is read-only and holds the interpreter, its packages and the system's libraries; /box is the
one writable place, a small file system in memory. There is no /proc. Reads a job (JSON) from stdin, writes what
happened (JSON) to stdout. `sandbox/__init__.py` says what is in them.
"""

import ctypes
import json
import os
import resource
import secrets
import select
import selectors
import signal
import struct
import sys
import time
import traceback
from typing import Any

NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
AT_FDCWD, AT_RECURSIVE, READ_ONLY, NO_SUID = -100, 0x8000, 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
MOUNT_SETATTR, PIVOT_ROOT = 442, {"x86_64": 155, "aarch64": 41}
INSIDE, NOBODY = 1000, 65534  # the program's user inside; who that is outside, where root may choose
NEW_ROOT = "/proc"  # where the new root is put together: a place that holds nothing the program needs
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
PAGE = resource.getpagesize()
MIB = 2**20
libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Run the job and say how it ended."""
    job = json.load(sys.stdin)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job["parent"]:
        sys.exit("the parent is gone")
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    program = os.memfd_create("program")
    os.write(program, json.dumps(job["program"]).encode())
    os.lseek(program, 0, os.SEEK_SET)
    word = secrets.token_hex(16).encode()
    sealed, fill = os.pipe()
    os.write(fill, word)
    os.close(fill)
    output, told, trouble, ready, go = (os.pipe() for _ in range(5))
    walls = os.fork()
    if not walls:
        try:
            os.close(go[1])
            _walls(job, ready[1], go[0], [program, output[1], told[1], sealed])
        except BaseException:
            os.write(trouble[1], traceback.format_exc().encode())
        os._exit(1)
    for end in (sealed, program, output[1], told[1], trouble[1], ready[1], go[0]):
        os.close(end)
    if os.read(ready[0], 1):
        _map_users(walls)
        os.write(go[1], b"g")
    os.close(go[1])
    said, printed, ended = _watch(walls, told[0], output[0], job["limits"])
    passed = said == word[::-1] and ended == 0
    report = {
        "trouble": os.read(trouble[0], 4096).decode("utf-8", "replace"),
        "passed": passed,
        "said": "" if passed else said.decode("utf-8", "replace"),
        "ended": ended,
        "output": printed.decode("utf-8", "replace"),
    }
    sys.stdout.write(json.dumps(report))


def _map_users(walls: int) -> None:
    """Root gives the program a user of its own, since the kernel does not limit the number of root's processes."""
    if os.geteuid() == 0:
        users = groups = f"0 0 1\n{INSIDE} {NOBODY} 1\n"
    else:
        users, groups = f"{INSIDE} {os.geteuid()} 1\n", f"{INSIDE} {os.getegid()} 1\n"
        _write(f"/proc/{walls}/setgroups", "deny")
    _write(f"/proc/{walls}/gid_map", groups)
    _write(f"/proc/{walls}/uid_map", users)


def _walls(job: dict[str, Any], ready: int, go: int, ends: list[int]) -> None:
    """Step into new namespaces and build the new root; then be the parent of what lives inside."""
    rooted = os.geteuid() == 0
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _check(libc.unshare(NEW_NAMESPACES), "unshare")
    os.write(ready, b"r")
    if not os.read(go, 1):
        os._exit(1)  # `jail` has failed and says why
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # again: new rights may have cleared it
    if rooted:
        os.setgroups([])
    _new_root(job["shown"], job["limits"]["disk_mib"])
    alive, held = os.pipe()
    init = os.fork()
    if init:
        os.closerange(3, held)
        _, status = os.waitpid(init, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    os.close(held)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([alive], [], [], 0)[0]:
        os._exit(1)  # `walls` ended before it could take us with it
    _prctl(PR_SET_DUMPABLE, 0)
    first = os.fork()
    if not first:
        _program(job, rooted, ends)
    os.closerange(0, 256)
    while True:
        pid, status = os.wait()
        if pid == first:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _new_root(shown: list[str], disk_mib: int) -> None:
    os.umask(0o022)
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("root", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path in (*shown, *DEVICES):
        _show(path)
    os.mkdir(f"{NEW_ROOT}/box")
    if not os.path.lexists(f"{NEW_ROOT}/tmp"):  # there where the interpreter's packages lie below it; TMPDIR is /box
        os.symlink("box", f"{NEW_ROOT}/tmp")
    attributes = struct.pack("QQQQ", READ_ONLY | NO_SUID, 0, 0, 0)
    done = libc.syscall(MOUNT_SETATTR, AT_FDCWD, NEW_ROOT.encode(), AT_RECURSIVE, attributes, len(attributes))
    _check(done, "mount_setattr")
    size = f"size={disk_mib}m,nr_inodes=4096,mode=700,uid={INSIDE},gid={INSIDE}"
    _mount("box", f"{NEW_ROOT}/box", "tmpfs", MS_NOSUID | MS_NODEV, size)
    os.chdir(NEW_ROOT)
    _check(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/box")


def _show(path: str) -> None:
    """The same path inside as outside: a link is made anew, a directory or file is bound."""
    target = NEW_ROOT + path
    if not os.path.lexists(path) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT, 0o644))
    _mount(path, target, None, MS_BIND | MS_REC)


def _program(job: dict[str, Any], rooted: bool, ends: list[int]) -> None:
    """Become the program: no rights, few resources, no file open but its ends of the pipes."""
    try:
        program, output, told, sealed = ends
        for end, place in ((program, 0), (output, 1), (output, 2)):
            os.dup2(end, place)
        os.set_inheritable(told, True)
        os.set_inheritable(sealed, True)
        if rooted:
            os.setresgid(INSIDE, INSIDE, INSIDE)
            os.setresuid(INSIDE, INSIDE, INSIDE)
        for name, most in _rlimits(job["limits"]).items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        rules = bytes.fromhex(job["filter"])
        kept = ctypes.create_string_buffer(rules, len(rules))
        table = struct.pack("HxxxxxxQ", len(rules) // 8, ctypes.addressof(kept))  # struct sock_fprog
        _prctl(PR_SET_SECCOMP, 2, table)
        python = [job["python"], "-I", "-S", "-X", "utf8", "-c", job["harness"], str(told), str(sealed)]
        os.execve(python[0], python, job["environment"])
    except BaseException:
        os.write(ends[1], traceback.format_exc().encode())
    os._exit(1)


def _rlimits(limits: dict[str, Any]) -> dict[str, int]:
    return {
        "AS": limits["memory_mib"] * MIB,
        "CPU": int(limits["seconds"]) + 1,  # of one process; `_watch` ends them all by the clock
        "FSIZE": limits["disk_mib"] * MIB,
        "NPROC": limits["processes"],
        "NOFILE": 64,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }


def _watch(walls: int, told: int, output: int, limits: dict[str, Any]) -> tuple[bytes, bytes, int | str]:
    """What the program said and printed, and its exit status or the limit that it broke; all its processes ended."""
    deadline = time.monotonic() + limits["seconds"]
    room = {told: 8192, output: limits["output_kib"] * 1024}  # what is more is read, and forgotten
    heard = {told: b"", output: b""}
    over = os.pidfd_open(walls)
    broken = ""
    with selectors.DefaultSelector() as ends:
        for end in (told, output, over):
            ends.register(end, selectors.EVENT_READ)
        while not broken:
            ready = {key.fd for key, _ in ends.select(timeout=0.02)}
            for end in ready - {over}:
                if part := os.read(end, 65536):
                    heard[end] += part[: room[end] - len(heard[end])]
                else:
                    ends.unregister(end)
            if over in ready:
                break
            if time.monotonic() > deadline:
                broken = "time"
            elif _memory(walls) > limits["memory_mib"] * MIB:
                broken = "memory"
    if broken:
        os.kill(walls, signal.SIGKILL)
    _, status = os.waitpid(walls, 0)
    while _another_child():  # init, which came to us when walls went
        os.wait()
    for end in (told, output):
        while part := os.read(end, 65536):
            heard[end] += part[: room[end] - len(heard[end])]
    return heard[told], heard[output], broken or os.waitstatus_to_exitcode(status)


def _another_child() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _memory(walls: int) -> int:
    """Bytes that all processes inside have mapped: an upper bound of what they can use, unlike what is resident."""
    total, left = 0, [pid for init in _children(walls) for pid in _children(init)]
    while left:
        pid = left.pop()
        left += _children(pid)
        try:
            with open(f"/proc/{pid}/statm") as numbers:
                total += int(numbers.read().split()[0]) * PAGE
        except (OSError, IndexError):
            pass  # it has ended meanwhile
    return total


def _children(pid: int) -> list[int]:
    found = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as names:
                found += [int(name) for name in names.read().split()]
    except OSError:
        pass
    return found


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = (source and source.encode(), target.encode(), kind and kind.encode())
    _check(libc.mount(*encoded, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def _prctl(option: int, value: int, pointer: Any = 0) -> None:
    _check(libc.prctl(option, ctypes.c_ulong(value), pointer, 0, 0), f"prctl {option}")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
