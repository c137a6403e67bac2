"""The systemd service of a deployment: its unit with limits, and the commands that put it in place, as data.

Where the edgert that is installed can serve, the service serves; where it cannot yet, it readies the model at boot.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from deploy_board import MIB, DeployError, Facts

NAME = "edgert.service"
SCOPES = ("auto", "system", "user", "none")
_STARTING_S = 900


@dataclass(frozen=True)
class Unit:
    """What the unit says. root: of the deployment; release: its folder; memory: bytes; cpus: None for all."""

    release: str
    model: str
    user: str
    memory: int
    context: int | None
    cpus: int | None
    serves: bool

    @property
    def options(self) -> list[str]:
        """Of edgert, as warm-up, bench and service get them."""
        context = [] if self.context is None else ["--context", str(self.context)]
        return ["--memory", f"{self.memory // MIB}MiB", *context]

    def text(self, scope: str) -> str:
        """The unit file. MemoryMax counts the page cache, and so does edgert's own --memory: they are equal."""
        verb = "serve" if self.serves else "warmup"
        kind = ["Type=exec"] if self.serves else ["Type=oneshot", "RemainAfterExit=yes"]
        command = [f"{self.release}/env/bin/edgert", verb, f"{self.release}/model.edge", *self.options]
        lines = [
            "[Unit]",
            f"Description=edgert: {'serve' if self.serves else 'ready'} {_plain(self.model)}",
            "After=network.target",
            "StartLimitIntervalSec=600",
            "StartLimitBurst=5",
            "",
            "[Service]",
            *kind,
            *([f"User={self.user}"] if scope == "system" else []),
            f"ExecStart={_quoted(command[0], program=True)} {' '.join(map(_quoted, command[1:]))}",
            f"TimeoutStartSec={_STARTING_S}",
            f"MemoryMax={self.memory // MIB}M",
            "MemorySwapMax=0",
            "CPUWeight=50",
            *([] if self.cpus is None else [f"CPUQuota={100 * self.cpus}%"]),
            "TasksMax=512",
            "Restart=on-failure",
            "RestartSec=10",
            "NoNewPrivileges=yes",
            "",
            "[Install]",
            f"WantedBy={'multi-user' if scope == 'system' else 'default'}.target",
            "",
        ]
        return "\n".join(lines)


def choose_scope(asked: str, facts: Facts) -> str:
    """system, user or none. DeployError: what was asked for cannot be."""
    if asked == "none":
        return asked
    if not facts.systemctl:
        if asked != "auto":
            raise DeployError(f"--service {asked}: the board has no systemd; use --service none")
        return "none"
    if asked == "system" and not facts.sudo:
        raise DeployError(
            "--service system needs sudo without a password on the board; allow it, or use --service user, which "
            "starts at boot after: sudo loginctl enable-linger"
        )
    if asked != "auto":
        return asked
    return "system" if facts.sudo else "user"


def check_folder(scope: str, root: str) -> None:
    """DeployError: systemd starts no program from such a folder, however it is written."""
    if scope != "none" and (odd := re.search(r"[\x00-\x1f\x7f\"'\\]", root)):
        raise DeployError(
            f"--folder {root!r}: systemd starts no program whose path has {odd[0]!r} in it; name another --folder, or "
            "use --service none"
        )


def unit_path(scope: str, facts: Facts) -> str:
    """Where systemd looks for the unit."""
    return f"/etc/systemd/system/{NAME}" if scope == "system" else f"{facts.home}/.config/systemd/user/{NAME}"


def _systemctl(scope: str, facts: Facts) -> list[str]:
    """The command in front of its verbs; where systemd does not run it only writes links."""
    sudo = ["sudo", "-n"] if scope == "system" and facts.uid != 0 else []
    running = facts.systemd if scope == "system" else facts.session
    user = ["--user"] if scope == "user" else []
    env = ["env", f"XDG_RUNTIME_DIR=/run/user/{facts.uid}"] if scope == "user" else ["env"] if not running else []
    return [*sudo, *env, *([] if running else ["SYSTEMD_OFFLINE=1"]), "systemctl", *user]


def install_commands(scope: str, facts: Facts, source: str) -> list[list[str]]:
    """What puts a unit file in place and starts it; each is harmless when repeated."""
    sudo = ["sudo", "-n"] if scope == "system" and facts.uid != 0 else []
    systemctl = _systemctl(scope, facts)
    commands = [
        [*sudo, "install", "-D", "-m", "644", source, unit_path(scope, facts)],
        [*systemctl, "enable", NAME],
    ]
    if is_running(scope, facts):
        commands[1:1] = [[*systemctl, "daemon-reload"]]
        commands += [[*systemctl, "reset-failed", NAME], [*systemctl, "restart", NAME]]
    return commands


def remove_commands(scope: str, facts: Facts) -> list[list[str]]:
    """What takes a service away: as after a first deployment that failed."""
    sudo = ["sudo", "-n"] if scope == "system" and facts.uid != 0 else []
    systemctl = _systemctl(scope, facts)
    running = is_running(scope, facts)
    return [
        [*systemctl, "disable", *(["--now"] if running else []), NAME],
        [*sudo, "rm", "-f", unit_path(scope, facts)],
        *([[*systemctl, "daemon-reload"]] if running else []),
    ]


def start_command(scope: str, facts: Facts) -> list[str]:
    """Starts the service if it does not run."""
    return [*_systemctl(scope, facts), "start", NAME]


def stop_command(scope: str, facts: Facts) -> list[str]:
    """Stops the service until it is started."""
    return [*_systemctl(scope, facts), "stop", NAME]


def active_command(scope: str, facts: Facts) -> list[str]:
    """Says active or not."""
    return [*_systemctl(scope, facts), "is-active", NAME]


def enabled_command(scope: str, facts: Facts) -> list[str]:
    """Says enabled or not."""
    return [*_systemctl(scope, facts), "is-enabled", NAME]


def is_running(scope: str, facts: Facts) -> bool:
    """Whether there is a systemd that can start the service now."""
    return facts.systemd if scope == "system" else facts.session if scope == "user" else False


def shown(command: list[str]) -> str:
    """For a person."""
    return shlex.join(command)


def _quoted(word: str, *, program: bool = False) -> str:
    """A word of ExecStart, as systemd.service(5) and systemd.syntax(7) have it read.

    systemd expands % everywhere and $ in all but the program's path; it splits at blanks, and reads quotes and
    backslashes as C does.
    """
    word = word.replace("%", "%%") if program else word.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[^\s\x00-\x1f\x7f\"'\\;]+", word):
        return word
    word = word.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda odd: f"\\x{ord(odd[0]):02x}", word) + '"'


def _plain(text: str) -> str:
    return "".join(character for character in text if character.isprintable()).replace("%", "%%")[:80]
