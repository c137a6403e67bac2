"""The service on a board: its limits, folders that systemd reads as they were meant, and whose it is."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fabric", reason="fabric is not installed: pip install edgert[deploy]")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import deploy_service
from deploy_board import GIB, DeployError
from orin_nano import BOARD

UNIT = deploy_service.Unit("/home/j/b/current", "A model 100%", "jetson", 3 * GIB, 4096, 4, True)


def test_the_unit_has_its_limits() -> None:
    lines = UNIT.text("system").splitlines()
    command = "/home/j/b/current/env/bin/edgert serve /home/j/b/current/model.edge --memory 3072MiB --context 4096"
    for line in (f"ExecStart={command}", "User=jetson", "MemoryMax=3072M", "CPUQuota=400%", "Restart=on-failure"):
        assert line in lines
    assert "WantedBy=multi-user.target" in lines and "Description=edgert: serve A model 100%%" in lines
    user = replace(UNIT, cpus=None, serves=False, release="/home/a b/current").text("user")
    assert "User=" not in user and "CPUQuota" not in user and "WantedBy=default.target" in user
    assert 'ExecStart="/home/a b/current/env/bin/edgert" warmup' in user and "Type=oneshot" in user


def test_systemd_itself_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    import shutil

    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze")
    release = tmp_path / "a b 50%n $HOME/current"
    program = release / "env/bin/edgert"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for serves in (True, False):
        unit = replace(UNIT, release=str(release), user="root", serves=serves)
        path = tmp_path / deploy_service.NAME
        path.write_text(unit.text("system"))
        said = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
        assert "edgert.service" not in said.stderr, said.stderr


def words_of(line: str) -> list[str]:
    """How systemd.syntax(7) splits a line, and what systemd.service(5) expands in it."""
    words = []
    for quoted, bare in re.findall(r'"((?:[^"\\]|\\.)*)"(?=\s|$)|([^\s"\'\\]+)(?=\s|$)', line):
        word = re.sub(r"\\(x[0-9a-f]{2}|.)", lambda hit: chr(int(hit[1][1:], 16)) if hit[1][1:] else hit[1], quoted)
        word = (word or bare).replace("%%", "\0")
        assert "%" not in word
        word = word.replace("\0", "%")
        assert not words or not re.search(r"(?<!\$)(\$\$)*\$(?!\$)", word)
        words.append(word.replace("$$", "$") if words else word)
    return words


@given(st.text(st.sampled_from("ab/ \t\n'\"\\%$;x07"), max_size=12))
def test_systemd_reads_the_folder_that_was_meant(folder: str) -> None:
    release = f"/home/{folder}/current"
    (line,) = (line for line in replace(UNIT, release=release).text("user").split("\n") if "ExecStart" in line)
    assert words_of(line.removeprefix("ExecStart="))[:3] == [
        f"{release}/env/bin/edgert",
        "serve",
        f"{release}/model.edge",
    ]


def test_a_folder_that_systemd_starts_nothing_from_is_refused() -> None:
    for folder in ("/it's", '/a"b', "/a\tb", "/a\\b"):
        with pytest.raises(DeployError, match="name another --folder, or use --service none"):
            deploy_service.check_folder("user", folder)
        deploy_service.check_folder("none", folder)
    deploy_service.check_folder("user", "/a b/50%/$HOME/ü")


def test_whose_service_it_is() -> None:
    assert deploy_service.choose_scope("auto", BOARD) == "user"
    assert deploy_service.choose_scope("auto", replace(BOARD, sudo=True)) == "system"
    assert deploy_service.choose_scope("auto", replace(BOARD, systemctl=False)) == "none"
    with pytest.raises(DeployError, match="needs sudo without a password"):
        deploy_service.choose_scope("system", BOARD)
    with pytest.raises(DeployError, match="no systemd"):
        deploy_service.choose_scope("user", replace(BOARD, systemctl=False))


def test_commands_are_root_s_only_where_they_must() -> None:
    system = deploy_service.install_commands("system", replace(BOARD, sudo=True), "/b/edgert.service")
    assert all(command[:2] == ["sudo", "-n"] for command in system)
    assert system[0][2:] == ["install", "-D", "-m", "644", "/b/edgert.service", "/etc/systemd/system/edgert.service"]
    assert [command[-2] for command in system[2:]] == ["enable", "reset-failed", "restart"]
    chroot = deploy_service.install_commands("system", replace(BOARD, uid=0, sudo=True, systemd=False), "/u")
    assert chroot[1:] == [["env", "SYSTEMD_OFFLINE=1", "systemctl", "enable", "edgert.service"]]
    user = deploy_service.install_commands("user", BOARD, "/u")
    assert user[0][-1] == "/home/jetson/.config/systemd/user/edgert.service"
    assert ["env", "XDG_RUNTIME_DIR=/run/user/1000", "systemctl", "--user", "daemon-reload"] in user
