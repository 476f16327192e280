# In dom0: connects to xenstored, reads a node and leaves, again and again, as xenstore-read does, until a file appears.
# Fails if a read was slower than allowed.  usage: xenstore-latency.py STOP-FILE P99-MS MAX-MS
import os, socket, struct, sys, time

stop, p99_limit, max_limit = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
READ = 2
path = b"/local/domain/0/name\0"
times = []


def get(s, n):
    data = b""
    while len(data) < n:
        part = s.recv(n - len(data))
        if not part:
            sys.exit("xenstored closed the connection")
        data += part
    return data


while not os.path.exists(stop):
    began = time.monotonic()
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(60)
    s.connect("/run/xenstored/socket")
    s.sendall(struct.pack("<4I", READ, 1, 0, len(path)) + path)
    op, _, _, length = struct.unpack("<4I", get(s, 16))
    value = get(s, length)
    s.close()
    times.append((time.monotonic() - began) * 1000)
    if op != READ or value != b"Domain-0":
        sys.exit("READ gave %d %r" % (op, value))
    time.sleep(0.01)

if len(times) < 100:
    sys.exit("only %d reads: too few to judge" % len(times))
times.sort()
p99 = times[len(times) * 99 // 100]
print("%d reads: median %.2f ms, p99 %.2f ms, longest %.2f ms" % (len(times), times[len(times) // 2], p99, times[-1]))
if p99 > p99_limit or times[-1] > max_limit:
    sys.exit("slower than allowed: p99 %g ms, longest %g ms" % (p99_limit, max_limit))
