"""Start Dask workers as SLURM jobs, run a command with their address, and end them.

    python launch/dask_slurm.py --workers=16 --gpus=1 --memory=64GB --time=4:00:00 -- \
        python predict.py --workdir=runs/x --input=/shared/scans --output=/shared/out

Each worker is a job of its own with one process, and takes its place when the queue has
one; the command gets --dask=ADDRESS. Leave out --gpus for preprocess.py. Submit on a
file system that all nodes share. dask-jobqueue does the work (pip install
"swinsmt_jax[cluster]"); its own configuration, jobqueue.yaml, says the rest, such as
queue and account. See docs/cluster.md; not yet run on a cluster.
"""

import argparse
import subprocess
import sys

from dask_jobqueue import SLURMCluster


def main():
    """Run the command; its exit status is this one's."""
    about, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--workers", type=int, required=True, help="jobs of one worker")
    parser.add_argument("--gpus", type=int, default=0, help="of each worker")
    parser.add_argument("--cpus", type=int, default=8, help="of each worker")
    parser.add_argument("--memory", default="64GB", help="of each worker")
    parser.add_argument("--time", default="4:00:00", help="of each job")
    parser.add_argument("--interface", help="of the network, such as ib0")
    parser.add_argument("--logs", default="dask_logs", help="folder of the jobs' logs")
    parser.add_argument("command", nargs="+", help="behind --, without --dask")
    options = parser.parse_args()
    cluster = SLURMCluster(
        cores=1,  # one case at a time
        processes=1,
        job_cpu=options.cpus,
        memory=options.memory,
        walltime=options.time,
        interface=options.interface,
        log_directory=options.logs,
        job_extra_directives=[f"--gres=gpu:{options.gpus}"] if options.gpus else [],
        # SLURM holds the memory's limit; Dask's would end a worker that may have it.
        worker_extra_args=["--memory-limit=0", "--no-dashboard"],
        scheduler_options={"dashboard_address": ":0"},
    )
    with cluster:
        cluster.scale(jobs=options.workers)
        address = cluster.scheduler_address
        print(f"scheduler at {address}, dashboard at {cluster.dashboard_link}")
        done = subprocess.run([*options.command, f"--dask={address}"])
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
