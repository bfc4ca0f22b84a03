"""Hostile pickles, put together instruction by instruction.

`live_payloads` do harm when `pickle` runs them: they create a file. `INERT` are refused for
what they are, and need not run anywhere.
"""

import struct


class Canary:
    """Its construction, by NEWOBJ too, leaves the file."""

    def __new__(cls, path, *rest):
        open(path, "w").close()
        return super().__new__(cls)


class LateCanary:
    """BUILD leaves the file."""

    def __setstate__(self, path):
        open(path, "w").close()


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def stack_name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def number(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def storage(kind: str = "FloatStorage", key: str = "0", count: bytes = b"K\x04") -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + count + b"tQ"


HOOKS = b"\x89" + name("collections", "OrderedDict") + b")R"
REBUILD = name("torch._utils", "_rebuild_tensor_v2")
FOUR, ONE = numbers([4]), numbers([1])


def tensor(offset=b"K\x00", shape=FOUR, strides=ONE, of=None) -> bytes:
    return call(REBUILD, storage() if of is None else of, offset, shape, strides, HOOKS)


def live_payloads(canary: str) -> dict[str, bytes]:
    """Programs that create the file `canary` when `pickle` runs them."""
    touch, code = text(f"touch {canary}"), text(f"open({canary!r}, 'w').close()")
    system, evaluate = name("os", "system"), name("builtins", "eval")
    getattr_, import_ = name("builtins", "getattr"), name("builtins", "__import__")
    partial = name("functools", "partial")
    command = b"](" + text("touch") + text(canary) + b"e"
    module = call(import_, text("os"))
    canary_class = name("tests.interop.hostile_pickles", "Canary")
    late_class = name("tests.interop.hostile_pickles", "LateCanary")
    live = {
        "os.system": call(system, touch),
        "posix.system": call(name("posix", "system"), touch),
        "eval": call(evaluate, code),
        "exec": call(name("builtins", "exec"), code),
        "open for writing": call(name("builtins", "open"), text(canary), text("w")),
        "subprocess.call": call(name("subprocess", "call"), command),
        "subprocess.Popen then wait": call(
            call(getattr_, call(name("subprocess", "Popen"), command), text("wait"))
        ),
        "__import__ and getattr": call(call(getattr_, module, text("system")), touch),
        "getattr chain from a class": call(
            call(getattr_, name("pathlib", "Path"), text("touch")),
            call(name("pathlib", "Path"), text(canary)),
        ),
        "stack_global": call(stack_name("os", "system"), touch),
        "stack_global, dotted": b"\x80\x04" + call(stack_name("shutil", "os.system"), touch),
        "stack_global from memo": text("os") + b"q\x00" + text("system") + b"q\x0100h\x00h\x01\x93"
        b"(" + touch + b"tR",
        "inst": b"(" + touch + b"ios\nsystem\n",
        "obj": b"(" + system + touch + b"o",
        "newobj": canary_class + b"(" + text(canary) + b"t\x81",
        "newobj_ex": b"\x80\x04" + canary_class + b"(" + text(canary) + b"t}\x92",
        "build": late_class + b")\x81" + text(canary) + b"b",
        "functools.partial": call(call(partial, system, touch)),
        "operator.methodcaller": call(
            call(name("operator", "methodcaller"), text("system"), touch), module
        ),
        "list of map": call(
            name("builtins", "list"), call(name("builtins", "map"), system, b"](" + touch + b"e")
        ),
        "timeit": call(
            name("timeit", "timeit"), code, text("pass"), name("time", "time"), b"K\x01"
        ),
        "code.interact": call(
            call(getattr_, call(name("code", "InteractiveInterpreter")), text("runcode")),
            call(name("builtins", "compile"), code, text("x"), text("exec")),
        ),
        "runpy": call(name("runpy", "_run_code"), code, b"}"),
        "importlib": call(
            call(getattr_, call(name("importlib", "import_module"), text("os")), text("system")),
            touch,
        ),
        "extension registry": call(name("copyreg", "add_extension"), text("os"), text("system"),
                                   number(200)) + b"0\x82\xc8(" + touch + b"tR",
        "dictionary of a tensor": b"}(" + text("w") + call(evaluate, code) + b"u",
        "dictionary key": b"}" + call(evaluate, code) + b"K\x01s",
        "dropped by pop": call(evaluate, code) + b"0N",
        "hidden in metadata": name("collections", "OrderedDict") + b")R}"
        + text("_metadata") + call(evaluate, code) + b"sb",
        "within a persistent id": b"(" + text("storage") + call(evaluate, code)
        + text("0") + text("cpu") + b"K\x04tQ",
        "in place of hooks": call(REBUILD, storage(), b"K\x00", numbers([4]), numbers([1]),
                                  b"\x89", call(evaluate, code)),
        "inner pickle": call(name("pickle", "loads"), call(
            name("_codecs", "encode"), text("cos\nsystem\n(V" + f"touch {canary}" + "\ntR."),
            text("latin1"))),
    }  # fmt: skip
    return {key: program if program[:1] == b"\x80" else b"\x80\x02" + program
            for key, program in live.items()}  # fmt: skip


LAUGHS = b"(](K\x01e" + b"".join(b"q\x00](" + b"h\x00" * 10 + b"e" for _ in range(30)) + b"t"
HASH_BOMB = b"K\x01\x85" + b"".join(b"q\x00h\x00\x86" for _ in range(60))
HUGE = 2**60
INERT = {
    "numpy object array": call(
        name("numpy.core.multiarray", "_reconstruct"),
        name("numpy", "ndarray"), b"K\x00\x85", text("b"),
    ),
    "torch.storage._load_from_bytes": call(name("torch.storage", "_load_from_bytes"), text("x")),
    "torch.load": call(name("torch.serialization", "load"), text("/etc/passwd")),
    "torch.hub": call(name("torch.hub", "load"), text("a/b"), text("c")),
    "copyreg._reconstructor": call(
        name("copyreg", "_reconstructor"),
        name("builtins", "object"), name("builtins", "object"), b"N",
    ),
    "a module's class": name("torch.nn", "Linear") + b")\x81",
    "code object": call(name("types", "CodeType"), b"K\x00"),
    "marshal": call(name("marshal", "loads"), text("x")),
    "ctypes": call(name("ctypes", "CDLL"), text("libc.so.6")),
    "attribute of an admitted name": name("collections", "OrderedDict.fromkeys"),
    "admitted name in the module": name("collections OrderedDict", ""),
    "ext1": b"\x82\x01", "ext2": b"\x83\x01\x00", "ext4": b"\x84\x01\x00\x00\x00",
    "build on an admitted name": name("collections", "OrderedDict") + b"}b",
    "build on a tensor": tensor() + b"}b",
    "build on a list": b"]}b",
    "newobj of an admitted name": name("collections", "OrderedDict") + b")\x81",
    "call of a string": call(text("torch._utils _rebuild_tensor_v2")),
    "call of a storage class": call(name("torch", "FloatStorage"), b"K\x04"),
    "call of a dtype": call(name("torch", "float32")),
    "call with a list": name("collections", "OrderedDict") + b"]R",
    "call with arguments": call(name("collections", "OrderedDict"), b"]"),
    "size of a string": call(name("torch", "Size"), text("12")),
    "parameter of a string": call(name("torch._utils", "_rebuild_parameter"), text("x"), HOOKS),
    "a name as value": name("collections", "OrderedDict"),
    "a storage as value": storage(),
    "a class as value": name("torch", "FloatStorage"),
    "persistent id as text": b"Pstorage\n",
    "persistent id of a module": b"(" + text("module") + text("a") + text("b") + text("c") + b"tQ",
    "persistent id of no tuple": text("0") + b"Q",
    "persistent id, class as text": b"(" + text("storage") + text("FloatStorage") + text("0")
    + text("cpu") + b"K\x04tQ",
    "storage outside": tensor(of=storage(key="../../../../etc/passwd")),
    "storage by path": tensor(of=storage(key="/etc/passwd")),
    "storage missing": tensor(of=storage(key="7")),
    "storage key of digits beyond ascii": tensor(of=storage(key="\u0660")),
    "storage larger than its member": tensor(of=storage(count=number(5))),
    "storage smaller than its member": tensor(of=storage(count=number(3)), shape=numbers([3])),
    "storage of negative size": tensor(of=storage(count=number(-4))),
    "storage of huge size": tensor(of=storage(count=number(2**2000))),
    "storage of float size": tensor(of=storage(count=b"G" + struct.pack(">d", 4.0))),
    "storage of two dtypes": b"(" + tensor() + tensor(of=storage("IntStorage")) + b"t",
    "shape beyond the storage": tensor(shape=numbers([5])),
    "shape huge": tensor(shape=numbers([HUGE, HUGE, HUGE]), strides=numbers([0, 0, 0])),
    "shape huge beside zero": tensor(shape=numbers([0, HUGE, HUGE]), strides=numbers([0, 0, 0])),
    "shape expanded": tensor(shape=numbers([2**40]), strides=numbers([0])),
    "shapes expanded, many small": b"(" + tensor(shape=numbers([2**20]), strides=numbers([0])) * 100
    + b"t",
    "shape negative": tensor(shape=numbers([-1])),
    "shape of a bool": tensor(shape=b"\x88\x85"),
    "shape of nan": tensor(shape=b"G" + struct.pack(">d", float("nan")) + b"\x85"),
    "shape a list": tensor(shape=b"](K\x04e"),
    "shape a number": tensor(shape=b"K\x04"),
    "shape of many dimensions": tensor(shape=numbers([1] * 65), strides=numbers([1] * 65)),
    "strides beyond the storage": tensor(strides=numbers([2])),
    "strides negative": tensor(offset=b"K\x03", strides=numbers([-1])),
    "strides huge": tensor(strides=numbers([2**2000])),
    "strides too few": tensor(strides=b")"),
    "offset beyond the storage": tensor(offset=b"K\x01"),
    "offset negative": tensor(offset=number(-1)),
    "offset huge": tensor(offset=number(2**2000)),
    "offset a float": tensor(offset=b"G" + struct.pack(">d", 0.0)),
    "tensor of a string": tensor(of=text("0")),
    "tensor of a tensor": tensor(of=tensor()),
    "tensor with few arguments": call(REBUILD, storage()),
    "tensor untyped": tensor(of=storage("UntypedStorage", count=b"K\x10")),
    "tensor of unknown dtype": call(
        name("torch._utils", "_rebuild_tensor_v3"), storage(), b"K\x00", numbers([4]), numbers([1]),
        HOOKS, text("float32"),
    ),
    "billion laughs": LAUGHS,
    "hash bomb": b"}" + HASH_BOMB + b"Ns",
    "tuple as key": b"}K\x01\x85Ns",
    "list as key": b"}]Ns",
    "tensor as key": b"}" + tensor() + b"Ns",
    "huge number as key": b"}" + number(2**70) + b"Ns",
    "list in itself": b"]q\x00h\x00a",
    "dict in itself": b"}q\x00K\x01h\x00s",
    "deep lists": b"](" * 30_000 + b"e" * 30_000,
    "deep tuples": b")" + b"\x85" * 30_000,
    # The inner tuple is met first where it is not too deep.
    "deep by sharing": b")" + b"\x85" * 60 + b"q\x00h\x00" + b"\x85" * 10 + b"\x86",
    "open marks": b"(" * 30_000 + b"N",
    "dup": b"N2", "pop mark": b"(N1N",
    "append to a string": text("x") + b"K\x01a",
    "append to a tuple": b")K\x01a",
    "append to what a mark hides": b"](K\x01a",
    "set in a list": b"]K\x01K\x02s",
    "set half a pair": b"}(K\x01u",
    "set on a name": name("collections", "OrderedDict") + b"K\x01K\x02s",
    "set on nothing": b"K\x01K\x02s",
    "empty stack": b"0", "stop at once": b"", "two values": b"NN",
    "mark not opened": b"t", "memo never filled": b"h\x07", "memo of nothing": b"q\x00",
    "long4": b"\x8b\xff\xff\xff\x7f", "bytes8": b"\x8e" + b"\xff" * 8,
    "bytearray8": b"\x96" + b"\xff" * 8, "next buffer": b"\x97", "read-only buffer": b"N\x98",
    "unicode8": b"\x8d" + b"\xff" * 8, "bytes": b"C\x01x", "set": b"\x8f", "frozenset": b"(\x91",
    "text number": b"I1\n", "text long": b"L" + b"9" * 5000 + b"L\n", "text string": b"S'x'\n",
    "string cut off": b"X\xff\xff\xff\xffabc", "string not utf-8": b"X\x01\x00\x00\x00\xff",
    "string of a surrogate": b"X\x03\x00\x00\x00\xed\xa0\x80",
    "name without end": b"c" + b"a" * 1000, "name not a string": b"K\x01K\x02\x93",
    "instruction unknown": b"\xff", "frame cut off": b"\x95\x01", "protocol 9": b"\x80\x09N",
    "one-line message": name("os\x00\x1b[31m\r", "system"),
    "names braces": name("{0.__class__}", "{1}"),
}  # fmt: skip
