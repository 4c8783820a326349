"""The fixtures of conftest.py bite: each is given a test that does what it forbids."""

import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FORBIDDEN = """
import random, socket
import numpy as np, pytest, torch

def test_reaches_out():
    socket.create_connection(("192.0.2.1", 80), timeout=1)

def test_reaches_out_without_raising():
    socket.socket().connect_ex(("192.0.2.1", 80))

@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("use", [lambda: torch.rand(1), lambda: np.random.rand(1), random.random])
def test_draws(use):
    use()

@pytest.mark.usefixtures("global_rng_untouched")
def test_draws_from_its_own():
    np.random.default_rng(0).random()

def test_data(data_root): pass

def test_weights(weights_dir): pass
"""


def test_forbidden_things_fail(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_forbidden.py").write_text(FORBIDDEN)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTOPRUNE_TEST_")}
    environment["AUTOPRUNE_TEST_WEIGHTS"] = str(tmp_path / "nowhere")
    command = [sys.executable, "-m", "pytest", "--rootdir", tmp_path, "-rsfE", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "2 failed, 4 passed, 2 skipped, 3 errors" in run.stdout
    assert run.stdout.count("NetworkBlockedError: tests stay on this machine") >= 2
    for name in ("torch", "numpy", "random"):
        assert f"Failed: global generators were used: {name}\n" in run.stdout
    assert "AUTOPRUNE_TEST_DATA is not set" in run.stdout
    assert "which is no folder" in run.stdout


def test_a_folder_of_its_own_and_a_clean_environment(tmp_path):
    assert Path.cwd() == tmp_path
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert not [name for name in os.environ if name.startswith("AUTOPRUNE_") and "_TEST_" not in name]


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


@pytest.mark.usefixtures("global_rng_untouched")
def test_a_generator_of_its_own_is_free():
    torch.rand(1, generator=torch.Generator().manual_seed(0))
    np.random.default_rng(0).random()
    random.Random(0).random()
