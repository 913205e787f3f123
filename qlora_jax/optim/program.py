"""Functions over pytrees as lists of operations that can be run in another order.

A paged optimizer needs the results of one page after the other, while the optimizer computes those
of all leaves side by side. Its jaxpr knows what each result depends on, so it can be evaluated as
far as one result goes, then the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxtyping import PyTree


class _Operation(NamedTuple):
    """One equation of a jaxpr as a function; what goes in and out is numbered."""

    function: Callable[..., list[Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(
        cls, eqn: JaxprEqn, jaxpr: Jaxpr, numbers: Mapping[Var, int], outputs: Sequence[int]
    ) -> _Operation:
        """An equation of `jaxpr`, with the numbers of the variables that it reads."""
        invars = list(dict.fromkeys(x for x in eqn.invars if not isinstance(x, Literal)))
        alone = jaxpr.replace(
            constvars=[],
            invars=invars,
            outvars=list(eqn.outvars),
            eqns=[eqn],
            effects=eqn.effects,
            debug_info=jaxpr.debug_info.with_unknown_names(),
        )
        function = jaxpr_as_fun(ClosedJaxpr(alone, ()))
        return cls(function, tuple(numbers[x] for x in invars), tuple(outputs))


class Program:
    """A function over pytrees as a list of operations on its leaves.

    Attributes:
        operations: in an order in which they can be run.
        producers: the operation that a value comes from, by number.
        constants: what is known of the values, by number.
        inputs: numbers of the arguments' leaves.
        outputs: numbers of the result's leaves.
        out_tree: structure of the result.
    """

    def __init__(self, function: Callable[..., PyTree], *args: PyTree):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        self.out_tree = jax.tree.structure(shape)
        self.operations: list[_Operation] = []
        self.constants: dict[int, Any] = {}
        self._count = 0
        self.inputs = [self._number() for _ in closed.jaxpr.invars]
        self.outputs = self._inline(closed, self.inputs)
        self.producers = {number: op for op in self.operations for number in op.outputs}

    def _number(self) -> int:
        self._count += 1
        return self._count

    def _constant(self, value: Any) -> int:
        number = self._number()
        self.constants[number] = value
        return number

    def _inline(self, closed: ClosedJaxpr, given: Sequence[int]) -> list[int]:
        """Adds the operations of a jaxpr, those of jitted functions inside it among them.

        A jitted function over the whole tree is one operation, on which everything would depend.
        """
        jaxpr = closed.jaxpr
        numbers = dict(zip(jaxpr.invars, given, strict=True))
        numbers |= {
            var: self._constant(value)
            for var, value in zip(jaxpr.constvars, closed.consts, strict=True)
        }

        def number_of(atom) -> int:
            return self._constant(atom.val) if isinstance(atom, Literal) else numbers[atom]

        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("jit", "pjit"):  # of jax 0.12, and before
                outputs = self._inline(eqn.params["jaxpr"], [number_of(x) for x in eqn.invars])
            else:
                outputs = [self._number() for _ in eqn.outvars]
                self.operations.append(_Operation.of(eqn, jaxpr, numbers, outputs))
            numbers |= dict(zip(eqn.outvars, outputs, strict=True))
        return [number_of(atom) for atom in jaxpr.outvars]

    def reach(self, given: Mapping[int, frozenset[int]]) -> list[frozenset[int]]:
        """Which labels each leaf of the result depends on.

        Args:
            given: the labels of arguments' leaves, by index; the others have none.
        """
        nothing: frozenset[int] = frozenset()
        labels = dict.fromkeys(range(1, self._count + 1), nothing)
        labels |= {self.inputs[index]: found for index, found in given.items()}
        for _, inputs, outputs in self.operations:
            found = nothing.union(*(labels[number] for number in inputs))
            labels |= dict.fromkeys(outputs, found)
        return [labels[number] for number in self.outputs]


class Run:
    """An evaluation of a program, as far as its results are asked for."""

    def __init__(self, program: Program):
        self._program = program
        self._given: dict[int, Callable[[], Any]] = {}
        self._values: dict[int, Any] = dict(program.constants)

    def give(self, index: int, value: Callable[[], Any]) -> None:
        """Sets an argument's leaf, which is made when it is needed."""
        self._given[self._program.inputs[index]] = value

    def value(self, index: int) -> Any:
        """A leaf of the result; all that it depends on has been given."""
        return self._value(self._program.outputs[index])

    def _value(self, number: int) -> Any:
        if number in self._given:
            self._values[number] = self._given.pop(number)()
        if number not in self._values:
            function, inputs, outputs = self._program.producers[number]
            results = function(*(self._value(operand) for operand in inputs))
            self._values |= dict(zip(outputs, results, strict=True))
        return self._values[number]
