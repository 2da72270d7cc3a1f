"""The system calls that sandboxed code is refused: what would let it widen its walls, or use memory nobody counts."""

import errno
import platform
import struct

# per machine: AUDIT_ARCH, then the numbers of clone, clone3, socket, then those of the refused calls
MACHINES: dict[str, tuple[int, int, int, int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E, 56, 435, 41,
        {"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "unshare": 272, "setns": 308,
         "mount": 165, "umount2": 166, "pivot_root": 155, "shmget": 29, "semget": 64, "msgget": 68,
         "memfd_create": 319, "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321,
         "perf_event_open": 298, "userfaultfd": 323},
    ),
    "aarch64": (
        0xC00000B7, 220, 435, 198,
        {"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "unshare": 97, "setns": 268,
         "mount": 40, "umount2": 39, "pivot_root": 41, "shmget": 194, "semget": 190, "msgget": 186,
         "memfd_create": 279, "add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280,
         "perf_event_open": 241, "userfaultfd": 282},
    ),
}  # fmt: skip
NEWER = {  # the same number everywhere
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: namespaces hold these; AF_VSOCK, for one, they do not
X32 = 0x40000000

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
KILL, REFUSE, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000


def known(machine: str | None = None) -> bool:
    """Whether there is a filter for this kind of processor."""
    return (machine or platform.machine()) in MACHINES


def bpf(machine: str | None = None) -> bytes:
    """The filter as a seccomp program, an array of struct sock_filter."""
    architecture, clone, clone3, socket, refused = MACHINES[machine or platform.machine()]
    steps = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, REFUSE | errno.ENOSYS),
        (EQUAL, 0, 1, clone3),
        (RETURN, 0, 0, REFUSE | errno.ENOSYS),  # its flags lie in memory, unseen from here; libc goes back to clone
    ]
    for number in (*refused.values(), *NEWER.values()):
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE | errno.EPERM)]
    steps += [
        (EQUAL, 0, 4, clone),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (ANY_BIT, 0, 1, NAMESPACES),
        (RETURN, 0, 0, REFUSE | errno.EPERM),
        (RETURN, 0, 0, ALLOW),
        (EQUAL, 0, 2 + len(FAMILIES), socket),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        *((EQUAL, len(FAMILIES) - i, 0, family) for i, family in enumerate(FAMILIES)),
        (RETURN, 0, 0, REFUSE | errno.EAFNOSUPPORT),
        (RETURN, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in steps)
