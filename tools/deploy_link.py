"""The connection to a board: commands, questions, files over SSH, and each failure as one line that says what to do.

Host keys, those of jump hosts too, are checked against ~/.ssh/known_hosts and never learnt here; only keys open the
door, no passwords.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import deploy_agent
from deploy_board import DeployError, plain

try:
    import fabric
    import paramiko
except ImportError as missing:
    raise SystemExit(f'deploy_jetson.py needs {missing.name}: pip install "edgert[deploy]"') from missing

_CONNECT_S, _SILENCE_S, _QUESTION_S = 10.0, 30, 1800.0
_SOURCE = Path(deploy_agent.__file__).read_text()
_ASK = (  # for the board's Python: source and values are too long for a word of its command line
    "import json, sys; source, question, values = json.loads(sys.stdin.readline()); "
    "agent = {'__name__': 'agent'}; exec(source, agent); sys.exit(agent['main'](question, values))"
)
_MOST_OUTPUT = 4 << 20
_MOST_PORT = 65535


class LostConnectionError(DeployError):
    """The board no longer answers."""


@dataclass(frozen=True)
class Ran:
    """A command that ended. output, errors: of what it wrote the end, at most 4 MiB each."""

    status: int
    output: str
    errors: str
    seconds: float

    @property
    def last_words(self) -> str:
        """The last line that says something, for a message."""
        if self.status in (-1, 137):
            return "it was killed, probably for want of memory; state less --memory, or stop other programs"
        lines = [line.strip() for line in (self.errors + "\n" + self.output).splitlines() if line.strip()]
        told = [line for line in lines if "error" in line.lower() or "errno" in line.lower()] or lines
        return told[-1][:400] if told else f"it ended with {self.status} and said nothing"


class Link:
    """One SSH connection. `python`: the board's interpreter, for questions, once it is known."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.python = "python3"
        self._connection = _connection(host)
        self._sftp: paramiko.SFTPClient | None = None
        self._held: paramiko.Channel | None = None

    def __enter__(self) -> Link:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):  # it may be gone already
            self._connection.close()

    def open(self) -> None:
        """Connect. DeployError: who refuses what."""
        hops = list(_hops(self._connection))
        for hop in hops:  # fabric gives each a client of its own, which takes any key
            with contextlib.suppress(OSError):
                hop.client.load_system_host_keys()
            hop.client.set_missing_host_key_policy(paramiko.RejectPolicy())
            hop.connect_timeout = int(_CONNECT_S)
        try:
            self._connection.open()
        except Exception as problem:
            refusing = next((hop for hop in reversed(hops) if not hop.is_connected), self._connection)
            raise DeployError(self._refusal(refusing, problem)) from problem
        for hop in hops:
            hop.transport.set_keepalive(10)
            with contextlib.suppress(OSError, AttributeError):  # a gateway's channel is no socket
                hop.transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_S * 1000)

    def _refusal(self, hop: fabric.Connection, problem: Exception) -> str:
        """Why there is no connection, and the remedy. hop: the board, or the host on the way that refuses."""
        name = self.host if hop is self._connection else f"{self.host}: {hop.original_host}, on the way there,"
        there = f"{hop.user or getpass.getuser()}@{hop.original_host if hop.gateway else hop.host}"
        port = "" if hop.port in (None, 22) else f" -p {hop.port}"
        if isinstance(problem, paramiko.PasswordRequiredException):
            return f"{there}: the key is locked by a passphrase; run ssh-add first"
        if isinstance(problem, paramiko.AuthenticationException):
            return f"{there} refuses the key: nothing was sent; run ssh-copy-id{port} {there} and try again"
        if isinstance(problem, paramiko.BadHostKeyException):
            return (
                f"{name} shows another host key than ~/.ssh/known_hosts has; if the board was installed anew, "
                f"run ssh-keygen -R for it and ssh{port} {there} once"
            )
        text = _reason(problem)
        if "not found in known_hosts" in text:
            return f"{name} has a host key that is not known; compare and accept it with: ssh{port} {there}"
        if isinstance(problem, socket.gaierror):
            return f"{name}: no such host ({problem.strerror}); check the name, or add it to ~/.ssh/config"
        if isinstance(problem, (TimeoutError, socket.timeout)):
            return f"{name} does not answer within {_CONNECT_S:.0f} s; is the board on, and on this network?"
        if isinstance(problem, OSError) and not isinstance(problem, paramiko.SSHException):
            return f"{there}{port}: no connection ({text}); is sshd running there?"
        return f"{there}{port}: no connection ({text})"

    # ---- commands ----------------------------------------------------------------------------------------------------
    def run(self, argv: Sequence[str], *, timeout: float = 60.0) -> Ran:
        """Run a program and wait for it."""
        return self._run(shlex.join(argv), timeout)

    def run_watched(self, argv: Sequence[str], *, timeout: float, env: Mapping[str, str] | None = None) -> Ran:
        """Run a program that ends with the connection, whatever happens to it."""
        values = {"argv": list(argv), "env": dict(env or {}), "timeout": timeout}
        return self._run(self._asking, timeout + 60, _question("watch", values))

    def ask(self, question: str, **values: Any) -> Any:
        """What deploy_agent.py answers. DeployError: what the board's system says against it."""
        ran = self._run(self._asking, _QUESTION_S, _question(question, values))
        try:
            told = plain(json.loads(ran.output.strip().splitlines()[-1]))
        except (ValueError, IndexError):
            raise DeployError(f"{self.host}: {self.python} failed at {question}: {ran.last_words}") from None
        if "problem" in told:
            raise DeployError(f"{self.host}: {told['path'] or question}: {told['problem']}")
        return told.get("answer")

    def hold(self, root: str, at_end: Sequence[str] = ()) -> None:
        """Keep other deployments away while this connection lives; at its end the board runs a command by itself.

        DeployError: another one is at work.
        """
        with self.mapped():
            channel = self._connection.transport.open_session(timeout=_CONNECT_S)
            channel.settimeout(_QUESTION_S)
            channel.exec_command(self._asking)
            _send(channel, _question("hold", {"root": root, "at_end": list(at_end)}))
            line = channel.makefile("r").readline()
        told = plain(json.loads(line)) if line else {}
        if "busy" in told:
            raise DeployError(f"{self.host}: another deployment is at work ({told['busy']}); wait for it to end")
        if not told:
            errors = plain(channel.makefile_stderr("rb").read().decode(errors="replace")).strip().splitlines()
            raise DeployError(f"{self.host}: {root} cannot be used: {errors[-1] if errors else 'no answer'}")
        self._held = channel

    @property
    def _asking(self) -> str:
        """The command that a question is sent to."""
        return shlex.join([self.python, "-I", "-c", _ASK])

    def _run(self, command: str, timeout: float, said: bytes = b"") -> Ran:
        began = time.monotonic()
        output, errors = bytearray(), bytearray()
        with self.mapped(), contextlib.closing(self._connection.transport.open_session(timeout=_CONNECT_S)) as channel:
            channel.settimeout(timeout)
            channel.exec_command(command)
            reader = threading.Thread(target=_drain, args=(channel.recv_stderr, errors), daemon=True)
            reader.start()
            _send(channel, said)

            def receive(n_bytes: int) -> bytes:
                channel.settimeout(max(began + timeout - time.monotonic(), 0.01))
                return bytes(channel.recv(n_bytes))

            _keep_last(receive, output)
            reader.join(max(began + timeout - time.monotonic(), 0.01))
            if not channel.status_event.wait(
                max(began + timeout - time.monotonic(), 0.01)
            ):  # a lost connection sets it
                raise TimeoutError
            status = channel.exit_status
        if status == -1 and not self.alive:  # else a signal ended it
            raise self._lost("the connection was lost")
        text, wrong = (plain(part[-_MOST_OUTPUT:].decode(errors="replace")) for part in (output, errors))
        return Ran(status, text, wrong, time.monotonic() - began)

    # ---- files -------------------------------------------------------------------------------------------------------
    @property
    def sftp(self) -> paramiko.SFTPClient:
        """For copying."""
        if self._sftp is None:
            with self.mapped():
                self._sftp = self._connection.sftp()
        return self._sftp

    @contextlib.contextmanager
    def mapped(self) -> Iterator[None]:
        """Give a lost connection its name; OSErrors of the board's own pass."""
        try:
            yield
        except DeployError:
            raise
        except TimeoutError as problem:
            raise self._lost("the board no longer answers") from problem
        except (EOFError, paramiko.SSHException, ConnectionError) as problem:
            raise self._lost("the connection was lost") from problem
        except OSError as problem:
            if self.alive:
                raise
            raise self._lost("the connection was lost") from problem

    @property
    def alive(self) -> bool:
        """Whether the connection stands, as far as is known here."""
        transport = self._connection.transport
        return transport is not None and transport.is_active()

    def _lost(self, what: str) -> LostConnectionError:
        return LostConnectionError(
            f"{self.host}: {what}; what was begun there ends by itself, and what is in use there is as it was: "
            "run the same command again, it goes on where it was"
        )


def _question(question: str, values: Mapping[str, Any]) -> bytes:
    """The line for the board's Python: ASCII, whatever its locale."""
    return json.dumps([_SOURCE, question, values]).encode() + b"\n"


def _send(channel: paramiko.Channel, said: bytes) -> None:
    """Give a command its input. TimeoutError: it does not take it."""
    try:
        channel.sendall(said)
    except TimeoutError:
        raise
    except OSError:  # it ended before: what it said, or the connection's loss, is told by who reads
        pass


def _drain(receive: Callable[[int], bytes], into: bytearray) -> None:
    with contextlib.suppress(Exception):  # the other reader tells
        _keep_last(receive, into)


def _keep_last(receive: Callable[[int], bytes], into: bytearray) -> None:
    """Read all, for what is not read stops who writes it, and keep the end."""
    while piece := receive(1 << 16):
        into += piece
        if len(into) > 2 * _MOST_OUTPUT:
            del into[:-_MOST_OUTPUT]


def _connection(host: str) -> fabric.Connection:
    """Not open yet. DeployError: it names no host, or a port that is none, here or in ~/.ssh/config."""
    address = host.rpartition("@")[2]
    name, colon, port = address.partition(":") if address.count(":") == 1 else (address, "", "")  # more: IPv6
    if not name.strip():
        raise DeployError(f"HOST {host!r} names no host; write a name of ~/.ssh/config, or user@address:port")
    if colon and not _is_port(port):
        raise DeployError(f"HOST {host!r}: {port!r} is no port; write one of 1 to {_MOST_PORT}, or none")
    try:
        connection = fabric.Connection(host, connect_timeout=int(_CONNECT_S))
    except Exception as problem:  # whatever fabric makes of a setting that it cannot read
        raise DeployError(f"{host}: what ~/.ssh/config says of it cannot be used: {_reason(problem)}") from problem
    for hop in _hops(connection):
        if isinstance(hop.gateway, fabric.Connection) and hop.gateway.original_host.lower() == "none":
            hop.gateway = None  # as ssh has it: no jump host, whatever another part of the file says
        if not _is_port(str(hop.port)):
            raise DeployError(
                f"{host}: ~/.ssh/config gives {hop.original_host} port {hop.port}; the most is {_MOST_PORT}"
            )
    return connection


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= _MOST_PORT


def _reason(problem: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(problem, paramiko.ssh_exception.NoValidConnectionsError):  # of each address; its own has no words
        problem = next(iter(problem.errors.values()))
    text = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
    return " ".join(plain(text).split()) or type(problem).__name__


def _hops(connection: fabric.Connection) -> Iterator[fabric.Connection]:
    """The board's connection, then those that it goes through, the nearest last."""
    hop = connection
    while isinstance(hop, fabric.Connection):
        yield hop
        hop = hop.gateway
