"""A switch that is far away and loses frames: `wire.py DELAY LOSS PORT...`, until its input ends.

Each frame that comes in at a port (a network interface) is lost with probability LOSS, else it leaves after DELAY
seconds: at the port behind which its destination was last heard, or at all others. Delay and loss are thus those of one
direction. Kernels can do this themselves (tc's netem), but many that run containers are built without.
"""

import random
import selectors
import socket
import sys
import time
from collections import deque

SOL_PACKET, PACKET_VNET_HDR = 263, 15  # <linux/if_packet.h>
EVERY_PROTOCOL = 3
HEADER = 10  # virtio_net_hdr: frames whose checksums the sender left to the interface keep that note
LARGEST = 1 << 17


def main():
    delay, loss, ports = float(sys.argv[1]), float(sys.argv[2]), [port(name) for name in sys.argv[3:]]
    selector = selectors.DefaultSelector()
    for each in (sys.stdin.buffer, *ports):
        selector.register(each, selectors.EVENT_READ)
    print("ready", flush=True)
    carry(selector, ports, delay, loss)


def carry(selector, ports, delay, loss):
    behind, flying, chance = {}, deque(), random.Random(0)
    while True:
        wait = max(0.0, flying[0][0] - time.monotonic()) if flying else None
        for key, _ in selector.select(wait):
            if key.fileobj is sys.stdin.buffer:
                return
            frame = received(key.fileobj)
            if frame is None:
                continue
            behind[source(frame)] = key.fileobj
            if chance.random() >= loss:
                flying.append((time.monotonic() + delay, key.fileobj, frame))
        while flying and flying[0][0] <= time.monotonic():
            _, origin, frame = flying.popleft()
            known = behind.get(destination(frame))
            for target in [known] if known else ports:
                if target is not origin:
                    send(target, frame)


def port(name):
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    opened.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    opened.bind((name, EVERY_PROTOCOL))
    opened.setblocking(False)
    return opened


def received(port):
    """A frame that came from the host, or None: our own frames are seen as well, and a port may be down."""
    try:
        frame, (_, _, kind, _, _) = port.recvfrom(LARGEST)
    except OSError:
        return None
    return None if kind == socket.PACKET_OUTGOING else frame


def send(port, frame):
    try:
        port.send(frame)
    except OSError:
        return  # a port that is down, or full, loses frames like any other


def destination(frame):
    return frame[HEADER : HEADER + 6]


def source(frame):
    return frame[HEADER + 6 : HEADER + 12]


if __name__ == "__main__":
    main()
