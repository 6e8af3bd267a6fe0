"""Runs on a host: delays all frames to one neighbour, including those of open connections.

    python3 delayline.py INTERFACE SECONDS FALSE_ADDRESS ADDRESS

The usual tool, tc-netem(8), needs a kernel module that test machines may lack. Instead, the host's
neighbour table has a false link-layer address for the neighbour, so no host receives the frames.
This program captures them and sends them later to the right address.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque

ALL_PROTOCOLS = 3
PACKET_OPTIONS, WITH_HEADER = 263, 15  # SOL_PACKET, PACKET_VNET_HDR: see packet(7)
HEADER = 10  # bytes before each frame, for checksums and segmentation that the kernel has deferred
ADDRESS = 6  # bytes; the destination is the first field of a frame
LARGEST = 1 << 17
BUFFER = 1 << 23


def main(interface: str, seconds: float, false_address: bytes, address: bytes) -> None:
    line = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
    line.setsockopt(PACKET_OPTIONS, WITH_HEADER, 1)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    line.bind((interface, ALL_PROTOCOLS))
    held: deque[tuple[float, bytes]] = deque()
    while True:
        pause = max(0.0, held[0][0] - time.monotonic()) if held else None
        if select.select([line], [], [], pause)[0]:
            frame = line.recv(LARGEST)
            if frame[HEADER : HEADER + ADDRESS] == false_address:
                late = frame[:HEADER] + address + frame[HEADER + ADDRESS :]
                held.append((time.monotonic() + seconds, late))
        while held and held[0][0] <= time.monotonic():
            line.send(held.popleft()[1])


def octets(address: str) -> bytes:
    return bytes.fromhex(address.replace(":", ""))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), octets(sys.argv[3]), octets(sys.argv[4]))
