"""What an Orin Nano answers to the questions that deploying asks of a board."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("fabric", reason="fabric is not installed: pip install edgert[deploy]")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from deploy_board import read_facts

# As an Orin Nano answers with JetPack 6.2, shortened.
ORIN = """
@@ system
Linux

@@ machine
aarch64

@@ bits
64

@@ release
# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025
# KERNEL_VARIANT: oot

@@ model
NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0
@@ os
Ubuntu 22.04.5 LTS

@@ glibc
glibc 2.35

@@ pythons
3.10 /usr/bin/python3
3.10 /usr/bin/python3.10
3.12 /usr/local/bin/python3.12

@@ memory
MemTotal:        7802880 kB
MemFree:         4188620 kB
MemAvailable:    6229000 kB

@@ cores
6

@@ home
/home/jetson

@@ user
jetson

@@ uid
1000

@@ flash
Filesystem     1024-blocks     Used Available Capacity Mounted on
/dev/nvme0n1p1   238737052 61000000 165000000      27% /

@@ power
NV Power Mode: 15W
0

@@ modes
< POWER_MODEL ID=0 NAME=15W >
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >

@@ sudo

@@ systemd
/usr/bin/systemctl
running

@@ session
yes

@@ end
"""
BOARD = read_facts(ORIN)
