"""Files of tensors: what is in them, reading parts of them, and what is refused before it is read."""

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from palimpsest.dictionaries.formats import sources
from palimpsest.dictionaries.formats.base import Stored
from palimpsest.dictionaries.formats.sources import finite, open_tensors
from palimpsest.errors import DictionaryError

KINDS = ("safetensors", "npz", "packed", "torch")
ROWS, COLUMNS = 37, 11


def weights(seed=0):
    torch.manual_seed(seed)
    return {
        "W_dec": torch.randn(ROWS, COLUMNS),
        "W_enc": torch.randn(COLUMNS, ROWS).double(),
        "cross": torch.randn(ROWS, 2, COLUMNS).half(),
        "b_dec": torch.randn(COLUMNS),
        "k": torch.tensor(8),
        "fired": torch.arange(ROWS),
    }


def write(path, kind, tensors):
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "torch":
        torch.save(tensors, path)
    else:
        save = np.savez if kind == "npz" else np.savez_compressed
        with path.open("wb") as file:
            save(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    return path


def refusal(path, prefix=""):
    """The one paragraph with which a file is refused."""
    with pytest.raises(DictionaryError) as caught:
        open_tensors(path, prefix)
    text = str(caught.value)
    assert text.isprintable()
    assert path.name in text
    assert 30 < len(text) < 1000
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_everything_comes_back_whatever_the_name_of_the_file(tmp_path, kind):
    tensors = weights()
    file = open_tensors(write(tmp_path / "some.bin", kind, tensors))
    assert file.tensors == {name: Stored(tuple(one.shape), one.dtype) for name, one in tensors.items()}
    assert file.extras == {}
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor)
        assert file.read(name).dtype == tensor.dtype
    file.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 400, sources.BLOCK])
def test_some_latents_are_those_of_the_whole(tmp_path, monkeypatch, kind, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    tensors = weights(1)
    file = open_tensors(write(tmp_path / "w", kind, tensors))
    for latents in (
        torch.randint(ROWS, (25,)),
        torch.tensor([36, 0, 0, 5]),
        torch.zeros(0, dtype=torch.long),
    ):
        for name, axis in (("W_dec", 0), ("W_enc", 1), ("cross", 0), ("fired", 0)):
            part = file.read(name, axis, latents)
            assert torch.equal(part, tensors[name].index_select(axis, latents))
            assert part.dtype == tensors[name].dtype
    assert torch.equal(file.read("cross", 2, torch.tensor([7, 3])), tensors["cross"][:, :, [7, 3]])
    assert torch.equal(file.read("b_dec", 0), tensors["b_dec"])


@pytest.mark.parametrize("kind", ["safetensors", "npz", "torch"])
@pytest.mark.parametrize(("name", "axis"), [("W_dec", 0), ("W_dec", 1), ("W_enc", 0), ("cross", 1)])
def test_a_part_touches_no_more_than_a_block_at_a_time(tmp_path, monkeypatch, kind, name, axis):
    """Counted in the indices: the pages that one mapping touches lie within one block of the outer axis."""
    tensors = weights()
    file = open_tensors(write(tmp_path / "w", kind, tensors))
    shape, dtype = file.tensors[name]
    row = tensors[name][0].numel() * dtype.itemsize
    monkeypatch.setattr(sources, "BLOCK", 5 * row)
    seen = []
    inner = file._contents.part

    def part(stored, index):
        seen.append(torch.arange(shape[0])[index[0]].unique())
        return inner(stored, index)

    monkeypatch.setattr(file, "_contents", file._contents._replace(part=part))
    latents = torch.tensor([shape[axis] - 1, 0])
    assert torch.equal(file.read(name, axis, latents), tensors[name].index_select(axis, latents))
    assert all(int(rows.max() - rows.min()) < 5 for rows in seen)
    # Blocks without a latent are not even mapped.
    assert len(seen) == (2 if axis == 0 else -(-shape[0] // 5))


def test_arrays_in_fortran_order_and_transposed_tensors_keep_their_meaning(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 300)
    torch.manual_seed(0)
    tensor = torch.randn(ROWS, COLUMNS)
    for order, save in (("F", np.savez), ("F", np.savez_compressed), ("C", np.savez)):
        save(tmp_path / "w.npz", W=np.asarray(tensor.numpy(), order=order))
        check_both_axes(tmp_path / "w.npz", tensor)
    torch.save({"W": tensor.T.contiguous().T}, tmp_path / "w.pt")
    check_both_axes(tmp_path / "w.pt", tensor)
    # Blocks run along the axis that lies furthest apart, else each would touch the whole file.
    assert open_tensors(tmp_path / "w.pt")._contents.entries["W"].outer == 1
    torch.save({"W": torch.cat([tensor, tensor], 1)[:, ::2]}, tmp_path / "w.pt")
    check_both_axes(tmp_path / "w.pt", torch.cat([tensor, tensor], 1)[:, ::2])


def check_both_axes(path, tensor):
    file = open_tensors(path)
    assert torch.equal(file.read("W"), tensor)
    assert torch.equal(file.read("W", 0, torch.tensor([30, 2, 2])), tensor[[30, 2, 2]])
    assert torch.equal(file.read("W", 1, torch.tensor([10, 0])), tensor[:, [10, 0]])


def test_unaligned_arrays_become_aligned(tmp_path):
    """Members of a zip start at any byte, and float kernels may crash there."""
    for length in range(1, 9):
        np.savez(tmp_path / "w.npz", **{"W" * length: np.arange(50, dtype=np.float64)})
        read = open_tensors(tmp_path / "w.npz").read("W" * length)
        assert read.data_ptr() % 8 == 0
        assert torch.equal(read, torch.arange(50, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_half_precision_and_empty_tensors(tmp_path, kind):
    tensors = {
        "bf": torch.randn(6, 4).bfloat16(),
        "bool": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    file = open_tensors(write(tmp_path / "w", kind, tensors))
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor)
    assert torch.equal(file.read("bf", 1, torch.tensor([3, 1])), tensors["bf"][:, [3, 1]])
    assert file.read("none", 1, torch.tensor([3])).shape == (0, 1)


def test_8_bit_floats_of_safetensors_are_read(tmp_path):
    tensor = torch.randn(6, 4).to(torch.float8_e4m3fn)
    save_file({"W": tensor}, tmp_path / "w")
    file = open_tensors(tmp_path / "w")
    assert file.tensors["W"].dtype == torch.float8_e4m3fn
    assert torch.equal(file.read("W", 0, torch.tensor([5, 1])).float(), tensor.float()[[5, 1]])
    finite({"W": file.read("W")}, "w")


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_name_axis_or_latent_is_refused(tmp_path, kind):
    file = open_tensors(write(tmp_path / "w", kind, weights()))
    with pytest.raises(DictionaryError, match="holds no tensor W_gate.*W_dec"):
        file.read("W_gate")
    for bad in ([0, ROWS], [-1, 0]):
        with pytest.raises(DictionaryError, match=f"0 to {ROWS - 1}"):
            file.read("W_dec", 0, torch.tensor(bad))
    with pytest.raises(DictionaryError, match="has no axis 2"):
        file.read("W_dec", 2, torch.tensor([0]))
    with pytest.raises(DictionaryError, match="has no axis 0"):
        file.read("k", 0, torch.tensor([0]))


@pytest.mark.parametrize("kind", KINDS)
def test_reading_leaves_the_file_as_it_is(tmp_path, kind):
    path = write(tmp_path / "w", kind, weights())
    before = path.read_bytes()
    file = open_tensors(path)
    file.read("W_dec", 0, torch.tensor([1])).zero_()
    assert torch.equal(file.read("W_dec"), weights()["W_dec"])
    assert path.read_bytes() == before


# --- names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_prefix_of_all_tensors_is_taken_off(tmp_path, kind, prefix):
    tensors = {prefix + name: one for name, one in weights().items()}
    file = open_tensors(write(tmp_path / "w", kind, tensors))
    assert list(file.tensors) == list(weights()) or set(file.tensors) == set(weights())
    assert torch.equal(file.read("W_dec", 0, torch.tensor([4])), weights()["W_dec"][[4]])


def test_a_prefix_of_some_tensors_is_part_of_their_names(tmp_path):
    save_file({"_orig_mod.W": torch.ones(2), "b": torch.ones(2)}, tmp_path / "w")
    assert set(open_tensors(tmp_path / "w").tensors) == {"_orig_mod.W", "b"}


def test_a_prefix_chooses_tensors(tmp_path):
    save_file({"_orig_mod.a.W": torch.ones(2), "_orig_mod.b.W": torch.zeros(2)}, tmp_path / "w")
    file = open_tensors(tmp_path / "w", "b.")
    assert set(file.tensors) == {"W"}
    assert torch.equal(file.read("W"), torch.zeros(2))
    assert "names start with c." in refusal(tmp_path / "w", "c.")


# --- torch checkpoints


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "ae"])
def test_a_state_in_a_checkpoint_is_unwrapped(tmp_path, key):
    inner = OrderedDict({f"_orig_mod.{name}": one for name, one in weights().items()})
    config = {"k": 8, "site": "resid_post.3", "lr": 1e-3, "tied": False, "sizes": [1, (2, None)], 4: "four"}
    other = {"config": config, "step": 7, "optimizer": {"state": {0: torch.ones(3)}}}
    torch.save({key: inner, **other}, tmp_path / "w.pt")
    file = open_tensors(tmp_path / "w.pt")
    assert set(file.tensors) == set(weights())
    assert file.extras == {"config": config, "step": 7}
    assert torch.equal(file.read("W_enc"), weights()["W_enc"])


def test_plain_values_stand_beside_tensors(tmp_path):
    """As OpenAI's autoencoders are saved."""
    values = {"activation": "TopK", "activation_state_dict": {"k": 32, "postact_fn": "ReLU"}}
    torch.save({**weights(), **values, "shape": torch.Size([2, 3])}, tmp_path / "w.pt")
    file = open_tensors(tmp_path / "w.pt")
    assert file.extras == {**values, "shape": (2, 3)}
    assert set(file.tensors) == set(weights())


def test_parameters_and_module_states_are_tensors(tmp_path):
    module = torch.nn.Linear(4, 3)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    torch.save(dict(module.named_parameters()), tmp_path / "parameters.pt")
    for path in (tmp_path / "state.pt", tmp_path / "parameters.pt"):
        file = open_tensors(path)
        assert torch.equal(file.read("weight"), module.weight)
        assert not file.read("weight").requires_grad


def test_a_tensor_beside_the_state_is_not_lost(tmp_path):
    torch.save({"ae": {"W": torch.ones(2)}, "norm_factor": torch.tensor(3.0)}, tmp_path / "w.pt")
    assert set(open_tensors(tmp_path / "w.pt").tensors) == {"W", "norm_factor"}
    torch.save({"ae": {"W": torch.ones(2)}, "W": torch.tensor(3.0)}, tmp_path / "w.pt")
    assert "two tensors named" in refusal(tmp_path / "w.pt")
    torch.save({"ae": {"W": torch.ones(2)}, "model": {"W": torch.ones(2)}}, tmp_path / "w.pt")
    assert "model, ae" in refusal(tmp_path / "w.pt")


def test_values_that_blow_up_or_contain_themselves_are_left_out(tmp_path):
    laughs: list = ["ha"]
    for _ in range(12):
        laughs = [laughs] * 20
    cycle: list = []
    cycle.append(cycle)
    torch.save({"W": torch.ones(2), "laughs": laughs, "cycle": cycle, "huge": 10**300}, tmp_path / "w.pt")
    assert open_tensors(tmp_path / "w.pt").extras == {}


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["top", "beside", "inside"])
def test_code_in_a_checkpoint_is_named_and_never_runs(tmp_path, protocol, where):
    call = Call(os.mkdir, str(tmp_path / "pwned"))
    contents = {"top": call, "beside": {"W": torch.ones(2), "x": call}, "inside": {"model": {"x": [call]}}}
    torch.save(contents[where], tmp_path / "w.pt", pickle_protocol=protocol)
    text = refusal(tmp_path / "w.pt")
    assert "could run code" in text
    assert "posix.mkdir" in text
    assert not (tmp_path / "pwned").exists()


def test_what_torch_refuses_is_refused_without_its_advice(tmp_path):
    """torch tells the reader to try again and let the file run code."""
    torch.save({"W": torch.ones(2), "huge": 10**5000}, tmp_path / "w.pt")
    text = refusal(tmp_path / "w.pt")
    assert "weights_only" not in text
    assert "Unsupported operand 139" in text
    torch.save({"W": torch.ones(2)}, tmp_path / "w.pt", pickle_protocol=4)
    assert "protocol 2" in refusal(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Call(torch.FloatTensor, 10**13), "torch.FloatTensor"),
        (Call(torch.UntypedStorage, 10**13), "torch.storage.UntypedStorage"),
        (Call(bytearray, 10**13), "bytearray"),
        (np.float64(3), "numpy"),
        (torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.empty(3, device="meta"), "_rebuild_meta_tensor"),
        (Path("x"), "pathlib"),
    ],
)
def test_what_no_tensor_needs_is_refused_before_it_allocates(tmp_path, value, name):
    torch.save({"W": torch.ones(2), "x": value}, tmp_path / "w.pt")
    assert name in refusal(tmp_path / "w.pt")


def test_an_expanded_tensor_is_refused(tmp_path):
    torch.save({"W": torch.ones(1, 4).expand(10**9, 4)}, tmp_path / "w.pt")
    assert "repeats what it stores" in refusal(tmp_path / "w.pt")


def test_checkpoints_without_names_are_refused(tmp_path):
    for value in (torch.ones(3), [torch.ones(3)], {}, {"k": 3}, {3: torch.ones(2)}):
        torch.save(value, tmp_path / "w.pt")
        assert "tensor" in refusal(tmp_path / "w.pt")


def test_a_checkpoint_named_safetensors_is_refused(tmp_path):
    torch.save(weights(), tmp_path / "w.safetensors")
    assert "Rename it" in refusal(tmp_path / "w.safetensors")


def test_a_checkpoint_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    torch.save(weights(), tmp_path / "w.pt")
    torch.serialization.set_crc32_options(before)
    file = open_tensors(tmp_path / "w.pt")
    file.check()
    assert torch.equal(file.read("W_dec"), weights()["W_dec"])


# --- zip files


def zipped(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


ARRAY = npy(np.ones(4, np.float32))


@pytest.mark.parametrize("name", ["a/b.npy", "/a.npy", "../a.npy", "a\\b.npy", "a\x1b[31m.npy", ".npy"])
def test_strange_member_names_are_refused(tmp_path, name):
    refusal(zipped(tmp_path / "w.npz", [("ok.npy", ARRAY), (name, ARRAY)]))
    refusal(zipped(tmp_path / "w.npz", [(name + "x", ARRAY)]))


def test_two_members_of_one_name_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        zipped(tmp_path / "w.npz", [("a.npy", ARRAY), ("a.npy", ARRAY)])
    assert "one name" in refusal(tmp_path / "w.npz")


def repeated(path, member, data):
    """A checkpoint with one member more, which says another thing."""
    with zipfile.ZipFile(path) as archive:
        kept = [(one.filename, archive.read(one)) for one in archive.infolist()]
    name = next(name for name, _ in kept if name.endswith("data.pkl"))
    return zipped(path, [*kept, (name.replace("data.pkl", member), data)])


def test_a_second_pickle_that_differs_in_case_is_refused(tmp_path):
    """torch looks names up without regard to case, and would read the one that nobody checked."""
    torch.save({"a": torch.ones(3)}, tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "other.pt") as archive:
        other = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    torch.save({"a": torch.ones(3)}, tmp_path / "w.pt")
    assert "one name" in refusal(repeated(tmp_path / "w.pt", "DATA.PKL", other))


def test_two_directories_in_one_file_are_refused(tmp_path):
    """zipfile takes the 64-bit record before its locator, torch the one that the locator points to."""
    torch.save({"a": torch.ones(3)}, tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    assert content[-98:-94] == b"PK\x06\x06"
    start = struct.unpack("<Q", content[-50:-42])[0]
    record, locator, end = content[-98:-42], content[-42:-22], content[-22:]
    twice = content[:-42] + content[start:-98]
    twice += record[:48] + struct.pack("<Q", len(content) - 42) + locator + end
    (tmp_path / "w.pt").write_bytes(twice)
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        assert archive.testzip() is None
    assert "another directory" in refusal(tmp_path / "w.pt")


def test_a_comment_at_the_end_of_a_zip_is_refused(tmp_path):
    path = zipped(tmp_path / "w.npz", [("a.npy", ARRAY)])
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"more"
    assert "another directory" in refusal(path)


def edited(path, member, offset, data):
    """Overwrite bytes of a member's entry in the directory of a zip."""
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    for _ in range(member):
        at = content.index(b"PK\x01\x02", at + 4)
    content[at + offset : at + offset + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "data", "found"),
    [
        (42, struct.pack("<I", 0), "contradicts"),  # the second starts where the first does
        (42, struct.pack("<I", 10**6), "contradicts"),
        (8, struct.pack("<H", 1), "an encrypted member"),
        (10, struct.pack("<H", 12), "another way than"),
        (20, struct.pack("<II", 10**6, 10**6), "beyond"),
        (24, struct.pack("<I", 10**8), "another way than"),
    ],
)
def test_a_directory_that_lies_is_refused(tmp_path, offset, data, found):
    path = zipped(tmp_path / "w.npz", [("a.npy", ARRAY), ("b.npy", ARRAY)])
    open_tensors(path)
    edited(path, 1, offset, data)
    assert found in refusal(path)


def test_overlapping_members_are_refused(tmp_path):
    path = zipped(tmp_path / "w.npz", [("a.npy", ARRAY), ("b.npy", ARRAY)])
    edited(path, 0, 20, struct.pack("<II", len(ARRAY) + 20, len(ARRAY) + 20))
    assert "overlaps" in refusal(path)


def test_bytes_before_the_first_member_are_refused(tmp_path):
    path = zipped(tmp_path / "w.npz", [("a.npy", ARRAY)])
    path.write_bytes(b"PK\x03\x04" + path.read_bytes())
    assert "outside" in refusal(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    bomb = npy(np.zeros(1 << 24, np.float32))
    path = zipped(tmp_path / "w.npz", [("a.npy", bomb)], zipfile.ZIP_DEFLATED)
    assert f"{len(bomb)} bytes packed into {path.stat().st_size}" in refusal(path)


def test_a_packed_array_that_is_longer_than_declared_is_cut_where_it_should_end(tmp_path):
    path = zipped(tmp_path / "w.npz", [("a.npy", npy(np.zeros(10**5, np.float32)))], zipfile.ZIP_DEFLATED)
    edited(path, 0, 24, struct.pack("<I", len(ARRAY)))
    assert "CRC" in refusal(path)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (npy(np.array([1, "x"], object)), "pickled objects"),
        (npy(np.ones(3, ">f4")), ">f4"),
        (npy(np.zeros(3, "V2")), "bfloat16"),
        (npy(np.zeros(3, "datetime64[s]")), "datetime64"),
        (npy(np.zeros(3, "U4")), "U4"),
        (npy(np.zeros(3, np.longdouble)), "longdouble"),
        (npy(np.zeros(3, [("a", "f4")])), "'a'"),
        (ARRAY[:-1], "15 bytes"),
        (ARRAY + b"x", "17 bytes"),
        (ARRAY.replace(b"(4,)", b"(-4)"), "no readable"),
        (ARRAY.replace(b"(4,)", b"9**9"), "no readable"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "no readable"),
        (b"\x93NUMPY\x09\x00", "no readable"),
        (b"", "no readable"),
    ],
)
def test_arrays_that_hold_no_numbers_are_refused(tmp_path, data, found):
    assert found in refusal(zipped(tmp_path / "w.npz", [("ok.npy", ARRAY), ("a.npy", data)]))


@pytest.mark.parametrize(
    "members",
    [
        [],
        [("cfg.json", b"{}"), ("sae_weights.safetensors", b"")],
        [("w/data.pkl", b""), ("w/constants.pkl", b"")],
        [("w/data.pkl", b"}."), ("other/data/0", b"")],
        [("data.pkl", b"}.")],
    ],
)
def test_other_zip_files_are_refused(tmp_path, members):
    refusal(zipped(tmp_path / "w.zip", members))


@pytest.mark.parametrize("kind", ["npz", "packed", "torch"])
def test_a_flipped_bit_in_the_weights_is_found_by_the_check(tmp_path, kind):
    path = write(tmp_path / "w", kind, {"W": torch.randn(500)})
    content = bytearray(path.read_bytes())
    content[1300] ^= 4
    path.write_bytes(content)
    with pytest.raises(DictionaryError, match="CRC|no readable"):
        open_tensors(path).check()


def test_a_flipped_bit_in_the_names_of_a_checkpoint_is_refused(tmp_path):
    path = write(tmp_path / "w", "torch", {"W_dec": torch.ones(3)})
    path.write_bytes(path.read_bytes().replace(b"W_dec", b"W_deb"))
    assert "data.pkl contradicts its checksum" in refusal(path)


# --- safetensors


def safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def one(shape, offsets, dtype="F32"):
    return {"W": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize("length", [10**3, 1 << 27, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    path = safetensors(tmp_path / "w", one([2], [0, 8]), bytes(8), length)
    assert str(length) in refusal(path)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (one([2], [0, 8]), bytes(4)),
        (one([2], [0, 8]), bytes(12)),
        (one([1 << 40], [0, 8]), bytes(8)),
        (one([1 << 62, 0], [0, 0]), b""),
        (one([(1 << 64) - 1, 2], [0, 8]), bytes(8)),
        (one([-2], [0, 8]), bytes(8)),
        (one([2], [0, 2], "F4"), bytes(2)),
        (one([2], [0, 2], "F8_E9M9"), bytes(2)),
        ({"W\x1b[2J": one([2], [0, 8])["W"]}, bytes(8)),
        ({}, b""),
        ({"__metadata__": {"a": "b"}}, b""),
        (b"{" * 60, b""),
        (b"{" + b"\xff" * 20, b""),
    ],
)
def test_headers_that_contradict_the_file_are_refused(tmp_path, header, data):
    refusal(safetensors(tmp_path / "w", header, data))


def test_metadata_of_safetensors_is_no_tensor(tmp_path):
    save_file({"W": torch.ones(2)}, tmp_path / "w", metadata={"format": "pt"})
    assert set(open_tensors(tmp_path / "w").tensors) == {"W"}


# --- everything else


def legacy():
    file = io.BytesIO()
    torch.save({"W": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"<html>" + "é".encode() * 600, "web page"),
        (b"Entry not found", "text that begins with 'Entry not found'"),
        (json.dumps({"cfg": {"a": 1}}).encode(), "text that begins"),
        (gzip.compress(b"weights", mtime=0), "gzip"),
        (ARRAY, "numpy.savez"),
        (legacy(), "pickle of the old kind"),
        *((pickle.dumps({"a": 1}, protocol), "pickle of the old kind") for protocol in (2, 3, 4, 5)),
        (pickle.dumps({"a": 1}, 0), "text that begins"),
        (b"GGUF\x03\x00\x00\x00", "47 47 55 46"),
        (b"PK\x05\x06" + bytes(18), "50 4b 05 06"),
        (b"PK\x03\x04", "no readable zip"),
        (b"\x00", "bytes 00"),
    ],
)
def test_what_a_foreign_file_is_is_said(tmp_path, content, found):
    path = tmp_path / "ae.pt"
    path.write_bytes(content)
    text = refusal(path)
    assert found in text
    assert "\ufffd" not in text


def test_folders_missing_files_and_pipes_are_refused(tmp_path):
    assert "is a folder" in refusal(tmp_path)
    assert "is no file" in refusal(tmp_path / "none.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    assert "is no file" in refusal(tmp_path / "pipe.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_download_is_refused(tmp_path, kind):
    path = write(tmp_path / "w", kind, weights())
    content = path.read_bytes()
    for kept in (1, 7, 8, 9, 30, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        refusal(path)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    for kind in ("safetensors", "npz", "torch"):
        path = write(tmp_path / "w", kind, weights())
        file = open_tensors(path)
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(DictionaryError):
            file.read("W_dec", 0, torch.tensor([30]))


# --- finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 777, 1308])
def test_one_number_that_is_none_is_found(dtype, value, at):
    torch.manual_seed(at)
    tensor = torch.randn(119, 11).to(dtype)
    finite({"W": tensor, "k": torch.tensor(3)}, "here")
    tensor.view(-1)[at] = value
    for shown in (tensor, tensor.T, tensor[None].expand(2, -1, -1)):
        with pytest.raises(DictionaryError, match="W of here holds NaN or infinity"):
            finite({"b": torch.zeros(2), "W": shown}, "here")


def test_infinities_that_cancel_are_found():
    with pytest.raises(DictionaryError, match="NaN or infinity"):
        finite({"W": torch.tensor([float("inf"), -float("inf")])}, "here")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_finite_numbers_whose_sum_overflows_pass(dtype):
    finite({"W": torch.full((64, 3), torch.finfo(dtype).max, dtype=dtype)}, "here")
    finite({"W": torch.full((64, 3), -torch.finfo(dtype).max, dtype=dtype)}, "here")


def test_integers_and_empty_tensors_are_finite():
    finite({"n": torch.tensor([2**63 - 1] * 9), "b": torch.tensor([True]), "none": torch.zeros(0, 3)}, "here")


def test_8_bit_nan_is_found():
    with pytest.raises(DictionaryError, match="NaN"):
        finite({"W": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)}, "here")
