#!/usr/bin/env python3
"""A TPU pod from one command line: create, set up, run on all workers, tail, stop, fetch, delete.

  scripts/tpu/pod.py --name=mine --zone=us-east5-b create --type=v6e-16 [--queued] [--spot]

Needs `gcloud` and nothing else. `--dry_run` prints the commands and runs none; docs/tpu.md walks
through all of them.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RUNTIMES = {
    "v6e": "v2-alpha-tpuv6e",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v4": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v2": "tpu-ubuntu2204-base",
}
HOME, ARCHIVE, LOG, PID = "crossin_jax", "crossin_jax.tar.gz", "crossin_jax.log", "crossin_jax.pid"
INSTALL = f"""set -e
mkdir -p {HOME} && tar -xzf {ARCHIVE} -C {HOME}
python=python3
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  python=python3.11
  sudo add-apt-repository -y ppa:deadsnakes/ppa
  sudo apt-get install -y -qq python3.11 python3.11-venv
fi
PYTHON=$python {HOME}/scripts/setup.sh tpu gcs"""


def main() -> int:
    """Runs, or prints, the commands of one verb; stops at the first that fails."""
    arguments = parse()
    for command in VERBS[arguments.verb](arguments):
        print(shlex.join(command), flush=True)
        if not arguments.dry_run:
            try:
                code = subprocess.run(command, cwd=REPOSITORY).returncode
            except FileNotFoundError:
                print(
                    f"error: {command[0]} is not installed (https://cloud.google.com/sdk)",
                    file=sys.stderr,
                )
                return 2
            if code:
                return code
    return 0


def parse() -> argparse.Namespace:
    """The command line; what is not among the choices is refused with them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the pod, and of its queued resource")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", help="default: that of gcloud's configuration")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run none")
    verbs = parser.add_subparsers(dest="verb", required=True)
    create = verbs.add_parser("create", help="a TPU-VM pod, or a queued request for one")
    create.add_argument("--type", required=True, help="e.g. v6e-16, v5litepod-16, v5p-32, v4-32")
    create.add_argument("--version", help="runtime; default: that of the type")
    create.add_argument("--spot", action="store_true", help="cheaper, and taken back at any time")
    status = verbs.add_parser("status", help="READY, or the state of the request")
    delete = verbs.add_parser(
        "delete", help="the pod and its request; what is only on its disks is gone"
    )
    for verb in (create, status, delete):
        verb.add_argument("--queued", action="store_true", help="through a queued resource")
    verbs.add_parser("setup", help="send the committed files and install them on all workers")
    run = verbs.add_parser("run", help="start a command on all workers, in the background")
    run.add_argument(
        "command", nargs=argparse.REMAINDER, help="e.g. python -m crossin_jax.train --config …"
    )
    tail = verbs.add_parser("tail", help="follow the log of a worker")
    tail.add_argument("--worker", default="0", help="number, or all")
    verbs.add_parser("stop", help="SIGTERM on all workers: the run saves and leaves")
    fetch = verbs.add_parser("fetch", help="copy a file or folder from worker 0")
    fetch.add_argument("source", help="path on the pod, from the home folder")
    fetch.add_argument("target", help="path here")
    arguments = parser.parse_args()
    family = getattr(arguments, "type", "v4-8").partition("-")[0]
    if family not in RUNTIMES and not arguments.version:
        parser.error(
            f"--type={arguments.type}: no runtime is known for {family}; known: "
            f"{', '.join(RUNTIMES)}; name one with --version"
        )
    if arguments.verb == "run" and not arguments.command:
        parser.error(
            "run needs a command, e.g. run python -m crossin_jax.train --config configs/mine.py"
        )
    return arguments


def gcloud(arguments: argparse.Namespace, group: str, verb: str, *rest: str) -> list[str]:
    """One gcloud command in the pod's zone and project."""
    project = [f"--project={arguments.project}"] if arguments.project else []
    return ["gcloud", "compute", "tpus", group, verb, *rest, f"--zone={arguments.zone}", *project]


def ssh(arguments: argparse.Namespace, command: str, worker: str = "all") -> list[str]:
    """A shell command on workers of the pod."""
    return gcloud(
        arguments, "tpu-vm", "ssh", arguments.name, f"--worker={worker}", f"--command={command}"
    )


def create(arguments: argparse.Namespace) -> list[list[str]]:
    """A pod under its name; as a queued resource, the pod it will get has the same name."""
    runtime = arguments.version or RUNTIMES[arguments.type.partition("-")[0]]
    rest = [f"--accelerator-type={arguments.type}", *(["--spot"] if arguments.spot else [])]
    if arguments.queued:
        return [
            gcloud(
                arguments,
                "queued-resources",
                "create",
                arguments.name,
                f"--node-id={arguments.name}",
                f"--runtime-version={runtime}",
                *rest,
            )
        ]
    return [gcloud(arguments, "tpu-vm", "create", arguments.name, f"--version={runtime}", *rest)]


def status(arguments: argparse.Namespace) -> list[list[str]]:
    """The state in one word."""
    group, value = ("queued-resources", "state.state") if arguments.queued else ("tpu-vm", "state")
    return [gcloud(arguments, group, "describe", arguments.name, f"--format=value({value})")]


def setup(arguments: argparse.Namespace) -> list[list[str]]:
    """The committed files, unpacked and installed on every worker."""
    return [
        ["git", "archive", "--format=tar.gz", f"--output=/tmp/{ARCHIVE}", "HEAD"],
        gcloud(arguments, "tpu-vm", "scp", f"/tmp/{ARCHIVE}", f"{arguments.name}:", "--worker=all"),
        ssh(arguments, INSTALL),
    ]


def run(arguments: argparse.Namespace) -> list[list[str]]:
    """The command in the repository's environment, detached; its process number is kept for
    `stop`.
    """
    inner = f"cd ~/{HOME} && PATH=~/{HOME}/.venv/bin:$PATH exec {shlex.join(arguments.command)}"
    return [
        ssh(
            arguments,
            f"nohup setsid bash -c {shlex.quote(inner)} >>~/{LOG} 2>&1 </dev/null & echo $! "
            f">~/{PID}",
        )
    ]


def tail(arguments: argparse.Namespace) -> list[list[str]]:
    """The last lines of the log and those that follow."""
    return [ssh(arguments, f"tail -n 50 -F ~/{LOG}", arguments.worker)]


def stop(arguments: argparse.Namespace) -> list[list[str]]:
    """The signal that makes a run save and leave with 75."""
    return [ssh(arguments, f"kill -TERM $(cat ~/{PID})")]


def fetch(arguments: argparse.Namespace) -> list[list[str]]:
    """Results from the first worker, which writes them."""
    return [
        gcloud(
            arguments,
            "tpu-vm",
            "scp",
            "--recurse",
            f"{arguments.name}:{arguments.source}",
            arguments.target,
            "--worker=0",
        )
    ]


def delete(arguments: argparse.Namespace) -> list[list[str]]:
    """The pod; with a queued resource, the request and its pod."""
    if arguments.queued:
        return [
            gcloud(arguments, "queued-resources", "delete", arguments.name, "--force", "--quiet")
        ]
    return [gcloud(arguments, "tpu-vm", "delete", arguments.name, "--quiet")]


VERBS = {
    "create": create,
    "status": status,
    "setup": setup,
    "run": run,
    "tail": tail,
    "stop": stop,
    "fetch": fetch,
    "delete": delete,
}

if __name__ == "__main__":
    sys.exit(main())
