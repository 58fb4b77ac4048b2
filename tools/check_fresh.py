#!/usr/bin/env python3
"""Run the README's two commands on minimal machines: this is ``make check-fresh``.

Each machine is a minimal Debian that debootstrap builds in a temporary folder, with Python, make,
git and certificates, but without a desktop. The commit that is checked out here is cloned into a
folder with a space in its name, both by an ordinary user and by root. This takes about 20 minutes
for each machine and user, and 12 GB of disk. It needs root and debootstrap, and is skipped, with
the reason, without them.
"""

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = "python3,python3-venv,make,git,ca-certificates"
# Network settings of this machine, in case they are not the usual ones.
NETWORK_FILES = ["etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt"]
NETWORK_VARIABLES = ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST"]
NETWORK_VARIABLES += ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy"]
FACTS = (
    "import sys, torch, detectron2, importlib.metadata as m; "
    "opencv = [d.name + ' ' + d.version for d in m.distributions() if 'opencv' in d.name]; "
    "print('Python ' + sys.version.split()[0], 'PyTorch ' + torch.__version__, *opencv, "
    "'Detectron2 ' + m.version('detectron2'), sep=', ')"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", nargs="+", default=["trixie", "bookworm"], metavar="SUITE")
    parser.add_argument("--users", nargs="+", default=["user", "root"], choices=["user", "root"])
    parser.add_argument("--targets", nargs="+", default=["demo", "test"], metavar="TARGET")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", metavar="URL")
    parser.add_argument("--folder", type=Path, help="where to build (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave the machines where they are")
    args = parser.parse_args()
    missing = [name for name in ("debootstrap", "chroot", "unshare") if not shutil.which(name)]
    if os.geteuid() != 0 or missing:
        reason = f"needs {', '.join(missing)}" if missing else "needs root"
        print(f"check-fresh: skipped: {reason}")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="check-fresh-", dir=args.folder))
    failed = []
    try:
        for suite in args.suites:
            machine = build(folder / suite, suite, args.mirror)
            for user in args.users:
                if not check(machine, user, args.targets):
                    failed.append(f"{suite} as {user}")
    except KeyboardInterrupt:
        print("check-fresh: interrupted", file=sys.stderr)
        return 130
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"check-fresh: error: {error}", file=sys.stderr)
        return 1
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    if failed:
        print(f"check-fresh: failed on {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def build(machine: Path, suite: str, mirror: str) -> Path:
    say(f"building a minimal Debian {suite}")
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}"]
    command += [suite, str(machine), mirror]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        print(result.stdout[-2000:], file=sys.stderr)
        result.check_returncode()
    for name in NETWORK_FILES:
        if Path("/", name).exists():
            shutil.copyfile(Path("/", name), machine / name)
    run_in(machine, "root", "useradd --create-home user")
    return machine


def check(machine: Path, user: str, targets: list[str]) -> bool:
    """Run the commands as one user; return whether all of them passed."""
    home = Path("root" if user == "root" else "home/user")
    clone = machine / home / "my projects" / "balanced_d2"
    say(f"{machine.name} as {user}")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    which = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(which, cwd=clone, stdout=subprocess.PIPE, text=True).stdout.strip()
    if user != "root":
        run_in(machine, "root", f"chown -R user '/{home}'")
    took = []
    for target in targets:
        start = time.monotonic()
        returncode = run_in(machine, user, f"cd '/{home}/my projects/balanced_d2' && make {target}")
        minutes = (time.monotonic() - start) / 60
        took.append(
            f"make {target} {'passed' if returncode == 0 else 'FAILED'} ({minutes:.0f} min)"
        )
        if returncode:
            break
    python = f"'/{home}/my projects/balanced_d2/.venv/bin/python'"
    facts = run_in(machine, user, f'cd / && {python} -c "{FACTS}"', capture=True)
    release = (machine / "etc/debian_version").read_text().strip()
    row = [datetime.date.today(), commit, f"Debian {release}", user, ", ".join(took), facts.strip()]
    print("| " + " | ".join(map(str, row)) + " |", flush=True)
    shutil.rmtree(clone)  # 6 GB
    return returncode == 0


def run_in(machine: Path, user: str, command: str, capture: bool = False):
    """Run a shell command in the machine, in namespaces that end its mounts and processes with it.

    Returns:
        Its exit code or, with ``capture``, its output.
    """
    mounts = f"cd '{machine}' && mount -t proc proc proc && mount --rbind /dev dev"
    environment = {
        "HOME": "/root" if user == "root" else "/home/user",
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "TERM": os.environ.get("TERM", "dumb"),
        **{name: os.environ[name] for name in NETWORK_VARIABLES if name in os.environ},
    }
    script = f'{mounts} && exec chroot --userspec={user}: . env -i "$@"'
    arguments = [f"{k}={v}" for k, v in environment.items()]
    result = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", script, "bash"]
        + [*arguments, "bash", "-c", command],
        stdout=subprocess.PIPE if capture else None,
        text=True,
    )
    return result.stdout if capture else result.returncode


def say(text: str) -> None:
    print(f"check-fresh: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
