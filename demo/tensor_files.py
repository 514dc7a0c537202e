"""The three tensor files the demo meets: ONNX and GGUF are read, safetensors is written. numpy is all they need."""

import json
import struct
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np


def write_safetensors(path: Path, tensors: dict) -> None:
    """Writes float32 arrays as F32 and uint16 arrays (see `bfloat16`) as BF16, in the order of their names."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        array = tensors[name]
        dtype = {"float32": "F32", "uint16": "BF16"}[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name]).tobytes())


def bfloat16(array: np.ndarray) -> np.ndarray:
    """The bfloat16 bits of finite float32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class OnnxNode(NamedTuple):
    op: str
    inputs: list
    outputs: list


def read_onnx(data: bytes) -> tuple:
    """The graph's float32 initialisers by name, and its nodes in order (the protobuf fields of onnx.proto3 that hold them)."""
    (graph,) = [value for field, value in protobuf_fields(memoryview(data)) if field == 7]
    tensors, nodes = {}, []
    for field, value in protobuf_fields(graph):
        if field == 1:
            node = list(protobuf_fields(value))
            strings = {number: [bytes(v).decode() for f, v in node if f == number] for number in (1, 2, 4)}
            nodes.append(OnnxNode(strings[4][0], strings[1], strings[2]))
        elif field == 5:
            shape, name, dtype, raw = [], "", 0, b""
            for number, item in protobuf_fields(value):
                if number == 1:
                    shape += [item] if isinstance(item, int) else list(varints(item))
                elif number == 2:
                    dtype = item
                elif number == 8:
                    name = bytes(item).decode()
                elif number == 9:
                    raw = item
            if dtype == 1:
                tensors[name] = np.frombuffer(raw, dtype="<f4").reshape(shape)
    return tensors, nodes


def protobuf_fields(data: memoryview) -> Iterator:
    """(field number, int or bytes) of one protobuf message."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = data[at:at + size], at + size
        elif wire == 2:
            size, at = varint(data, at)
            value, at = data[at:at + size], at + size
        else:
            raise ValueError(f"protobuf wire type {wire} at byte {at}")
        yield key >> 3, value


def varint(data: memoryview, at: int) -> tuple:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = varint(data, at)
        yield value


class Gguf:
    """A GGUF file (version 3, little-endian): `metadata` by key, `tensor(name)` dequantised to float32."""

    SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        magic, version = self.data[:4], struct.unpack_from("<I", data, 4)[0]
        if magic != b"GGUF" or version != 3:
            raise ValueError(f"not a GGUF file of version 3: it begins {magic!r}, version {version}")
        self.at = 8
        tensors, keys = self.scalar(10), self.scalar(10)
        self.metadata = {}
        for _ in range(keys):
            key = self.string()
            self.metadata[key] = self.value(self.scalar(4))
        self.index = {}
        for _ in range(tensors):
            name = self.string()
            sides = [self.scalar(10) for _ in range(self.scalar(4))]
            self.index[name] = (sides[::-1], self.scalar(4), self.scalar(10))  # GGUF names the fastest axis first
        alignment = self.metadata.get("general.alignment", 32)
        self.base = -(-self.at // alignment) * alignment

    def scalar(self, kind: int):
        form = "<" + self.SCALARS[kind]
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        size = self.scalar(10)
        self.at += size
        return self.data[self.at - size:self.at].decode()

    def value(self, kind: int):
        if kind == 8:
            return self.string()
        if kind == 9:
            item, count = self.scalar(4), self.scalar(10)
            return [self.value(item) for _ in range(count)]
        return self.scalar(kind)

    def tensor(self, name: str) -> np.ndarray:
        shape, kind, offset = self.index[name]
        count, start = int(np.prod(shape)), self.base + offset
        if kind == 0:  # F32
            return np.frombuffer(self.data, "<f4", count, start).reshape(shape)
        blocks = count // 32
        if kind == 3:  # Q4_1: scale and minimum, then 32 numbers of 4 bits, the low halves first
            block = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("bits", "u1", 16)])
            stored = np.frombuffer(self.data, block, blocks, start)
            numbers = np.concatenate([stored["bits"] & 15, stored["bits"] >> 4], axis=1).astype(np.float32)
            values = numbers * stored["scale"].astype(np.float32)[:, None] + stored["minimum"].astype(np.float32)[:, None]
        elif kind == 8:  # Q8_0: scale, then 32 numbers of 8 bits
            block = np.dtype([("scale", "<f2"), ("numbers", "i1", 32)])
            stored = np.frombuffer(self.data, block, blocks, start)
            values = stored["numbers"].astype(np.float32) * stored["scale"].astype(np.float32)[:, None]
        else:
            raise ValueError(f"{name}: GGUF tensor type {kind} is not one of F32, Q4_1, Q8_0")
        return values.reshape(shape)
