"""Two machines, which are two network namespaces, joined by a cable that can be cut."""

import os
import subprocess

ADDRESSES = ("10.213.77.1", "10.213.77.2")
INTERFACE = "cable"


def ip(*arguments: object) -> None:
    result = subprocess.run(["ip", *map(str, arguments)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise OSError(result.stderr.strip())


class Cable:
    """A cable between two machines, each named by what stands before a command that runs there."""

    def __init__(self) -> None:
        self._names = [f"rkm{os.getpid()}{end}" for end in "ab"]
        self.machines = [["ip", "netns", "exec", name] for name in self._names]

    def lay(self) -> None:
        """Make the machines and the cable. Raises OSError where that is not allowed."""
        one, other = self._names
        for name in self._names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", INTERFACE, "netns", one, "type", "veth", "peer", "name", INTERFACE, "netns", other)
        for name, address in zip(self._names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
        self.connect()

    def connect(self) -> None:
        for name in self._names:
            ip("-n", name, "link", "set", INTERFACE, "up")

    def cut(self) -> None:
        ip("-n", self._names[0], "link", "set", INTERFACE, "down")

    def remove(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
