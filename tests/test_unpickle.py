"""Untrusted pickles: arrays of every NumPy version and pickle protocol are read, and no code is executed."""

import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from genseg.errors import UserError
from genseg.interchange.unpickle import read_array, read_dict

HEADER = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("unpickle") / "x.npy"


def save(path, payload, protocol=4):
    """`np.save(path, payload)` with a chosen protocol."""
    holder = np.empty((), object)
    holder[()] = payload
    path.write_bytes(HEADER + pickle.dumps(holder, protocol=protocol))


numbers = hnp.arrays(
    st.sampled_from(["<f2", ">f4", "<f8", "<i8", ">i4", "u1", "?"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=5), numbers, max_size=3), st.integers(0, 5), st.booleans(), st.booleans())
def test_arrays_of_every_protocol_order_and_numpy_version_are_read_unchanged(file, arrays, protocol, fortran, old_names):
    arrays = {key: np.asfortranarray(value) if fortran else value for key, value in arrays.items()}
    save(file, arrays, protocol)
    if old_names and protocol < 4:  # later protocols prefix names with their length
        file.write_bytes(file.read_bytes().replace(b"numpy._core", b"numpy.core"))
    loaded = read_dict(file)
    assert list(loaded) == list(arrays)
    for key, value in arrays.items():
        np.testing.assert_array_equal(loaded[key], value)
        assert loaded[key].dtype == value.dtype


def test_scalars_lists_and_arrays_are_read_as_by_numpy(file):
    np.save(
        file, {"keys": [3, 1], "cam": np.arange(6.0).reshape(1, 2, 3), "score": np.float32(0.5), "n": 2, "flag": (True, False)}
    )
    expected = np.load(file, allow_pickle=True).item()
    for key, value in read_dict(file).items():
        np.testing.assert_array_equal(value, expected[key])


def test_arrays_that_python_2_wrote_as_str_are_read(file):
    raw = np.array([7, 200], "<i8").tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x02\x85cnumpy\ndtype\n"
        b"(U\x02i8K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", len(raw)) + raw
    )
    holder = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01)cnumpy\ndtype\n"
        b"(U\x02O8K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89](}U\x04keys" + array + b"tbs" + b"etb."
    )
    file.write_bytes(HEADER + holder)
    assert np.load(file, allow_pickle=True, encoding="latin1").item()["keys"].tolist() == [7, 200]  # NumPy reads the pickle
    assert read_dict(file)["keys"].tolist() == [7, 200]


def test_torch_tensors_in_a_dict_of_irn_are_read_as_arrays(file):
    whole = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    payload = {"keys": torch.tensor([4, 2]), "cam": whole[:, 1:, ::2].transpose(1, 2), "high_res": whole.half().numpy()}
    np.save(file, payload)
    loaded = read_dict(file)
    for key, value in payload.items():
        np.testing.assert_array_equal(loaded[key], np.asarray(value))


class Call:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attack(name, mark):
    import builtins
    import os

    import numpy.lib.format

    return {
        "system": Call(os.system, f"touch {mark}"),
        "eval": Call(eval, f"open({str(mark)!r}, 'w')"),
        "getattr": Call(builtins.getattr, "text", "upper"),
        "np.save": Call(np.save, str(mark), 1),
        "np.memmap": Call(numpy.lib.format.open_memmap, str(mark), "w+", "f4", (1,)),
        "object array": np.array([Call(os.system, f"touch {mark}")], object),
        "torch's storage": Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, f"touch {mark}"))),
        "list of objects": [np.array([None], object)],
        "text": "text",
        "record": np.zeros(1, [("a", "f4")]),
    }[name]


ATTACKS = [
    "system",
    "eval",
    "getattr",
    "np.save",
    "np.memmap",
    "object array",
    "torch's storage",
    "list of objects",
    "text",
    "record",
]


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_other_than_arrays_are_refused_and_not_executed(tmp_path, name, protocol):
    file, mark = tmp_path / "x.npy", tmp_path / "executed"
    save(file, {"keys": np.arange(2), "cam": attack(name, mark)}, protocol)
    with pytest.raises(UserError, match=r"x\.npy") as caught:
        read_dict(file)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("executed*"))


@pytest.mark.parametrize(
    "program",
    {
        "sets an attribute of a function": b"cnumpy\ndtype\n(N}U\x09_functionK\x01stb.",
        "sets the state of a function": b"cnumpy\ndtype\n}U\x01aK\x01sb.",
        "persistent object": b"U\x01aQ.",
        "tensor beyond its storage": None,
    }.items(),
    ids=lambda item: item[0],
)
def test_handwritten_programs_are_refused(file, program):
    _, code = program
    if code is None:
        storage = torch.zeros(4).untyped_storage()
        code = pickle.dumps(
            {
                "a": Call(
                    torch._utils._rebuild_tensor_v2,
                    torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True),
                    0,
                    (2, 4),
                    (4, 1),
                    False,
                    OrderedDict(),
                )
            },
            protocol=2,
        )[2:]
    file.write_bytes(HEADER + b"\x80\x02" + code)
    with pytest.raises(UserError, match="refused"):
        read_dict(file)
    save(file, {"keys": np.arange(3)})
    assert read_dict(file)["keys"].tolist() == [0, 1, 2]  # the program did not change the reader


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_give_a_dict_or_a_one_line_error(file, data):
    save(file, {"keys": np.arange(3), "cam": np.ones((3, 2, 2), np.float16)}, data.draw(st.sampled_from([2, 3, 4, 5])))
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        assert isinstance(read_dict(file), dict)
    except UserError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def test_plain_arrays_and_archives_of_one_array_are_read(tmp_path):
    values = np.arange(6.0).reshape(1, 2, 3)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "b.npz", logits=values)
    np.savez(tmp_path / "two.npz", a=values, b=values)
    np.save(tmp_path / "objects.npy", {"a": values})
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:-30])
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy"), values)
    np.testing.assert_array_equal(read_array(tmp_path / "b.npz"), values)
    for name in ("two.npz", "objects.npy", "cut.npy", "cut.npz", "none.npy"):
        with pytest.raises(UserError, match=name):
            read_array(tmp_path / name)
    with pytest.raises(UserError, match=r"a\.npy: expected a dict"):
        read_dict(tmp_path / "a.npy")
    with pytest.raises(UserError, match=r"none\.npy: no such file"):
        read_dict(tmp_path / "none.npy")


def test_list_of_arrays_is_read_as_one_array(tmp_path):
    maps = np.arange(12, dtype="f4").reshape(2, 3, 2)
    save(tmp_path / "x.npy", {"high_res": list(maps), "keys": list(np.array([4, 7]))})
    loaded = read_dict(tmp_path / "x.npy")
    np.testing.assert_array_equal(loaded["high_res"], maps)
    np.testing.assert_array_equal(loaded["keys"], [4, 7])


def test_small_files_cannot_allocate_large_arrays(tmp_path):
    nested = [0.0, 1.0]
    for _ in range(60):
        nested = [nested, nested]
    save(tmp_path / "x.npy", {"keys": nested})
    with pytest.raises(UserError, match="lists of objects other than"):
        read_dict(tmp_path / "x.npy")
    save(tmp_path / "x.npy", {"keys": {"more": np.zeros(1)}})
    with pytest.raises(UserError, match="dict instead of an array"):
        read_dict(tmp_path / "x.npy")
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (12, 1000000, 1000000), }".ljust(117) + b"\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + header + bytes(100))
    with pytest.raises(UserError, match="not a NumPy array"):
        read_array(tmp_path / "x.npy")
