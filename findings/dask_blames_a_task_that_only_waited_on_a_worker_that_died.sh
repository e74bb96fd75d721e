#!/usr/bin/env bash
# distributed 2026.8.0: a worker that dies also blames the tasks that it had received but not begun. With
# allowed-failures exhausted, such a task ends as KilledWorker ("workers died while running it"), although it never
# ran. So one scan that takes all memory costs a batch its innocent scans. Count begun attempts yourself
# (one file each), and resubmit tasks that never began.
. "$(dirname "$0")/lib.sh"
venv "distributed==2026.8.0"
cat > run.py <<'PY'
import asyncio, os, time
from pathlib import Path
import dask, distributed
from distributed import Client, Nanny, Scheduler
from distributed.scheduler import KilledWorker

def die(x):
    time.sleep(2)
    os._exit(1)

def innocent(name):
    Path(name).touch()

async def main():
    dask.config.set({"distributed.scheduler.allowed-failures": 0})
    async with Scheduler(port=0, dashboard_address=None) as scheduler:
        async with Nanny(scheduler.address, nthreads=1, dashboard_address=None):
            async with Client(scheduler.address, asynchronous=True) as client:
                bad = client.submit(die, 0, priority=9)
                others = [client.submit(innocent, f"{i}.ran") for i in range(4)]
                await distributed.wait([bad, *others])
                return [await f.exception() for f in others]

if __name__ == "__main__":
    found = asyncio.run(main())
    blamed = [i for i, e in enumerate(found) if isinstance(e, KilledWorker)]
    ran = [Path(f"{i}.ran").exists() for i in blamed]
    print("distributed", distributed.__version__, "innocent tasks called KilledWorker:", blamed, "had they begun:", ran)
    raise SystemExit(not (blamed and not any(ran)))
PY
"$py" run.py 2>/dev/null
