#!/usr/bin/python3
"""Between two hosts' ferryd: says that the source has another Xen, flips one byte of what it sends, or cuts the connection there.

tampering-proxy.py PORT PEER version | flip OFFSET | cut OFFSET

Listens on 127.0.0.1:PORT. Only the first connection of the source is harmed. OFFSET counts what the source sends. Says what it does.
"""
import socket
import struct
import sys
import threading
import zlib

HEADER, KIND_TO_DESTINATION = 8, 1


def whole(sock, count):
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def pipe(from_, to):
    try:
        while part := from_.recv(65536):
            to.sendall(part)
    except OSError:
        pass
    for sock in (from_, to):
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def other_version(source, peer):
    peer.sendall(whole(source, 8))
    while True:
        header = whole(source, HEADER)
        payload = whole(source, struct.unpack("<I", header[:4])[0])
        whole(source, 4)
        if header[4] == KIND_TO_DESTINATION and b'"minor":17' in payload:
            payload = payload.replace(b'"minor":17', b'"minor":16')
            print("tampered with the offer", flush=True)
        frame = header + payload
        peer.sendall(frame + struct.pack("<I", zlib.crc32(frame)))


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
    threading.Thread(target=pipe, args=(peer, source), daemon=True).start()
    try:
        if what == "version":
            other_version(source, peer)
        elif what:
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
