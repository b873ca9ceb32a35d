"""Inspect a checkpoint's file before memory is taken for its tensors and before any class is made.

The file's pickles are read with stand-ins for all names in them. A tensor's stand-in checks the dtype, storage and
shape that the pickle claims.
"""

import io
import math
import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from fairseq_rkm.checkpoints import classes
from fairseq_rkm.errors import RKMError

PICKLE_EXPANSION = 10
"""How many times the file's size an archive may unpack to."""

DIRECTORY = 0x10
"""The attribute of MS-DOS that makes a member of an archive a folder."""

PICKLE_OPERATIONS = frozenset(
    re.findall(
        r"\w+",
        """
        PROTO STOP GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 NONE
        NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2 BINFLOAT BINUNICODE
        SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT LONG1
        """,
    )
)
"""The pickle operations that PyTorch's own reader of weights takes."""

TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PLAIN = {
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
    "_codecs.encode",
    *classes.PYTHON,
    *classes.NUMPY,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def inspect(path: Path) -> None:
    """Refuse a file that is not a checkpoint, is damaged, or claims more bytes than it holds.

    An archive's members are compared with their checksums. Files of PyTorch before 1.6 have no checksums.

    Args:
        path: the file.

    Raises:
        RKMError: the reason, without the path.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            _inspect_archive(path)
        else:
            file.seek(0)
            _inspect_stream(file, path.stat().st_size)


def _inspect_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = {member.filename for member in members}
            if len(names) != len(members):
                raise RKMError("it is damaged or forged: two members of its archive have one name")
            # PyTorch reads nothing of a member that is marked as a folder, and leaves the tensor's memory as it was.
            marked = [m.filename for m in members if m.external_attr & DIRECTORY and not m.is_dir()]
            if marked:
                raise RKMError(f"it is damaged or forged: {marked[0]} is marked as a folder")
            unpacked, size = sum(member.file_size for member in members), path.stat().st_size
            if unpacked > PICKLE_EXPANSION * size:
                raise RKMError(f"its {size} bytes unpack to {unpacked}")
            damaged = archive.testzip()
            if damaged is not None:
                raise RKMError(f"it is damaged: {damaged} does not agree with its checksum")
            pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise RKMError("it is an archive, but not one of PyTorch's")
            folder = pickles[0].removesuffix("data.pkl")
            sizes = {name.removeprefix(f"{folder}data/"): archive.getinfo(name).file_size for name in names}
            _Inspector(io.BytesIO(archive.read(pickles[0])), sizes).load()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise RKMError(f"it is truncated or damaged ({error or type(error).__name__})") from error


def _inspect_stream(file: IO[bytes], size: int) -> None:
    """Inspect a file of PyTorch before 1.6: three pickles of the format, the checkpoint, the storages' names."""
    bounded = _Bounded(file, size)
    if _Inspector(bounded, {}).load() != LEGACY_MAGIC:
        raise RKMError("it is truncated or not a checkpoint")
    for _ in range(2):
        _Inspector(bounded, {}).load()
    inspector = _Inspector(bounded, None)
    inspector.load()
    claimed = sum(inspector.storages.values())
    if claimed > size:
        raise RKMError(f"its tensors claim {claimed} bytes, and the file has {size}")


class _Bounded:
    """A file that is never asked for more bytes than it has."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.readline, self.tell = file, size, file.readline, file.tell
        self.seek = file.seek

    def read(self, count: int = -1) -> bytes:
        return self.file.read(min(count, self.size) if count >= 0 else -1)


class _Inert:
    """Stand-in for anything that a pickle names. It does nothing when called, built or filled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any) -> Any:
        return _Inert(self.name)

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass


class _Storage(_Inert):
    """Stand-in for a storage: the bytes of an element, and of all."""

    def __init__(self, itemsize: int, nbytes: int) -> None:
        super().__init__("storage")
        self.itemsize, self.nbytes = itemsize, nbytes


class _Tensor(_Inert):
    """Stand-in for a function that builds tensors. It checks the claims of its arguments, and builds nothing."""

    def __call__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
        sizes = [offset, *size, *stride]
        if not isinstance(storage, _Storage) or not all(type(value) is int and value >= 0 for value in sizes):
            raise RKMError("it is damaged or forged: a tensor without storage, size or stride")
        claimed = math.prod(size) * storage.itemsize
        if claimed > storage.nbytes:
            raise RKMError(
                f"a tensor of size {tuple(size)} claims {claimed} bytes, and the file has {storage.nbytes} for it"
            )
        return _Inert("tensor")


class _Inspector:
    """Read one pickle.

    Args:
        file: at the pickle's start.
        sizes: the bytes of each storage by name; None where storages follow in the file.
    """

    def __init__(self, file: Any, sizes: dict[str, int] | None) -> None:
        self.file, self.sizes = file, sizes
        self.storages: dict[str, int] = {}

    def load(self) -> Any:
        """Return the pickled object, with stand-ins.

        Raises:
            RKMError: a refused operation, class or claim, or a damaged pickle.
        """
        start = self.file.tell()
        try:
            for operation, argument, _ in pickletools.genops(self.file):
                if operation.name not in PICKLE_OPERATIONS:
                    raise RKMError(f"it is damaged or forged: its pickle has the operation {operation.name}")
                if operation.name == "GLOBAL":
                    self._check_name(str(argument))
            self.file.seek(start)
            return _Unpickler(self).load()
        except RKMError:
            raise
        except Exception as error:
            raise RKMError(f"it is truncated or not a checkpoint ({type(error).__name__}: {error})") from error

    def _check_name(self, argument: str) -> str:
        module, _, name = argument.partition(" ")
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[module, name]
        module = IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        known = full in PLAIN or full in TENSORS or _itemsize(full) is not None
        if full.startswith("torch._utils._rebuild") and not known:
            raise RKMError(f"it has a tensor that is not a plain one ({name})")
        if not known and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise RKMError(
                f"refused: it carries the class {full}, and a checkpoint of fairseq holds none such. Nothing of it was "
                "run. Get the checkpoint from its authors as plain tensors"
            )
        return full

    def named(self, module: str, name: str) -> Any:
        """Return the stand-in for a name, or refuse the name."""
        full = self._check_name(f"{module} {name}")
        return (_Tensor if full in TENSORS else _Inert)(full)

    def storage(self, identifier: Any) -> _Storage:
        """Return the stand-in for a storage, or refuse a claim that the file does not meet."""
        kind, named, key, _, count, *_ = identifier
        itemsize = _itemsize(named.name)
        if kind not in ("storage", b"storage") or itemsize is None or type(key) is not str or type(count) is not int:
            raise RKMError("it is damaged or forged: a storage without type, name or size")
        nbytes = count * itemsize
        if self.sizes is not None and (count < 0 or nbytes != self.sizes.get(key)):
            raise RKMError(f"a tensor claims {nbytes} bytes, and the file has {self.sizes.get(key, 0)} for it")
        self.storages[key] = max(nbytes, self.storages.get(key, 0))
        return _Storage(itemsize, nbytes)


_Pickle: Any = pickle._Unpickler


class _Unpickler(_Pickle):
    """Python's unpickler, which here calls nothing but stand-ins."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Pickle.dispatch)

    def __init__(self, inspector: _Inspector) -> None:
        super().__init__(inspector.file)
        self.persistent_load, self.find_class = inspector.storage, inspector.named

    def load_newobj(self) -> None:
        """Call the stand-in in place of its class's ``__new__``."""
        arguments, made = self.stack.pop(), self.stack.pop()
        self.append(made(*arguments))

    dispatch[pickle.NEWOBJ[0]] = load_newobj


def _itemsize(name: str) -> int | None:
    """Return the bytes of an element of the storage class of a name; None for the name of anything else."""
    module, _, storage = name.rpartition(".")
    if module != "torch" or not storage.endswith("Storage"):
        return None
    dtype = _STORAGES.get(storage)
    return None if dtype is None else torch._utils._element_size(dtype)


_STORAGES = {name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()}
