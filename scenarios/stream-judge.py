"""Holds a recorded stream against Debian's own verify-stream-v2: stream-judge.py STREAM PLAIN.

It must refuse the stream, and each kind of our records by itself, by that record's number; and accept what `ferry stream strip` leaves,
which is written to PLAIN. Ends with 0 if all is so.
"""

import json
import os
import re
import subprocess
import sys

XEN = os.environ.get("XEN_TOOLS", "/usr/lib/xen-4.17")
VERIFIER = ["python3", XEN + "/bin/verify-stream-v2", "-v"]


def verify(layer, **stream):
    """Exit code of the verifier and all that it has said, of an open file (stdin=) or of bytes (input=)."""
    environment = os.environ | {"PYTHONPATH": XEN + "/lib/python"}
    command = VERIFIER + ["-f", layer]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, **stream)
    return ran.returncode, ran.stdout.decode()


def refused(ran):
    """The record type that the verifier does not know."""
    code, said = ran
    # The same words stand in the traceback before it.
    number = re.search(r"StreamError: Unrecognised record type (?:0x)?([0-9a-f]+)$", said, re.MULTILINE)
    if code != 1 or not number:
        sys.exit("not refused for a record (exit code %d):\n%s" % (code, said[-2000:]))
    return int(number[1], 16)


def ferry(*arguments):
    ran = subprocess.run(["ferry", "stream", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if ran.returncode:
        sys.exit("ferry stream %s: %s" % (" ".join(arguments), ran.stderr.decode()))
    return ran.stdout.decode() + ran.stderr.decode()


def main(whole, plain):
    items = json.loads(ferry("show", "--json", whole))["items"]
    names = {int(item["type"], 16): item["name"] for item in items if item["type"]}
    ends = [item["offset"] for item in items[1:]] + [os.path.getsize(whole)]
    file = open(whole, "rb", buffering=0)

    def part(n):
        file.seek(items[n]["offset"])
        return file.read(ends[n] - items[n]["offset"])

    ours = [n for n, item in enumerate(items) if item["name"].startswith("GT_")]

    print("the stream is refused for", names[refused(verify("libxl", stdin=file))])
    file.seek(next(item["offset"] for item in items if item["layer"] == "libxc"))
    print("its image is refused for", names[refused(verify("libxc", stdin=file))])

    # Each kind behind what stock Xen knows of what comes before it. Without memory, which is most of it and says nothing here.
    tried = []
    for n in ours:
        item = items[n]
        if item["name"] in tried:
            continue
        stock = [m for m in range(n) if m not in ours and items[m]["name"] != "PAGE_DATA"]
        number = refused(verify("libxl", input=b"".join(part(m) for m in stock + [n])))
        if number != int(item["type"], 16):
            sys.exit("%s was not refused, but %#x" % (item["name"], number))
        tried.append(item["name"])
    print("each is refused by itself:", " ".join(tried))

    said = ferry("strip", whole, plain).strip()
    extra = sum(item["name"] == "SHARED_INFO" for item in items)
    if said != "%d records removed" % (len(ours) + extra):
        sys.exit("%s, but there are %d of ours and %d SHARED_INFO" % (said, len(ours), extra))
    with open(plain, "rb") as stripped:
        code, text = verify("libxl", stdin=stripped)
    if code or "HVM context" not in text or "Page Data record" not in text:
        sys.exit("without them it is refused (exit code %d):\n%s" % (code, text[-2000:]))
    print(said + ": accepted without them")
    print(ferry("check", plain).strip())


main(*sys.argv[1:])
