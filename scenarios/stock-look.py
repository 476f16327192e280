"""What stock xl tells of a guest: its configuration, vCPUs, disks and cards. `stock-look.py GUEST` writes it; with a file that was
written before it says where the two differ, and fails if they do. Where a vCPU is just now and the time that it has used are left out."""

import difflib
import json
import subprocess
import sys


def xl(*words):
    return subprocess.run(("xl",) + words, check=True, capture_output=True, text=True).stdout


guest = sys.argv[1]
listed = json.dumps(json.loads(xl("list", "-l", guest)), indent=1, sort_keys=True).splitlines()
# Name, ID, VCPU; CPU, State, Time(s); affinities.
vcpus = [" ".join(line.split()[:3] + line.split()[6:]) for line in xl("vcpu-list", guest).splitlines()[1:]]
now = listed + vcpus + xl("block-list", guest).splitlines() + xl("network-list", guest).splitlines()
if len(sys.argv) == 2:
    print("\n".join(now))
else:
    before = open(sys.argv[2]).read().splitlines()
    assert len(before) > 20 and vcpus, "there is nothing to compare"
    differ = list(difflib.unified_diff(before, now, "before", "now", lineterm="", n=1))
    print("\n".join(differ) or f"{len(now)} lines are the same")
    sys.exit(bool(differ))
