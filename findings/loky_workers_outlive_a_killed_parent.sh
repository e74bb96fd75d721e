#!/usr/bin/env bash
# loky 3.7.0 (Linux): busy workers of a ProcessPoolExecutor outlive a parent that is killed with SIGKILL
# (an out-of-memory kill, a batch system at its time limit). So do loky's trackers. After hours of preprocessing,
# the workers and their memory remain on the node. Let each worker watch its parent
# (PR_SET_PDEATHSIG on Linux, or a thread that compares os.getppid()).
. "$(dirname "$0")/lib.sh"
venv "loky==3.7.0"
cat > parent.py <<'PY'
import os, time
from loky import ProcessPoolExecutor

def busy(path):
    open(path, "w").write(str(os.getpid()))
    time.sleep(60)

if __name__ == "__main__":
    pool = ProcessPoolExecutor(2)
    list(pool.map(busy, ["0.pid", "1.pid"]))
PY
cat > run.py <<'PY'
import os, signal, subprocess, sys, time
from pathlib import Path
import loky

parent = subprocess.Popen([sys.executable, "parent.py"])
files = [Path("0.pid"), Path("1.pid")]
while not all(f.exists() and f.read_text() for f in files):
    assert parent.poll() is None
    time.sleep(0.1)
workers = [int(f.read_text()) for f in files]
os.kill(parent.pid, signal.SIGKILL)
parent.wait()
time.sleep(10)

def runs(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        return False

alive = [runs(pid) for pid in workers]
print("loky", loky.__version__, "workers alive 10 s after their parent was killed:", alive)
for pid in workers:
    if runs(pid):
        os.kill(pid, signal.SIGKILL)
raise SystemExit(alive != [True, True])
PY
"$py" run.py 2>/dev/null
