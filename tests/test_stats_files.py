"""The statistics of a checkpoint: a piece at a time, as of the whole, and refused where the file is not whole."""

import csv
import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import stats
from qjax.stats import _files
from qjax.stats.__main__ import main

safetensors = pytest.importorskip("safetensors.numpy")

RNG = np.random.default_rng(0)
TENSORS = {
    "bias": RNG.normal(size=1000).astype(np.float32),
    "cube": RNG.normal(size=(3, 70, 48)).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 32), np.float32),
    "half": RNG.normal(size=(40, 64)).astype(np.float16),
    "scale": np.array(3.5, np.float32),
    "weight": RNG.normal(size=(130, 160)).astype(np.float32),
    "wide": RNG.normal(size=(2, 2048)).astype(np.float32),
}


@pytest.fixture
def path(tmp_path):
    safetensors.save_file(TENSORS | {"ids": np.arange(5)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "e4m3_16x32", "uint8_tensor"])
def test_pieces_are_the_whole(path, fmt, monkeypatch):
    whole = {name: stats.measure(TENSORS[name], fmt, saturate=True) for name in ("cube", "wide")}
    pattern = "|".join(whole)
    monkeypatch.setattr(_files, "PIECE", 600)
    found = stats.measure_file(path, [fmt], tensors=pattern)
    assert {name for name, _ in found} == set(whole)
    for name, expected in whole.items():
        for field in ("counts", "magnitudes", "errors"):
            assert np.array_equal(getattr(found[name, fmt], field), getattr(expected, field)), (name, field)


def test_large_tensors_are_never_read_whole(path, monkeypatch):
    read = []

    class File:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    real = _files.opened

    @_files.contextlib.contextmanager
    def opened(caller, path):
        with real(caller, path) as file:
            yield File(file)

    monkeypatch.setattr(_files, "opened", opened)
    monkeypatch.setattr(_files, "PIECE", 2000)
    stats.measure_file(path, ["e4m3", "e4m3_tensor"])
    assert set(read) == {"bias", "empty", "scale"}


def test_pieces_cover_an_array_once_and_are_small():
    for shape, rows, columns in [
        ((7,), 1, 1),
        ((100_000_000,), 1, 32),
        ((5, 9_000_001), 4, 128),
        ((3, 2000, 3000), 128, 128),
    ]:
        cells = 0
        for piece in _files.pieces(shape, rows, columns):
            lengths = [s.stop - s.start for s in piece]
            cells += int(np.prod(lengths))
            assert np.prod(lengths) <= _files.PIECE
            assert all(s.start % unit == 0 for s, unit in zip(piece[::-1], (columns, rows), strict=False))
        assert cells == np.prod(shape)


def test_float64_tensors_are_measured_in_float64(tmp_path):
    x = np.ldexp(1.0, [-600, 600, 0])
    safetensors.save_file({"x": x}, tmp_path / "x.safetensors")
    found = stats.measure_file(tmp_path / "x.safetensors", ["fp32"])["x", "fp32"]
    assert found.exponents[0][[0, -1]].tolist() == [-600, 600] and found.count("underflows") == 1


def test_the_command_prints_a_table(path, tmp_path, capsys):
    main([str(path), "--formats", "e4m3,int8_tensor", "--tensors", "weight|bias", "--csv", str(tmp_path / "out.csv")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip() for line in lines[2:]] == ["bias", "bias", "weight", "weight"]
    assert lines[4].split(" | ")[1:3] == ["130x160", "e4m3       "]
    with open(tmp_path / "out.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[2]["sqnr"]) == stats.measure(TENSORS["weight"], "e4m3").sqnr


def test_the_command_runs_as_a_module(path):
    run = subprocess.run(
        [sys.executable, "-m", "qjax.stats", str(path), "--formats", "e4m3", "--tensors", "scale"],
        capture_output=True,
        check=True,
        text=True,
    )
    assert run.stdout.splitlines()[2].startswith("scale  | scalar | e4m3   | inf")
    assert run.stderr == ""


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


FOREIGN = {
    "a pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.",
    "nothing": b"",
    "a zip": b"PK\x03\x04" + bytes(100),
    "tensors beyond the end": header(
        json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    ),
}


@pytest.mark.parametrize("kind", [*FOREIGN, "truncated"])
def test_foreign_and_truncated_files_are_refused(kind, path, tmp_path, capsys):
    other = tmp_path / "other"
    other.write_bytes(FOREIGN[kind] if kind in FOREIGN else path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"measure_file: '.*other' is truncated or no safetensors file \(.*\)"):
        stats.measure_file(other, ["e4m3"])
    with pytest.raises(SystemExit) as stop:
        main([str(other)])
    assert stop.value.code == 2 and "is truncated or no safetensors file" in capsys.readouterr().err


def test_refusals(path, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="measure_file: there is no file"):
        stats.measure_file(tmp_path / "none", ["e4m3"])
    with pytest.raises(
        ValueError, match=r"measure_file: no tensor of .* matches 'ids'; it has 8 tensors .* of BF16, F16"
    ):
        stats.measure_file(path, ["e4m3"], tensors="ids")
    with pytest.raises(ValueError, match="format: unknown name 'mxfp5'"):
        stats.measure_file(path, ["mxfp5"])
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs the package safetensors; pip install 'qjax\[checkpoints\]'"):
        stats.measure_file(path, ["e4m3"])


def test_the_scale_of_a_tensor_is_that_of_its_largest_element():
    fmt, x = qjax.format("nvfp4"), TENSORS["weight"]
    scale = qjax.decode(qjax.encode(np.max(np.abs(x)), fmt).scales[0])
    assert np.array_equal(qjax.chop(x, fmt), qjax.chop(x, fmt, scale=scale))
    assert isinstance(scale, jax.Array) and scale.shape == ()
