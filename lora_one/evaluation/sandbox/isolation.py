"""Isolate a process by Linux system calls: namespaces, a private root, resource limits.

This file runs in the launcher, separate from the rest of the project, and imports only the standard library. Order:

    private_machine    once per launcher: mount, network and host name namespaces; a root with the interpreter in it
    other_user         per program: an unprivileged user, then user and pid namespaces
    private_root       per program: mount and IPC namespaces; the root with only a fresh working folder
    set_limits         per program: resource limits
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

NEW_MOUNTS, NEW_HOST_NAME, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
READ_ONLY, NO_SETUID, NO_DEVICES, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_CHILD_SUBREAPER, SET_NO_NEW_PRIVILEGES = 1, 4, 36, 38
NOBODY = 65534

BASE = Path("/sys")  # exists on every Linux and programs do not need it: the private root is mounted over it
BOX = BASE / "box"
WORK = "/sandbox"
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int | str | None) -> None:
    """Call a function of libc. Raises OSError: the call fails, or libc has no such function."""
    function = getattr(libc, name, None)
    if function is None:
        raise OSError(f"{name}: not on this system")
    given = [value.encode() if isinstance(value, str) else value for value in arguments]
    if function(*(ctypes.c_ulong(value) if isinstance(value, int) else value for value in given)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def interpreter() -> str:
    """Return the path of the base interpreter, not that of a virtual environment."""
    return f"{sys.base_exec_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"


def private_machine() -> None:
    """Leave the host's mounts and network, and build the read-only root of the programs at BOX.

    Raises OSError: the kernel refuses it.
    """
    try:
        call("unshare", NEW_MOUNTS | NEW_NETWORK | NEW_HOST_NAME)
    except PermissionError:  # an ordinary user, or root without the capability: create a user namespace first
        drop_root()
        enter_user_namespace(NEW_MOUNTS | NEW_NETWORK | NEW_HOST_NAME)
    call("mount", None, "/", None, RECURSIVE | PRIVATE, None)
    call("mount", "tmpfs", str(BASE), "tmpfs", NO_SETUID | NO_DEVICES, "mode=755,size=1m")
    shown: list[str] = []
    for source in sorted({*LIBRARIES, sys.base_prefix, sys.base_exec_prefix}, key=len):
        if os.path.lexists(source) and not any(source == above or source.startswith(f"{above}/") for above in shown):
            show(source)
            shown.append(source)
    os.mkdir(f"{BOX}{WORK}")
    call("mount", None, str(BASE), None, BIND | REMOUNT | READ_ONLY | NO_SETUID | NO_DEVICES, None)


def show(source: str) -> None:
    """Make a file, folder or link of the host visible in BOX under its own name, read-only."""
    target = Path(f"{BOX}{source}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.islink(source) and source in LIBRARIES:
        target.symlink_to(os.readlink(source))
        return
    target.mkdir() if os.path.isdir(source) else target.touch()
    call("mount", source, str(target), None, BIND | RECURSIVE, None)
    for place in mounts_at(str(target)):  # read-only applies only to the named mount, not to those below it
        kept = os.statvfs(place).f_flag & NO_EXEC
        call("mount", None, place, None, BIND | REMOUNT | READ_ONLY | NO_SETUID | NO_DEVICES | kept, None)


def mounts_at(folder: str) -> Iterator[str]:
    """Yield the mount points at and below a folder."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place = line.split()[4].encode().decode("unicode_escape")  # a space is \040 there
        if place == folder or place.startswith(f"{folder}/"):
            yield place


def drop_root() -> None:
    """Become nobody if this is root: in every namespace, the limit on processes does not apply to root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("prctl", SET_DUMPABLE, 1, 0, 0, 0)  # otherwise /proc/self/uid_map would still belong to root


def enter_user_namespace(others: int) -> None:
    """Enter a new user namespace, as nobody with all capabilities, and the namespaces ``others`` that it owns."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", NEW_USER | others)
    for name, line in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        Path("/proc/self", name).write_text(line)


def other_user() -> None:
    """Drop all rights outside the sandbox; the next child is the first process of a new pid namespace."""
    drop_root()
    enter_user_namespace(NEW_PIDS)


def private_root(work_bytes: int) -> None:
    """Make BOX the root, and a fresh folder in memory the working folder.

    The chroot within the new root prevents further user namespaces, and with them further mounts: the kernel refuses
    those to a process whose root differs from that of its mount namespace. /proc and /dev do not exist.
    """
    call("unshare", NEW_MOUNTS | NEW_IPC)
    call("mount", str(BASE), str(BASE), None, BIND | RECURSIVE, None)
    options = f"mode=700,size={work_bytes},nr_inodes=1024"
    call("mount", "tmpfs", f"{BOX}{WORK}", "tmpfs", NO_SETUID | NO_DEVICES, options)
    os.chdir(BASE)
    call("pivot_root", ".", ".")
    call("umount2", ".", DETACH)
    os.chroot(BOX.relative_to(BASE))
    os.chdir(WORK)
    call("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; call it after changes of user, which reset it."""
    call("prctl", SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def set_limits(limits: dict[str, float], *, processes: bool) -> None:
    """Set hard limits for this process and its children; ``processes``: also the limit on their number."""
    wanted = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_CPU: int(limits["seconds"]) + 2,
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    if processes:
        wanted[resource.RLIMIT_NPROC] = limits["processes"]
    for name, value in wanted.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))
