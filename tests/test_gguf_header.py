"""The header parser must read what gguf's own reader reads, and refuse what it cannot trust without any other error."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from conftest import KINDS, build_mix
from moegguf.errors import UserError
from moegguf.gguf_header import is_gguf, read_header

TYPES = GGUFValueType
SCALARS = {
    "u8": (200, TYPES.UINT8), "i8": (-100, TYPES.INT8), "u16": (60000, TYPES.UINT16), "i16": (-30000, TYPES.INT16),
    "u32": (2**32 - 1, TYPES.UINT32), "i32": (-(2**31), TYPES.INT32), "f32": (0.5, TYPES.FLOAT32),
    "u64": (2**64 - 1, TYPES.UINT64), "i64": (-(2**63), TYPES.INT64), "f64": (0.1, TYPES.FLOAT64),
    "yes": (True, TYPES.BOOL), "no": (False, TYPES.BOOL), "text": ("grüße\n", TYPES.STRING), "": ("", TYPES.STRING),
}  # fmt: skip
ARRAYS = {
    "words": (["", "a", "łódź"], TYPES.STRING),
    "numbers": ([-1, 0, 2**31 - 1], TYPES.INT32),
    "large": ([2**63], TYPES.UINT64),
    "halves": ([0.5, -0.25], TYPES.FLOAT32),
    "bytes": ([0, 255], TYPES.UINT8),
    "flags": ([True, False, True], TYPES.BOOL),
}


def write_small(path: Path, alignment: int = 32) -> Path:
    """A file with every type of value, and tensors of one to four dimensions."""
    writer = GGUFWriter(path, "test")
    writer.add_custom_alignment(alignment)
    for key, (value, type) in SCALARS.items():
        writer.add_key_value(f"test.{key}", value, type)
    for key, (values, type) in ARRAYS.items():
        writer.add_key_value(f"test.{key}", values, TYPES.ARRAY, type)
    for n_dims in (1, 2, 3, 4):
        shape = (2, 3, 4, 5)[-n_dims:]
        writer.add_tensor(f"tensor.{n_dims}", np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    return write_small(tmp_path_factory.mktemp("header") / "small.gguf").read_bytes()


def assert_equal_to_ggufs_reader(path: Path) -> None:
    reader, header = GGUFReader(path), read_header(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert set(header.fields) == set(fields)
    for name, field in fields.items():
        value = header.value(name)
        assert value.value == field.contents(), name
        assert [value.type] + [value.sub_type] * (value.type == TYPES.ARRAY) == field.types[:2], name
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert (info.type, info.offset, info.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert info.shape == tuple(reversed(tensor.shape.tolist()))


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_every_type_of_value_is_read_as_gguf_reads_it(alignment: int, tmp_path: Path):
    path = write_small(tmp_path / "small.gguf", alignment)
    assert_equal_to_ggufs_reader(path)
    header = read_header(path)
    for key, (value, _) in (SCALARS | ARRAYS).items():
        assert header.get(f"test.{key}") == value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant", ["F32", "Q4_K_M"])
def test_models_are_read_as_gguf_reads_them(kind: str, quant: str, family, tmp_path: Path):
    models = family(kind)
    assert_equal_to_ggufs_reader(build_mix(tmp_path / "mix.gguf", models.base, models.experts, quant=quant))


def test_strings_that_are_no_utf8_keep_their_bytes(small: bytes, tmp_path: Path):
    """Vocabularies hold pieces of characters."""
    path = tmp_path / "bytes.gguf"
    path.write_bytes(small.replace("łódź".encode(), b"\xff\xfe\x80lodz"))
    assert read_header(path).get("test.words") == ["", "a", b"\xff\xfe\x80lodz"]


def test_absent_keys_have_the_default(small: bytes, tmp_path: Path):
    path = tmp_path / "small.gguf"
    path.write_bytes(small)
    header = read_header(path)
    assert header.get("test.absent") is None
    assert header.get("test.absent", 3) == 3
    with pytest.raises(KeyError):
        header.value("test.absent")


def test_a_gguf_is_known_by_its_magic(small: bytes, tmp_path: Path):
    (tmp_path / "a").write_bytes(small)
    (tmp_path / "b").write_bytes(b"PK\x03\x04" + small)
    (tmp_path / "c").write_bytes(b"")
    assert [is_gguf(tmp_path / name) for name in "abc"] == [True, False, False]


def test_a_file_cut_anywhere_is_refused(small: bytes, tmp_path: Path):
    path = tmp_path / "cut.gguf"
    last = read_header(write_small(tmp_path / "whole.gguf")).tensors["tensor.4"]
    for size in [*range(0, last.offset, 7), last.offset, last.offset + last.nbytes - 1]:
        path.write_bytes(small[:size])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            read_header(path)


def test_damaged_bytes_give_a_header_or_a_user_error_and_nothing_else(small: bytes, tmp_path: Path):
    path = tmp_path / "damaged.gguf"
    random = np.random.RandomState(0)
    header_size = read_header(write_small(tmp_path / "whole.gguf")).tensors["tensor.1"].offset
    refused = 0
    for _ in range(600):
        damaged = bytearray(small)
        for at in random.randint(header_size, size=random.randint(1, 4)):
            damaged[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.randint(256)])
        path.write_bytes(damaged)
        try:
            header = read_header(path)
            for key in header.fields:
                header.get(key)
        except UserError:
            refused += 1
            continue
        assert all(0 < info.offset + info.nbytes <= len(small) for info in header.tensors.values())
    assert 100 < refused < 600


def put(fmt: str, at: int, value: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        struct.pack_into(fmt, data, at, value)

    return change


def put_after(needle: bytes, fmt: str, value: int, skip: int = 0) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        struct.pack_into(fmt, data, data.index(needle) + len(needle) + skip, value)

    return change


LIES = {
    "version": (put("<I", 4, 9), "version 9"),
    "tensor count": (put("<Q", 8, 2**60), "tensor count"),
    "metadata count": (put("<Q", 16, 2**60), "metadata count"),
    "length of a key": (put("<Q", 24, 2**63), "claims"),
    "type of a value": (put_after(b"test.u32", "<I", 77), "unknown type id 77"),
    "length of a string": (put_after(b"test.text", "<Q", 2**40, 4), "claims"),
    "length of an array": (put_after(b"test.numbers", "<Q", 2**61, 8), "claims"),
    "count of strings": (put_after(b"test.words", "<Q", 2**61, 8), "test.words"),
    "array of arrays": (put_after(b"test.numbers", "<I", 9, 4), "holds arrays"),
    "alignment of zero": (put_after(b"general.alignment", "<I", 0, 4), "alignment"),
    "alignment of 12": (put_after(b"general.alignment", "<I", 12, 4), "alignment"),
    "five dimensions": (put_after(b"tensor.4", "<I", 5), "5 dimensions"),
    "no dimensions": (put_after(b"tensor.1", "<I", 0), "0 dimensions"),
    "an empty dimension": (put_after(b"tensor.2", "<Q", 0, 4), "shape"),
    "a huge dimension": (put_after(b"tensor.2", "<Q", 2**62, 4), "should end at byte"),
    "type of a tensor": (put_after(b"tensor.1", "<I", 999, 12), "unknown type id 999"),
    "rows that are no whole blocks": (put_after(b"tensor.1", "<I", 12, 12), "Q4_K"),
    "offset past the end": (put_after(b"tensor.1", "<Q", 2**50, 16), "should end at byte"),
    "overlapping tensors": (put_after(b"tensor.2", "<Q", 0, 24), "overlap"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_with_its_lie(lie: str, small: bytes, tmp_path: Path):
    change, says = LIES[lie]
    data = bytearray(small)
    change(data)
    path = tmp_path / "lies.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError, match=says) as raised:
        read_header(path)
    assert str(path) in raised.value.message
    assert raised.value.mend


def test_a_name_that_occurs_twice_is_refused(small: bytes, tmp_path: Path):
    path = tmp_path / "twice.gguf"
    path.write_bytes(small.replace(b"tensor.2", b"tensor.1"))
    with pytest.raises(UserError, match="occur twice"):
        read_header(path)


def test_other_files_are_refused_by_what_they_are(tmp_path: Path):
    (tmp_path / "pickle.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="not a GGUF file"):
        read_header(tmp_path / "pickle.gguf")
    with pytest.raises(UserError, match="cannot be read"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(UserError, match="cannot be read"):
        read_header(tmp_path)
