"""A pickle reader that runs nothing: it knows tensors, containers, numbers and strings.

A torch file describes its tensors with a pickle, which is a program for a stack machine and could
run any code. This module is such a machine without the dangerous instructions: `_torch_records`
says which names are admitted, none of which does anything but describe data, and an instruction
that is not in `_INSTRUCTIONS` ends the reading with an error.

Time and memory are linear in the length of the program. That length is bounded, and so are the
number of instructions, the depth of the result, and its size with shared parts written out.

References:
    CPython `Lib/pickletools.py` (instruction set).
"""

import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from jhessians.interop._torch_records import (
    ADMITTED_NAMES,
    REBUILD,
    STORAGE_NAMES,
    Name,
    RefusedPickleError,
    StorageRecord,
    TensorRecord,
    is_count,
    need,
    quoted,
)

MAX_PROGRAM_BYTES = 64 * 2**20
MAX_DEPTH = 64
_MAX_INSTRUCTIONS = 4_000_000
_MAX_NODES = 4_000_000
_MAX_KEY_CHARACTERS = 4096
_ADVICE = "; save a plain state_dict of tensors with torch.save"


def admitted_key(key: Any) -> Any:
    """Return a dict's key, if a torch file may hold it.

    Raises:
        RefusedPickleError: It is no scalar, an integer beyond 64 bits, or a very long string.
    """
    # Only short scalars: a file could make us hash nested tuples, or compare long strings, so often
    # that reading takes for ever.
    need(key is None or type(key) in (str, int, float, bool), "a dict key is {}", key)
    need(type(key) is not int or -(2**63) <= key < 2**63, "a dict key is {}", key)
    need(type(key) is not str or len(key) <= _MAX_KEY_CHARACTERS, "the dict key {} is long", key)
    return key


class _Machine:
    """Stack, memo and program counter. A MARK opens a new stack; closing it yields the items."""

    def __init__(self, program: bytes, position: int):
        self.program, self.position = program, position
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, StorageRecord] = {}

    def take(self, count: int) -> bytes:
        end = self.position + count
        need(end <= len(self.program), "the pickle ends in the middle of an instruction")
        taken = self.program[self.position : end]
        self.position = end
        return taken

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self, layout: str) -> str:
        try:
            return self.take(self.number(layout)).decode("utf-8")
        except UnicodeDecodeError:
            raise RefusedPickleError("a string in the pickle is not UTF-8") from None

    def line(self) -> str:
        end = self.program.find(b"\n", self.position, self.position + 256)
        need(end >= 0, "a name in the pickle has no end")
        return self.take(end + 1 - self.position)[:-1].decode("latin-1")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        need(bool(self.stack), "the pickle takes from an empty stack")
        return self.stack.pop()

    def top(self, *kinds: type) -> Any:
        need(bool(self.stack), "the pickle looks at an empty stack")
        need(type(self.stack[-1]) in kinds, "the pickle alters {}", self.stack[-1])
        return self.stack[-1]

    def open_mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def close_mark(self) -> list[Any]:
        need(bool(self.outer), "the pickle closes a mark that it did not open")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def push_tuple(self, count: int) -> None:
        self.push(tuple(reversed([self.pop() for _ in range(count)])))

    def push_name(self, module: Any, name: Any) -> None:
        need(type(module) is str and type(name) is str, "the pickle names no string")
        full = f"{module} {name}"
        need(full in ADMITTED_NAMES, f"the pickle asks for {{}}, not admitted{_ADVICE}", full)
        self.push(Name(full))

    def stack_name(self) -> None:
        name = self.pop()
        self.push_name(self.pop(), name)

    def reduce(self) -> None:
        arguments, name = self.pop(), self.pop()
        need(type(arguments) is tuple, "the pickle calls with something not a tuple")
        need(type(name) is Name and name.name in REBUILD, "the pickle calls {}", name)
        self.push(REBUILD[name.name](arguments))

    def build(self) -> None:
        # BUILD sets attributes, such as `_metadata` of a state_dict's OrderedDict. They are no part
        # of the value and are dropped unseen.
        self.pop()
        self.top(OrderedDict)

    def storage(self) -> None:
        what = self.pop()
        # Five items in a zip archive; a sixth, None unless it is a view, in the legacy format.
        is_storage = type(what) is tuple and len(what) in (5, 6) and what[0] == "storage"
        need(is_storage, "a persistent id is not that of a storage")
        _, kind, key, _, count, *view = what
        need(type(kind) is Name and kind.name in STORAGE_NAMES, "a storage of unknown type")
        is_key = type(key) is str and len(key) <= 32 and key.isascii() and key.isdigit()
        need(is_key, "a storage's key is {}, not a number", key)
        need(is_count(count), "a storage's size is {}", count)
        need(view in ([], [None]), "a storage is a view of another; load and save it anew")
        record = StorageRecord(STORAGE_NAMES[kind.name], key, count)
        known = self.storages.setdefault(key, record)
        need(known == record, "storage {} is described in two ways", key)
        self.push(record)

    def remember(self, index: int) -> None:
        need(bool(self.stack), "the pickle remembers an empty stack")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        need(index in self.memo, "the pickle recalls slot {}, which it never filled", index)
        self.push(self.memo[index])

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict, OrderedDict)
        need(len(items) % 2 == 0, "the pickle sets a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[admitted_key(key)] = value

    def protocol(self) -> None:
        version = self.number("<B")
        need(2 <= version <= 5, "pickle protocol {}; 2 to 5 are read", version)


def _run_set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


_INSTRUCTIONS: dict[str, Callable[[_Machine], Any]] = {
    "PROTO": _Machine.protocol,
    "FRAME": lambda m: m.number("<Q"),  # a hint for streams; every read is bounded anyway
    "NONE": lambda m: m.push(None),
    "NEWTRUE": lambda m: m.push(True),
    "NEWFALSE": lambda m: m.push(False),
    "BININT": lambda m: m.push(m.number("<i")),
    "BININT1": lambda m: m.push(m.number("<B")),
    "BININT2": lambda m: m.push(m.number("<H")),
    "LONG1": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    "BINFLOAT": lambda m: m.push(m.number(">d")),
    "BINUNICODE": lambda m: m.push(m.text("<I")),
    "SHORT_BINUNICODE": lambda m: m.push(m.text("<B")),
    "SHORT_BINSTRING": lambda m: m.push(m.text("<B")),  # Python 2's str
    "EMPTY_TUPLE": lambda m: m.push(()),
    "TUPLE1": lambda m: m.push_tuple(1),
    "TUPLE2": lambda m: m.push_tuple(2),
    "TUPLE3": lambda m: m.push_tuple(3),
    "TUPLE": lambda m: m.push(tuple(m.close_mark())),
    "EMPTY_LIST": lambda m: m.push([]),
    "APPEND": lambda m: m.append([m.pop()]),
    "APPENDS": lambda m: m.append(m.close_mark()),
    "EMPTY_DICT": lambda m: m.push({}),
    "SETITEM": _run_set_item,
    "SETITEMS": lambda m: m.set_items(m.close_mark()),
    "MARK": _Machine.open_mark,
    "BINPUT": lambda m: m.remember(m.number("<B")),
    "LONG_BINPUT": lambda m: m.remember(m.number("<I")),
    "MEMOIZE": lambda m: m.remember(len(m.memo)),
    "BINGET": lambda m: m.recall(m.number("<B")),
    "LONG_BINGET": lambda m: m.recall(m.number("<I")),
    "GLOBAL": lambda m: m.push_name(m.line(), m.line()),
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_BY_CODE = {code: _INSTRUCTIONS[name] for code, name in _NAMES.items() if name in _INSTRUCTIONS}


def run(program: bytes, start: int = 0) -> tuple[Any, int, dict[str, StorageRecord]]:
    """Run one pickle to its STOP.

    Args:
        program: Bytes that hold the pickle.
        start: Where it begins.

    Returns:
        The value, with `TensorRecord` for tensors (give it to `finish`); the position after
        STOP; the storages that it named, by key.

    Raises:
        RefusedPickleError: The pickle is damaged, too large, or asks for more than data.
    """
    machine = _Machine(program, start)
    for _ in range(_MAX_INSTRUCTIONS):
        code = machine.take(1)[0]
        if code == ord("."):
            value = machine.pop()
            need(not machine.stack and not machine.outer, "the pickle leaves values behind")
            return value, machine.position, machine.storages
        instruction = _BY_CODE.get(code)
        if instruction is None:
            name = _NAMES.get(code, f"0x{code:02x}")
            raise RefusedPickleError(f"pickle instruction {name} is not admitted{_ADVICE}")
        instruction(machine)
    raise RefusedPickleError(f"the pickle has more than {_MAX_INSTRUCTIONS} instructions")


def finish(value: Any, tensor: Callable[[TensorRecord], Any]) -> Any:
    """Copy the value of `run`, replacing each tensor record, and admit only plain data.

    Parts that the pickle shares stay shared, so the work is linear in the pickle. The size with all
    of them written out is bounded as well, or a caller that walks the result might never finish.

    Args:
        value: From `run`.
        tensor: Called once per distinct record.

    Returns:
        Dicts, lists, tuples, plain values, and what `tensor` returned; nothing of the pickle's
            objects.

    Raises:
        RefusedPickleError: Something in it is not data, contains itself, is nested deeper than
            `MAX_DEPTH`, or is too large; or whatever `tensor` raises.
    """
    done: dict[int, tuple[Any, int, int]] = {}  # id -> (copy, height, nodes written out)

    def visit(node: Any, depth: int) -> tuple[Any, int, int]:
        if node is None or type(node) in (bool, int, float, str):
            return node, 0, 1
        copied = done.get(id(node))
        if copied is None:
            # Also ends a container that contains itself.
            need(depth < MAX_DEPTH, f"the value is nested deeper than {MAX_DEPTH} levels")
            copied = done[id(node)] = copy(node, depth)
        need(depth + copied[1] <= MAX_DEPTH, f"the value is nested deeper than {MAX_DEPTH} levels")
        return copied

    def copy(node: Any, depth: int) -> tuple[Any, int, int]:
        if type(node) is TensorRecord:
            return tensor(node), 0, 1
        if type(node) not in (dict, OrderedDict, list, tuple):
            what = node.name if type(node) is Name else node
            raise RefusedPickleError(f"the value holds {quoted(what)}, which is not plain data")
        is_dict = type(node) in (dict, OrderedDict)
        parts = [visit(part, depth + 1) for part in (node.values() if is_dict else node)]
        copies = [part[0] for part in parts]
        nodes = 1 + sum(part[2] for part in parts)
        need(nodes <= _MAX_NODES, f"the value has more than {_MAX_NODES} items")
        result = type(node)(zip(node, copies, strict=True) if is_dict else copies)
        return result, 1 + max((part[1] for part in parts), default=0), nodes

    return visit(value, 0)[0]
