"""The archive that ``torch.save`` writes: where its records lie, and whether they have their checksums."""

from __future__ import annotations

import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch import Tensor

from lightning_merge.checkpoints.files import InputFile
from lightning_merge.checkpoints.recognition import check_archive_kind
from lightning_merge.utilities.errors import MergeError

_MAGIC = b"PK\x03\x04"
_BLOCK = 1 << 20  # bytes that are read at a time
_INFLATION, _SMALL = 10, 1 << 26  # a file's content may have so many times its bytes, or 64 MiB more
_LOCAL_HEADER = 30  # bytes that stand before every record of a zip archive, followed by its name and an extra field


class Record:
    """The bytes of one storage, and their checksum in the archive, which is compared once.

    Args:
        begin: Position of the first byte.
        size: Bytes.
        checksum: Their CRC-32; None where the archive has none.
    """

    def __init__(self, begin: int, size: int, checksum: int | None) -> None:
        self.begin, self.size, self.checksum = begin, size, checksum

    def read(self, file: InputFile, begin: int, size: int) -> Tensor:
        """Read ``size`` bytes from position ``begin`` of the file: ``(size,)``, uint8.

        Raises:
            MergeError: If the record does not have its checksum.
        """
        content = file.read(begin, size)
        if self.checksum is not None:
            whole = (begin, size) == (self.begin, self.size)
            if self.checksum != (_crc(content) if whole else self._crc_of_all(file)):
                raise MergeError(f"{file.path} is damaged: a tensor in it does not have its checksum; copy it again.")
            self.checksum = None
        return content

    def _crc_of_all(self, file: InputFile) -> int:
        """Compute the checksum of the whole record, of which a tensor is a part."""
        end, crc = self.begin + self.size, 0
        for begin in range(self.begin, end, _BLOCK):
            crc = _crc(file.read(begin, min(_BLOCK, end - begin)), crc)
        return crc


def _crc(content: Tensor, before: int = 0) -> int:
    """Compute the CRC-32 of bytes ``(size,)``, uint8, that follow others of a known one."""
    return zlib.crc32(cast(Any, content.numpy()), before)


def find_records(file: InputFile) -> dict[int, Record] | None:
    """Find the storages of a file.

    Returns:
        The record at every position, in bytes; None if the storages do not lie there as they are in memory (a file of
        torch < 1.6, compressed records, the other byte order), or not in the order in which PyTorch looks for them.

    Raises:
        MergeError: If the pickle is damaged, or if a record reaches over the end of the file.
    """
    with file.path.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            return None
        with zipfile.ZipFile(stream) as archive:
            listed = archive.infolist()
            folder = listed[0].filename.partition("/")[0]
            infos = {info.filename.removeprefix(f"{folder}/"): info for info in listed}
            if len(infos) < len(listed):
                raise MergeError(f"{file.path} is damaged: two of its records have the same name.")
            check_archive_kind(file.path, infos)
            check_size(file, sum(info.file_size for info in listed))
            if (size := infos["data.pkl"].file_size) > file.size + _BLOCK:  # torch.save compresses nothing
                raise MergeError(
                    f"{file.path} has {file.size:,} bytes, and {size:,} say what it holds; it is no model."
                )
            _forget_zeros(archive)
            archive.read(infos["data.pkl"])  # compares its checksum, which PyTorch does not
            byteorder = archive.read(infos["byteorder"]) if "byteorder" in infos else b"little"
        data = sorted(
            (info for name, info in infos.items() if name.startswith("data/")), key=lambda info: info.header_offset
        )
        # Where there is a version, PyTorch derives positions from the sizes of the records before.
        expected = [f"{folder}/data/{i}" for i in range(len(data))]
        in_order = ".format_version" not in infos or [info.filename for info in data] == expected
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in data)
        if not (in_order and stored and byteorder.decode() == sys.byteorder):
            return None
        records = {}
        for info in data:
            begin = _data_position(stream, info)
            records[begin] = Record(begin, info.file_size, info.CRC if hasattr(info, "CRC") else None)
    for record in records.values():
        if record.begin + record.size > file.size:
            raise MergeError(f"{file.path} is damaged: it ends within one of its tensors; copy it again.")
    return records


def check_archive(path: Path) -> None:
    """Compare the checksums of all records of an archive, which PyTorch does not when it loads a file as a whole.

    Raises:
        MergeError: If one is not that of its record.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        _forget_zeros(archive)
        damaged = archive.testzip()
    if damaged is not None:
        raise MergeError(f"{path} is damaged: {damaged} in it does not have its checksum; copy it again.")


def _forget_zeros(archive: zipfile.ZipFile) -> None:
    """Compare no checksums that were left out on request, see ``torch.serialization.set_crc32_options``."""
    for info in archive.infolist():
        if not info.CRC:
            del info.CRC


def check_size(file: InputFile, size: int) -> None:
    """Raise a :class:`MergeError` if the content of a file is out of proportion to its bytes."""
    if size > _INFLATION * file.size + _SMALL:
        raise MergeError(
            f"{file.path} has {file.size:,} bytes and would unpack to {size:,}, more than {_INFLATION} times as many; "
            "no model is stored so. Load it where it was made and save it again with torch.save, uncompressed."
        )


def _data_position(stream: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Find the byte at which the data of a record starts; -1 where the archive contradicts itself."""
    stream.seek(info.header_offset)
    header = stream.read(_LOCAL_HEADER)
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    if header[: len(_MAGIC)] != _MAGIC or stream.read(name) != info.filename.encode():
        return -1
    return info.header_offset + _LOCAL_HEADER + name + extra
