"""A private SLURM cluster on loopback: real daemons, virtual nodes, fake GPUs, no trace left.

Everything lies in one folder below /tmp and every daemon is a child of this process. It is not a
mock: what a test sees is what SLURM does. It is not a benchmark either: time constants are short.
"""

from __future__ import annotations

import atexit
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from slurm_packages import PATH

from tests.ports import free_ports

FOREIGN = (  # an allocation or a site around us must not reach into this cluster
    *("SLURM", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_"),
    "MYSQL_",
)
USER_SIGNAL = "preempt_send_user_signal"
WAIT_S = 300.0
"""What does not come within this time never comes: no test measures how fast SLURM is."""


@dataclass(kw_only=True)
class Cluster:
    """`with Cluster() as cluster:` runs it; nodes are 127.0.0.11, .12, ..., as rendezvous wants.

    Partition `main` (the default) is preempted with requeue by `urgent`, after `grace` seconds.
    """

    accounting: bool = True
    nodes: int = 2
    cpus: int = 8
    gpus: int = 4
    grace: int = 10
    kill_wait: int = 3
    max_array_size: int = 6
    user_signal: bool = False
    extra_conf: str = ""
    folder: Path = field(init=False)
    env: dict[str, str] = field(init=False, repr=False)
    ports: list[int] = field(init=False, repr=False)
    # ids that began again at 1 would meet the results of an older cluster in a reused folder
    first_job_id: int = field(default_factory=lambda: random.SystemRandom().randrange(1000, 60000))
    daemons: dict[str, subprocess.Popen[bytes]] = field(init=False, default_factory=dict)

    def __enter__(self) -> Cluster:
        # slurmstepd's socket below the folder must fit in 108 bytes: never pytest's tmp_path
        self.folder = Path(tempfile.mkdtemp(prefix="slt-", dir="/tmp"))
        self.folder.chmod(0o755)
        for name in ("etc", "run", "log", "state", "db", "dev", "tmp"):
            (self.folder / name).mkdir()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        conf = str(self.folder / "etc" / "slurm.conf")
        self.env = {**inherited, "PATH": PATH, "SLURM_CONF": conf}
        atexit.register(self.stop)
        try:
            self._start()
        except BaseException as error:
            logs = self.logs()
            self.stop()
            if isinstance(error, Exception):
                raise RuntimeError(f"the SLURM cluster did not start: {error}\n{logs}") from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        etc, run, log = (self.folder / name for name in ("etc", "run", "log"))
        self.ports = free_ports(self.nodes + 2)
        for i in range(self.gpus):  # a symlink to a character device needs no root
            (self.folder / "dev" / f"gpu{i}").symlink_to("/dev/null")
        self._write_conf()
        key = etc / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        own = [f"--key-file={key}", f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid"]
        own += [f"--log-file={log}/munged.log", f"--seed-file={self.folder}/state/munged.seed"]
        self._daemon("munged", "munged", "-F", "--force", *own)
        self._answers("munged", "munge", "-n", "-S", f"{run}/munge.sock")
        if self.accounting:
            self._start_accounting()
        self._daemon("slurmctld", "slurmctld", "-D")
        self._answers("slurmctld", "scontrol", "ping", says="UP")
        for node in self.names:
            self.up(node)
        self.wait_until(self.idle, "every node is idle")
        # the first job of a fresh controller is slow, and it proves that every node answers
        warm = self.sh("srun", "-Q", f"-N{self.nodes}", f"-n{self.nodes}", "true")
        if warm.returncode:
            raise RuntimeError(warm.stderr.strip())
        if self.accounting:  # the controller has told slurmdbd where it listens
            ask = ("sacctmgr", "-nP", "show", "cluster", "format=controlport")
            self.wait_until(lambda: self.sh(*ask).stdout.strip()[:1] in set("123456789"), ask)

    def _start_accounting(self) -> None:
        run, user = self.folder / "run", getpass.getuser()
        small = ["--performance-schema=OFF", "--innodb-log-file-size=8M", "--skip-log-bin"]
        small += ["--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0"]
        place = [f"--datadir={self.folder}/db", f"--socket={run}/my.sock"]
        place += [f"--pid-file={run}/mariadbd.pid", f"--tmpdir={self.folder}/tmp"]
        alone = ["--skip-networking", "--skip-grant-tables", "--innodb-lock-wait-timeout=900"]
        self._daemon(
            "mariadbd", "mariadbd", "--no-defaults", f"--user={user}", *place, *alone, *small
        )
        ask = ["mariadb", "--no-defaults", "-S", f"{run}/my.sock", "-e", "select 1"]
        self._answers("mariadbd", *ask)
        conf = self.folder / "etc" / "slurmdbd.conf"
        conf.touch(mode=0o600)  # slurmdbd refuses a file that others can read
        conf.write_text(
            f"DbdHost={_host()}\nDbdAddr=127.0.0.1\nDbdPort={self.ports[1]}\nSlurmUser={user}\n"
            f"AuthType=auth/munge\nAuthInfo=socket={run}/munge.sock\n"
            f"LogFile={self.folder}/log/slurmdbd.log\nPidFile={run}/slurmdbd.pid\n"
            "StorageType=accounting_storage/mysql\nStorageHost=localhost\n"
            f"StorageUser={user}\nStorageLoc=slurm_acct\n"
        )
        self._daemon("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=f"{run}/my.sock")
        self._answers("slurmdbd", "sacctmgr", "-n", "show", "cluster")
        self.sh("sacctmgr", "-i", "-Q", "add", "cluster", "slt")

    def stop(self) -> None:
        """Ends everything of this cluster and removes its folder; raises where something lives."""
        atexit.unregister(self.stop)
        if not self.folder.exists():
            return
        if self._alive("slurmctld"):
            with suppress(subprocess.TimeoutExpired):
                self.cancel_all()
                self._wait(self._empty, 3)
        for name in sorted(self.daemons, key=_last_first):
            if name == "slurmdbd":  # only now: a step would else be reported to nobody
                _kill(self.steps())
            _end(self.daemons[name])
        _kill(self.steps())
        if left := self.steps() + [p for p in self.daemons if self._alive(p)]:
            raise RuntimeError(f"{self.folder}: still alive: {left}")
        shutil.rmtree(self.folder)

    @property
    def names(self) -> list[str]:
        return [f"127.0.0.{11 + i}" for i in range(self.nodes)]

    def _write_conf(self) -> None:
        here, etc = self.folder, self.folder / "etc"
        address, bind = _loopback()
        text = CONF.format(
            host=_host(), user=getpass.getuser(), here=here, port=self.ports[0], bind=bind,
            kill_wait=self.kill_wait, cred=self.kill_wait + 3, array=self.max_array_size,
            first=self.first_job_id,
            controller=f"SlurmctldParameters={USER_SIGNAL}" if self.user_signal else "",
        )  # fmt: skip
        if self.accounting:
            text += ACCOUNTING.format(port=self.ports[1], here=here)
        gres = f"Gres=gpu:{self.gpus}" if self.gpus else ""
        for node, port in zip(self.names, self.ports[2:], strict=True):
            text += f"NodeName={node} NodeAddr={address} NodeHostname={_host()} Port={port} "
            text += f"CoresPerSocket={self.cpus} RealMemory=8000 {gres} State=UNKNOWN\n"
        every = f"Nodes={','.join(self.names)} MaxTime=INFINITE DefaultTime=30"
        text += f"PartitionName=main {every} Default=YES PriorityTier=1 "
        text += f"PreemptMode=REQUEUE GraceTime={self.grace}\n"
        text += f"PartitionName=urgent {every} PriorityTier=10 PreemptMode=OFF\n"
        (etc / "slurm.conf").write_text(text + self.extra_conf + "\n")
        files = f"Name=gpu File={here}/dev/gpu[0-{self.gpus - 1}]\n"
        (etc / "gres.conf").write_text(files if self.gpus else "")
        # slurmd 22.05 starts a cgroup plugin whatever is configured, and v1 unmounted is inert
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")

    def send_user_signal(self, on: bool) -> None:
        """Whether a preempted job gets its --signal (USR2) as well as the SIGTERM."""
        if on != self.user_signal:
            self.user_signal = on
            self._write_conf()
            self.sh("scontrol", "reconfigure", check=True)

    def _daemon(self, name: str, *argv: str, **env: str) -> None:
        if leash := shutil.which("setpriv"):
            # a pytest that is killed takes its daemons along; slurmctld can sit on a TERM for long
            argv = (leash, "--pdeathsig", "KILL", *argv)
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                argv, env={**self.env, **env}, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,  # Ctrl-C in the terminal is for pytest
            )  # fmt: skip

    def _alive(self, name: str) -> bool:
        return name in self.daemons and self.daemons[name].poll() is None

    def _answers(self, name: str, *argv: str, says: str = "") -> None:
        end = time.monotonic() + WAIT_S
        while True:
            probe = self.sh(*argv)
            if probe.returncode == 0 and says in probe.stdout:
                return
            if not self._alive(name) or "fatal:" in probe.stderr or time.monotonic() > end:
                raise RuntimeError(f"{name} does not answer {argv[0]}: {probe.stderr.strip()}")
            time.sleep(0.05)

    def up(self, node: str) -> None:
        """The node's slurmd is started."""
        self._daemon(f"slurmd.{node}", "slurmd", "-D", "-N", node)

    def crash(self, node: str) -> None:
        """The node loses power: slurmd, its steps and their tasks are gone without a word."""
        self.daemons[f"slurmd.{node}"].kill()
        self.daemons[f"slurmd.{node}"].wait()
        log = f"{self.folder}/log/slurmd.{node}.log"
        victims = []
        for process, _ in self._processes():
            with suppress(psutil.Error):
                if _is_step(process) and log in {f.path for f in process.open_files()}:
                    process.suspend()  # else it reports the death of its tasks
                    children = process.children(recursive=True)
                    victims += [process.pid, *(child.pid for child in children)]
        _kill(victims)

    def down(self, node: str) -> None:
        """An administrator takes the node: its jobs end as NODE_FAIL at once."""
        self.sh("scontrol", "update", f"nodename={node}", "state=down", "reason=test", check=True)

    def resume(self, node: str) -> None:
        self.sh("scontrol", "update", f"nodename={node}", "state=resume")

    def tidy(self) -> None:
        """As at the start: no jobs, every node up and idle."""
        self.cancel_all()
        for node in self.names:
            if not self._alive(f"slurmd.{node}"):
                self.up(node)
        self.wait_until(self._recovered, "no jobs and every node idle")

    def _recovered(self) -> bool:
        rows = self.sh("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").stdout.splitlines()
        for node, state in (row.split() for row in rows):
            if state.startswith(("down", "drain")):
                self.resume(node)
        return self.idle() and self._empty()

    def _empty(self) -> bool:
        return not self.sh("squeue", "-h").stdout.strip()

    def idle(self) -> bool:
        for node in self.names:
            if not self._alive(f"slurmd.{node}"):
                raise RuntimeError(f"slurmd of {node} died")
        states = self.sh("sinfo", "-h", "-N", "-p", "main", "-o", "%T").stdout.split()
        if "inval" in states:
            raise RuntimeError(self.sh("sinfo", "-N", "-o", "%N %T %E").stdout)
        return states == ["idle"] * self.nodes

    def sh(
        self,
        *argv: str | Path,
        timeout: float = WAIT_S,
        check: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A command as a user of this cluster would run it."""
        return subprocess.run(
            [str(a) for a in argv], env={**self.env, **(env or {})}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout, check=check,
        )  # fmt: skip

    def sbatch(self, *argv: str | Path) -> str:
        """The new job's id; output goes to the cluster's folder unless argv says where."""
        out = f"--output={self.folder}/log/%j.job"
        done = self.sh("sbatch", "--parsable", out, *argv)
        if done.returncode:
            raise RuntimeError(f"sbatch: {done.stderr.strip()}")
        return done.stdout.strip()

    def states(self, job_id: str) -> list[str]:
        """One state word per array task, in order; for about five minutes after their end too."""
        rows = self.sh("squeue", "-h", "-r", "-t", "all", "-S", "i", "-j", job_id, "-o", "%T")
        return rows.stdout.split()

    def state(self, job_id: str) -> str:
        """Of a single job or array task; empty where the controller does not know it."""
        return (self.states(job_id) or [""])[0]

    def cancel_all(self) -> None:
        user = f"--user={getpass.getuser()}"
        self.sh("scancel", "--state=PENDING", user)  # else they start as the others end
        # scancel, --signal=KILL too, waits KillWait for a task that traps SIGTERM, and then
        # slurmd pauses for 1, 2, 4 s: 7 s in all
        _kill(self._tasks())
        self._wait(self._empty, 1)
        self.sh("scancel", user)

    def preempt(self, node: str, *, seconds: int = 60) -> str:
        """The id of an urgent job that wants the whole node; its end or scancel frees the node."""
        want = ["-p", "urgent", "-w", node, f"-c{self.cpus}", "-J", "urgent"]
        return self.sbatch(*want, "--wrap", f"exec sleep {seconds}")

    def tasks_of(self, job_id: str) -> list[int]:
        """Pids of the processes that srun started for a job ("123" or "123_4"), by rank."""
        base, _, index = job_id.partition("_")
        want = {"SLURM_ARRAY_JOB_ID": base, "SLURM_ARRAY_TASK_ID": index} if index else {}
        want = want or {"SLURM_JOB_ID": base}
        return self._tasks(**want)

    def _tasks(self, **want: str) -> list[int]:
        ranks: dict[int, tuple[int, int]] = {}
        for process, env in self._processes():
            # the batch script has a SLURM_PROCID too, but no step
            if "SLURM_STEP_ID" in env and want.items() <= env.items():
                with suppress(psutil.Error):
                    ranks[process.pid] = (int(env["SLURM_PROCID"]), process.ppid())
        return sorted((p for p, (_, up) in ranks.items() if up not in ranks), key=ranks.__getitem__)

    def steps(self) -> list[int]:
        """Every slurmstepd of this cluster and every process inside its jobs, double forks too."""
        found = self._processes()
        return [p.pid for p, env in found if _is_step(p) or "SLURM_JOB_ID" in env]

    def _processes(self) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        # slurmstepd has parent 1 and an environment of SLURM_CONF alone: this is how to find it
        for process in psutil.process_iter():
            env = environment(process.pid)
            if env.get("SLURM_CONF") == self.env["SLURM_CONF"] and process.pid != os.getpid():
                yield process, env

    def wait_until(self, predicate: Callable[[], object], what: object) -> None:
        """Polls; after WAIT_S fails with what was waited for and the ends of the daemons' logs."""
        if not self._wait(predicate, WAIT_S):
            queue = self.sh("squeue", "-r", "-t", "all").stdout
            nodes = self.sh("sinfo", "-N", "-o", "%N %T %E").stdout
            what = what() if callable(what) else what
            raise AssertionError(f"not within {WAIT_S} s: {what}\n{queue}{nodes}{self.logs()}")

    def _wait(self, predicate: Callable[[], object], timeout: float) -> bool:
        end = time.monotonic() + timeout
        while not predicate():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def logs(self, *, lines: int = 12) -> str:
        """The tail of every daemon's log."""
        text = ""
        for path in sorted((self.folder / "log").glob("*")):
            if path.suffix in {".log", ".out"} and (tail := path.read_text(errors="replace")):
                text += f"--- {path.name}\n" + "\n".join(tail.splitlines()[-lines:]) + "\n"
        return text


def alive(pid: int) -> bool:
    """Whether it runs; an orphan that nobody has reaped yet does not."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _loopback() -> tuple[str, str]:
    """The nodes' address, and the line that keeps the daemons from listening on any other.

    slurmd then binds what the host's name resolves to, so that must be loopback to begin with.
    """
    with suppress(OSError):
        address = socket.gethostbyname(_host())
        if address.startswith("127."):
            return address, "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"
    return "127.0.0.1", ""


def environment(pid: int) -> dict[str, str]:
    """What it was started with; psutil stops at the zeros that slurmstepd begins its own with."""
    try:
        block = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in block.split("\0") if "=" in pair)


def _is_step(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "slurmstepd" in process.exe()
    return False


def _last_first(name: str) -> int:
    order = ["slurmd", "slurmctld", "slurmdbd", "mariadbd", "munged"]
    return order.index(name.partition(".")[0])


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(15)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _kill(pids: Iterable[int]) -> None:
    processes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
            os.kill(pid, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=5)


CONF = """\
ClusterName=slt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={here}/run/munge.sock,cred_expire={cred}
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/s.%n
SlurmctldPidFile={here}/run/slurmctld.pid
SlurmdPidFile={here}/run/slurmd.%n.pid
SlurmctldLogFile={here}/log/slurmctld.log
SlurmdLogFile={here}/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
PlugStackConfig=/dev/null
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=1
MinJobAge=300
KillWait={kill_wait}
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=10
TCPTimeout=2
UnkillableStepTimeout=30
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=5,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MaxArraySize={array}
FirstJobId={first}
{bind}
{controller}
"""
ACCOUNTING = """\
AccountingStorageTRES=gres/gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={here}/run/munge.sock
"""
