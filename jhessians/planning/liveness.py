"""How much memory a traced computation takes at its fullest, without compiling it.

The rules are XLA's: an elementwise operation is computed inside the product, reduction or loop that
reads it; a buffer is given back after its last reader; and an array is written over one that has
its size and nobody reads any more. Which of two independent operations comes first is XLA's choice;
here it is the program's order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import cache

from jhessians.planning.program import Operation, Program, program_of

VIEWS = frozenset({
    "reshape", "squeeze", "expand_dims", "transpose", "copy", "split", "stop_gradient",
    "optimization_barrier", "sharding_constraint", "pcast", "pvary",
})  # fmt: skip
"""What only looks at an array in another way."""

IN_PLACE = frozenset({"dynamic_update_slice", "scatter", "scatter-add", "scatter_add"})
"""What changes a part of an array."""

MADE = IN_PLACE | frozenset({
    "dot_general", "ragged_dot", "conv_general_dilated", "scan", "while", "cond", "gather", "sort",
    "concatenate", "cumsum", "cumlogsumexp", "cummax", "all_gather", "all_gather_invariant",
    "reduce_scatter", "psum", "psum_invariant", "pmax", "all_to_all", "ppermute",
})  # fmt: skip
"""What reads arrays from memory and writes its result there; reductions do so, too."""


Order = Callable[[Program], Program]


def peak_bytes(
    program: Program, reusable: Collection[int] = (), *, order: Order | None = None
) -> int:
    """The most memory that a program takes beside its arguments.

    Args:
        program: What one device does.
        reusable: Numbers of those arguments that it may write over, such as donated ones.
        order: Puts the operations of the program, and those of each loop's body, into the order in
            which they are done; by default the program's.

    Returns:
        Bytes; results are counted, but not where they lie in an argument's memory.
    """
    arranged = program if order is None else order(program)
    return _Walk(arranged, {program.arguments[number] for number in reusable}, order).peak()


class _Walk:
    """One walk through a program, which keeps track of buffers.

    A buffer is known by the array that was first written to it.
    """

    def __init__(self, program: Program, reusable: set[int], order: Order | None):
        self.program, self.order = program, order
        self.last: dict[int, int] = {}  # buffer → the last operation that reads it
        self.home = {each: each for each in program.arguments}  # array → buffer
        self.sources = {each: frozenset([each]) for each in program.arguments}
        self.sources |= {each: frozenset() for each in program.constants}
        self.kept = set(program.arguments) - reusable
        self.stored = self._stored()
        self._see()

    def peak(self) -> int:
        """Bytes at the fullest moment."""
        fullest = total = 0
        sizes = {each: self.program.bytes_of(each) for each in self.program.arguments}
        released: set[int] = set()
        for number, each in enumerate(self.program.operations):
            if not any(array in self.stored for array in each.writes):
                continue
            taken: set[int] = set()
            for array, candidates in self._written_over(each):
                for buffer in map(self._buffer, candidates):
                    if (buffer not in taken and self._dies(buffer, number)
                            and sizes[buffer] == self.program.bytes_of(array) > 0):  # fmt: skip
                        self.home[array] = buffer
                        self.last[buffer] = self.last.get(array, number)
                        taken.add(buffer)
                        break
            for array in each.writes:
                if array not in self.home:
                    self.home[array] = array
                    sizes[array] = self.program.bytes_of(array)
                    total += sizes[array]
                    self.last.setdefault(array, number)
            fullest = max(fullest, total + self._inside(each))
            for buffer in [b for b in sizes if b not in released and self._dies(b, number)]:
                released.add(buffer)
                total -= sizes[buffer]
        return fullest

    def _stored(self) -> set[int]:
        """The arrays that exist in memory; the others are computed where they are read."""
        readers: dict[int, list[Operation]] = {}
        for each in self.program.operations:
            for array in each.reads:
                if array is not None:
                    readers.setdefault(array, []).append(each)
        results = set(self.program.results)

        @cache
        def wanted(array: int) -> bool:
            return array in results or any(
                each.name in MADE or (each.name in VIEWS and any(map(wanted, each.writes)))
                for each in readers.get(array, ())
            )

        return {
            array
            for each in self.program.operations if each.name not in VIEWS
            for array in each.writes if _makes(each) or wanted(array)
        }  # fmt: skip

    def _see(self) -> None:
        """Find out what each array is computed from, and when buffers are read last."""
        for number, each in enumerate(self.program.operations):
            read = frozenset[int]().union(*(self.sources[x] for x in each.reads if x is not None))
            stored = any(array in self.stored for array in each.writes)
            for array in each.writes:
                self.sources[array] = frozenset([array]) if stored else read
            if stored or each.name in VIEWS:
                self.last.update(dict.fromkeys(read, number))
        end = len(self.program.operations)
        for result in self.program.results:
            if result is not None:
                self.last.update(dict.fromkeys(self.sources[result], end))
        self.last.update(dict.fromkeys(self.kept, end))

    def _buffer(self, array: int) -> int:
        while self.home[array] != array:
            array = self.home[array]
        return array

    def _dies(self, buffer: int, number: int) -> bool:
        return self.last.get(buffer, -1) <= number

    def _written_over(self, each: Operation) -> Iterable[tuple[int, list[int]]]:
        """Arrays that may take the place of others, and which ones."""
        lies_in = [[] if x is None else sorted(self.sources[x]) for x in each.reads]
        if each.name == "scan":
            start, count = each.params["num_consts"], each.params["num_carry"]
            return zip(each.writes[:count], lies_in[start : start + count], strict=True)
        if each.name == "while":
            start = each.params["cond_nconsts"] + each.params["body_nconsts"]
            return zip(each.writes, lies_in[start:], strict=True)
        if each.name in IN_PLACE:
            return [(each.writes[0], lies_in[0])]
        if each.name in MADE and each.name != "cond":
            return []
        return [(array, [x for found in lies_in for x in found]) for array in each.writes]

    def _inside(self, each: Operation) -> int:
        """What a loop or a branch takes besides what it reads and returns."""
        if each.name == "scan":
            body, start = program_of(each.params["jaxpr"]), each.params["num_consts"]
            carried = range(start, start + each.params["num_carry"])
            return peak_bytes(body, carried, order=self.order)
        if each.name == "while":
            body, start = program_of(each.params["body_jaxpr"]), each.params["body_nconsts"]
            return peak_bytes(body, range(start, len(body.arguments)), order=self.order)
        if each.name == "cond":
            branches = list(map(program_of, each.params["branches"]))
            fullest = max(peak_bytes(branch, order=self.order) for branch in branches)
            results = (branches[0].bytes_of(x) for x in branches[0].results if x is not None)
            return max(0, fullest - sum(results))
        return 0


def _makes(each: Operation) -> bool:
    return each.name in MADE or each.name.startswith(("reduce", "arg"))
