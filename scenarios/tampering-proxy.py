#!/usr/bin/python3
"""Between two hosts' ferryd: says that the source has another Xen, flips one byte of what either sends, or cuts the connection there.

tampering-proxy.py PORT PEER version | flip OFFSET | cut OFFSET | flip-word N | cut-word N

Listens on 127.0.0.1:PORT. Only the first connection of the source is harmed. OFFSET counts what the source sends, N the words of the
destination (1 is Accept, 2 is Ready), which are harmed in their midst. Says what it does.
"""
import socket
import struct
import sys
import threading
import zlib

HEADER, KIND_TO_DESTINATION, KIND_TO_SOURCE = 8, 1, 2


def whole(sock, count):
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def frames(from_):
    """Each frame after the greeting without its checksum, and that."""
    while True:
        header = whole(from_, HEADER)
        yield header + whole(from_, struct.unpack("<I", header[:4])[0]), whole(from_, 4)


def shut(*socks):
    for sock in socks:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def pipe(from_, to):
    try:
        while part := from_.recv(65536):
            to.sendall(part)
    except OSError:
        pass
    shut(from_, to)


def other_version(source, peer):
    peer.sendall(whole(source, 8))
    for frame, _ in frames(source):
        if frame[4] == KIND_TO_DESTINATION and b'"minor":17' in frame:
            frame = frame.replace(b'"minor":17', b'"minor":16')
            print("tampered with the offer", flush=True)
        peer.sendall(frame + struct.pack("<I", zlib.crc32(frame)))


def harm_word(peer, source, what, number):
    try:
        source.sendall(whole(peer, 8))
        words = 0
        for frame, checksum in frames(peer):
            if frame[4] == KIND_TO_SOURCE:
                words += 1
                if words == number:
                    at = HEADER + (len(frame) - HEADER) // 2
                    print(what, "at", at, "of", frame[HEADER:].decode(), flush=True)
                    if what == "cut-word":
                        source.sendall(frame[:at])
                        break
                    frame = frame[:at] + bytes([frame[at] ^ 0x10]) + frame[at + 1:]
            source.sendall(frame + checksum)
    except (EOFError, OSError):
        pass
    shut(peer, source)


def harm(source, peer, what, offset):
    sent = 0
    while part := source.recv(65536):
        at = offset - sent
        if 0 <= at < len(part):
            print(what, "at", offset, flush=True)
            if what == "cut":
                peer.sendall(part[:at])
                return
            part = part[:at] + bytes([part[at] ^ 0x10]) + part[at + 1:]
        peer.sendall(part)
        sent += len(part)


def serve(source, address, what, offset):
    peer = socket.create_connection((address, 8477))
    if what and what.endswith("-word"):
        back = threading.Thread(target=harm_word, args=(peer, source, what, offset), daemon=True)
    else:
        back = threading.Thread(target=pipe, args=(peer, source), daemon=True)
    back.start()
    try:
        if what == "version":
            other_version(source, peer)
        elif what in ("flip", "cut"):
            harm(source, peer, what, offset)
        else:
            pipe(source, peer)
    except (EOFError, OSError):
        pass
    source.close()
    peer.close()


def main():
    port, address, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    offset = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    listener = socket.create_server(("127.0.0.1", port))
    print("ready", flush=True)
    while True:
        source, _ = listener.accept()
        threading.Thread(target=serve, args=(source, address, what, offset), daemon=True).start()
        # Later ones bring the end of what the first one began.
        what = None


main()
