"""A jinja2 environment for templates that nobody has vetted.

It lets them call few things, and has every loop, call, filter and new value pay into the meter (template_meter.py).
What messages and templates mean is not known here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from datetime import datetime
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any, NoReturn

from jinja2 import nodes, pass_context, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS, do_join
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from edgert.template_meter import (
    FILTER_CHECKS,
    MAX_DEPTH,
    METER,
    METHOD_CHECKS,
    OPERATOR_CHECKS,
    LimitError,
    Refusal,
    check_join,
    check_numbers,
)

MAX_SOURCE = 1 << 18  # characters of a template; known ones have up to 20,000

_METHODS = {
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    str: frozenset(
        {
            "capitalize",
            "casefold",
            "center",
            "count",
            "endswith",
            "find",
            "format",
            "index",
            "isalnum",
            "isalpha",
            "isascii",
            "isdecimal",
            "isdigit",
            "isidentifier",
            "islower",
            "isnumeric",
            "isprintable",
            "isspace",
            "istitle",
            "isupper",
            "join",
            "ljust",
            "lower",
            "lstrip",
            "partition",
            "removeprefix",
            "removesuffix",
            "replace",
            "rfind",
            "rindex",
            "rjust",
            "rpartition",
            "rsplit",
            "rstrip",
            "split",
            "splitlines",
            "startswith",
            "strip",
            "swapcase",
            "title",
            "upper",
            "zfill",
        }
    ),
}
_FILTERS = (
    "abs",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "float",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "sum",
    "title",
    "trim",
    "truncate",
    "unique",
    "upper",
    "wordcount",
)
_SIZED = frozenset({"batch", "center", "indent", "round", "slice", "truncate"})  # filters that take numbers as sizes


@pass_eval_context
def _join(context: nodes.EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    parts = list(value)
    check_join(d, parts)
    return str(METER.get().derive(do_join(context, parts, d, attribute), parts))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own it writes no HTML escapes: model templates want plain JSON."""
    meter = METER.get()
    size, depth = meter.measure(value)
    if len(str(indent)) + len(str(separators)) > 40:
        raise LimitError("it asks for JSON with an indent or separators of absurd length")
    check_numbers((indent,))
    meter.check(size * (1 + depth * (indent if isinstance(indent, int) else len(indent or ""))))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks its arguments and pays for its result."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the value, behind the context
    check = FILTER_CHECKS.get(name)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.spend()
        value, *others = args[first:]
        if name in _SIZED:
            check_numbers((*others, *kwargs.values()))
        if check is not None:
            check(value, *others, **kwargs)
        elif name == "list" and isinstance(value, str):
            meter.spend(len(value))
        result = function(*args, **kwargs)
        if isinstance(value, str) and isinstance(result, str) and name != "format":
            return meter.derive(result, (value, *others))
        return meter.hold(result)

    return run


# --- what templates may call


class _TemplateNamespace(Namespace):
    """Without internal names, and shown as one word, since a namespace can hold itself."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace takes no name like {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _raise_exception(message: Any = "") -> NoReturn:
    raise Refusal(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern[:1000])


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


_GLOBALS: dict[str, Any] = {
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
    "dict": _dict,
    "range": safe_range,
    "namespace": _TemplateNamespace,
    "cycler": Cycler,
    "joiner": Joiner,
}


def _receiver(function: Any) -> tuple[Any, str]:
    """Whose method this is, and its name; (None, ...) for what is no bound method."""
    function = getattr(function, "__wrapped__", function) if isinstance(function, FunctionType) else function
    bound = isinstance(function, BuiltinMethodType | MethodType)
    return (function.__self__ if bound else None), getattr(function, "__name__", "")


# --- the environment


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only text."""

    tags = {"generation"}  # noqa: RUF012   # as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(NodeTransformer):
    """Puts the meter into a parsed template, where the environment has no hook of its own."""

    def _call(self, name: str, node: nodes.Expr) -> nodes.Expr:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        tick = self._call("_tick", nodes.Const(True, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(tick, node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return self._call("_hold", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        sliced = isinstance(node.arg, nodes.Slice)
        self.generic_visit(node)
        return self._call("_cut", node) if sliced else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # so that it goes through _finalize, and is paid for


@pass_context  # without a context jinja2 would evaluate constants while it compiles
def _finalize(_: Context, value: Any) -> str:
    return METER.get().hold(value if isinstance(value, str) else str(value))


@pass_context
def _concat(_: Context, parts: list[Any]) -> str:
    check_join("", parts)
    return METER.get().hold("".join(map(str, parts)))


@pass_context
def _tick(_: Context, value: Any) -> Any:
    METER.get().spend()
    return value


@pass_context
def _hold(_: Context, value: Any) -> Any:
    return METER.get().hold(value)


@pass_context
def _cut(_: Context, value: Any) -> Any:
    return METER.get().derive(value, (value,)) if isinstance(value, str) else METER.get().hold(value)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """Compile with `parse` and `compile`; render with METER set."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        functions = {name: FILTERS[name] for name in _FILTERS} | {"join": _join, "tojson": _tojson}
        self.filters = {name: _metered(name, function) for name, function in functions.items()}
        self.filters |= {"_tick": _tick, "_hold": _hold, "_cut": _cut, "_concat": _concat}
        self.globals = dict(_GLOBALS)

    def parse_metered(self, source: str) -> nodes.Template:
        """Parse a template, with the meter in it. Raises jinja2's TemplateSyntaxError."""
        tree = _Metering().visit(self.parse(source))
        tree.set_environment(self)
        return tree

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"it uses the attribute {attribute!r} of a {type(obj).__name__}, which is not allowed")

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call something for the template: macros, methods of plain values and our own functions, nothing else."""
        meter = METER.get()
        meter.spend()
        owner, name = _receiver(function)
        kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
        if kind is not None and name in _METHODS[kind]:
            args = self._check_method(owner, name, args, kwargs)
        elif not (
            isinstance(function, Macro | LoopContext | BlockReference | Joiner | Undefined)
            or isinstance(owner, LoopContext | Cycler)
            or any(function is known for known in _GLOBALS.values())
        ):
            raise SecurityError(f"it calls {name or type(function).__name__!r}, which is not allowed")
        meter.depth += 1
        if meter.depth > MAX_DEPTH:
            raise LimitError(f"its calls are more than {MAX_DEPTH} deep")
        try:
            result = super().call(context, function, *args, **kwargs)
        finally:
            meter.depth -= 1
        return meter.derive(result, (owner, *args)) if kind is str and name != "format" else meter.hold(result)

    def _check_method(self, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if name == "join" and args:
            args = (list(args[0]), *args[1:])
        if isinstance(owner, str) and (check := METHOD_CHECKS.get(name)) is not None:
            check(owner, *args, **{key: kwargs[key] for key in kwargs if key not in ("_loop_vars", "_block_vars")})
        return args

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator, once its result is known to be small enough."""
        if (check := OPERATOR_CHECKS.get(operator)) is not None:
            check(left, right)
        METER.get().spend()
        return METER.get().hold(super().call_binop(context, operator, left, right))
