"""Jinja within limits: the environment in which chat templates run (see ``chat``).

Jinja's own sandbox bounds what a template may touch, not what it may spend. Here the syntax tree
is rewritten before it is compiled, so that every piece of output, every value that is made and
every body that may repeat passes through the budget of the running template; functions, filters
and operators are measured before and after. The budget travels in a context variable: one
compiled template serves any number of threads.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from datetime import datetime
from string import Formatter
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

#: Characters that a value may have when it is written out; an item of a list counts for 64.
VALUE_LIMIT = 1 << 24
ITEM = 64
#: Characters that a rendering may emit in all, macros and captured blocks included.
OUTPUT_LIMIT = 1 << 26
#: What a number may be where it counts something (range, padding, repetition).
COUNT_LIMIT = 100_000
#: Bits of the largest number.
NUMBER_BITS = 4096
#: Characters of a format string, and the largest width in one.
FORMAT_LIMIT, WIDTH_LIMIT = 1 << 14, 999
#: Length times length in a search that goes backwards.
BACKWARD_LIMIT = 1 << 30

#: Filters that are of use in a prompt and whose work is bounded by what they are given.
_FILTERS = (
    "abs attr batch capitalize center count d default dictsort e escape first float forceescape "
    "format groupby indent int items last length list lower map max min reject rejectattr replace "
    "reverse round safe select selectattr slice sort string sum title trim truncate unique upper "
    "wordcount"
)
#: Methods of strings that make much out of little, or take long, and serve no prompt.
_BANNED_METHODS = ("encode", "expandtabs", "striptags", "translate", "unescape")

_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")
_TIME_WIDTH = re.compile(r"%[^A-Za-z%]*\d{3}")
_VIEWS = (KeysView, ValuesView, ItemsView)


class Limit(Exception):
    """A limit was reached. Not one of Jinja's errors, so that no template can mistake it."""


class Refusal(jinja2.TemplateError):
    """The template called ``raise_exception``."""


class Budget:
    """What one rendering may still spend. ``known`` holds the weights of the values given to it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._emitted = 0
        self.known: dict[int, int] = {}

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise Limit(f"it runs for more than {self._seconds:g} seconds")

    def emit(self, value: Any) -> Any:
        """A value that goes to the output as text."""
        text = self.measure(value)
        if not isinstance(text, str):
            text = str(text)
        self._emitted += len(text)
        if self._emitted > OUTPUT_LIMIT:
            raise Limit(f"it writes more than {OUTPUT_LIMIT:,} characters")
        return text

    def measure(self, value: Any) -> Any:
        """Return a value that is within limits with every shared part counted each time.

        So a list of a list of a list … that holds each twice is not taken for a small one.
        """
        self.check()
        if type(value) is str:
            check_size(len(value))
            return value
        check_size(self.weigh(value))
        return value

    def weigh(self, value: Any) -> int:
        weight, pending, seen = 0, [value], 0
        while pending and weight <= VALUE_LIMIT:
            item = pending.pop()
            seen += 1
            if seen % 4096 == 0:
                self.check()
            known = self.known.get(id(item))
            weight += known or ITEM
            if known is not None:
                continue
            if isinstance(item, (str, bytes)):
                weight += len(item)
            elif isinstance(item, int):
                _check_bits(item.bit_length())
            elif isinstance(item, Mapping):
                pending.extend(item.keys())
                pending.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset, *_VIEWS)):
                pending.extend(item)
            elif isinstance(item, Namespace):
                pending.append(object.__getattribute__(item, "_Namespace__attrs"))
        return weight


BUDGET: ContextVar[Budget] = ContextVar("budget of the chat template that is running")


def check_size(size: int) -> None:
    if size > VALUE_LIMIT:
        raise Limit(f"it makes a value of more than {VALUE_LIMIT:,} characters")


def _check_bits(bits: int) -> None:
    if bits > NUMBER_BITS:
        raise Limit("it computes with numbers that are too large")


def _check_count(value: Any) -> None:
    if isinstance(value, (int, float)) and not abs(value) <= COUNT_LIMIT:
        raise Limit(f"it asks for more than {COUNT_LIMIT:,} of something")


def _check_percent(template: Any) -> None:
    """The format string of ``%``."""
    if isinstance(template, str) and (
        len(template) > FORMAT_LIMIT
        or any(
            width == "*" or int(width or 0) > WIDTH_LIMIT
            for found in _PERCENT.finditer(template)
            for width in found.groups()
        )
    ):
        raise Limit("it uses a format string that is too wide")


def _check_braces(template: str) -> None:
    """The format string of ``str.format``."""
    wide = len(template) > FORMAT_LIMIT or any(
        "{" in spec or any(int(n) > WIDTH_LIMIT for n in re.findall(r"\d{1,9}", spec))
        for _, _, spec, _ in Formatter().parse(template)
        if spec
    )
    if wide:
        raise Limit("it uses a format string that is too wide")


def _check_replacement(
    text: Any, old: Any = "", new: Any = "", *_count: Any, **_named: Any
) -> None:
    if all(isinstance(value, str) for value in (text, old, new)):
        check_size(len(text) + text.count(old) * len(new))


def _check_join(separator: str, items: Any) -> None:
    check_size(BUDGET.get().weigh(items) + len(separator) * len(items))


def _check_backward(text: str, *needles: Any, **_named: Any) -> None:
    """Python searches backwards in quadratic time."""
    longest = max((len(n) for n in needles if isinstance(n, str)), default=0)
    if len(text) * longest > BACKWARD_LIMIT:
        raise Limit("it searches a long text backwards for a long one")


# What is checked before a filter or a method runs, by its name; the arguments are those of Jinja's
# filter (without the environment) or the method's with the string in front.


def _check_indent(text: Any, width: Any = 4, *_more: Any, **_named: Any) -> None:
    _check_count(width)
    each = len(width) if isinstance(width, str) else width
    check_size(len(str(text)) + (str(text).count("\n") + 1) * int(each))


def _check_sum(items: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, (int, float)):
        raise Limit("it adds up what are not numbers")


def _check_numbers(*values: Any, **named: Any) -> None:
    for value in (*values, *named.values()):
        _check_count(value)


_BEFORE_FILTER: dict[str, Callable[..., None]] = {
    "batch": _check_numbers,
    "center": _check_numbers,
    "format": lambda template, *_values, **_named: _check_percent(template),
    "indent": _check_indent,
    "replace": _check_replacement,
    "round": lambda _value, *rest, **named: _check_numbers(*rest, **named),
    "slice": _check_numbers,
    "sum": _check_sum,
}
_BEFORE_METHOD: dict[str, Callable[..., None]] = {
    "center": _check_numbers,
    "format": lambda template, *_values, **_named: _check_braces(template),
    "format_map": lambda template, *_values, **_named: _check_braces(template),
    "join": _check_join,
    "ljust": _check_numbers,
    "replace": _check_replacement,
    "rfind": _check_backward,
    "rindex": _check_backward,
    "rjust": _check_numbers,
    "rpartition": _check_backward,
    "rsplit": _check_backward,
    "zfill": _check_numbers,
}


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that measures what it is given and what it makes."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0
    before = _BEFORE_FILTER.get(name)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        for value in (*args[skipped:], *kwargs.values()):
            budget.measure(value)
        if before is not None:
            before(*args[skipped:], **kwargs)
        made = function(*args, **kwargs)
        return _counted(budget, made) if isinstance(made, Iterator) else budget.measure(made)

    return guarded


def _counted(budget: Budget, items: Iterator[Any]) -> Iterator[Any]:
    """The items of a lazy filter, as many as a list may hold."""
    for number, item in enumerate(items):
        budget.check()
        check_size(number * ITEM)
        yield item


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment, value: Any, d: Any = "", attribute: str | int | None = None
) -> str:
    budget, items = BUDGET.get(), list(value)
    if attribute is not None:
        items = list(map(make_attrgetter(environment, attribute), items))
    check_size(budget.weigh(items) + budget.weigh(d) * len(items))
    return str(d).join(map(str, items))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it in prompts: characters as they are, nothing escaped."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise Limit("it indents JSON by other than 0 to 16")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _range(*bounds: int) -> range:
    made = range(*bounds)
    if made and len(made) > COUNT_LIMIT:
        raise Limit(f"it asks for more than {COUNT_LIMIT:,} of something")
    return made


def _raise_exception(message: Any) -> None:
    raise Refusal(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > FORMAT_LIMIT or _TIME_WIDTH.search(form):
        raise Limit("it uses a format string that is too wide")
    return datetime.now().strftime(form)


class _Dict:
    """``dict(...)`` in a template: the constructor, and not the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """Jinja's namespace without names that Python gives a meaning."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        values = dict(*given, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not hold {name!r}")


class _Generation(Extension):
    """``{% generation %}`` marks what the model says, for training; a prompt ignores the mark."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Meter(NodeTransformer):
    """Leads values, output and repeated bodies past the budget (see the module's text)."""

    @staticmethod
    def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("tick"), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_FilterBlock = _body

    def _value(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return self._call("measure", node).set_lineno(node.lineno)

    visit_Dict = visit_List = _value

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._value(node) if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("chain", *node.nodes).set_lineno(node.lineno)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        # A constant is output like any other, and so it is counted when a loop repeats it.
        return nodes.Const(node.data).set_lineno(node.lineno)


@jinja2.pass_eval_context
def _emit(_context: Any, value: Any) -> Any:
    # It asks for the evaluation context so that Jinja does not call it while compiling.
    return BUDGET.get().emit(value)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates: transformers' settings, and the limits."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=_emit,
        )
        known = self.filters
        self.filters = {name: _guarded(name, known[name]) for name in _FILTERS.split()}
        self.filters["join"] = _guarded("join", _join)
        self.filters["tojson"] = _guarded("tojson", _tojson)
        self.globals = {
            "range": _range,
            "dict": _Dict(),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Meter().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    @staticmethod
    def tick() -> None:
        BUDGET.get().check()

    @staticmethod
    def measure(value: Any) -> Any:
        return BUDGET.get().measure(value)

    @staticmethod
    def chain(*parts: Any) -> str:
        """``a ~ b ~ c``"""
        check_size(BUDGET.get().weigh(parts))
        return "".join(map(str, parts))

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        for value in (*args, *kwargs.values()):
            budget.measure(value)
        method = getattr(called, "__wrapped__", called)  # str.format, in the sandbox's dress
        target, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(target, (str, bytes)):
            if name in _BANNED_METHODS:
                raise SecurityError(f"the method {name} is not for chat templates")
            if name == "join" and args:
                args = (list(args[0]), *args[1:])  # an iterator has no length to check
            if (before := _BEFORE_METHOD.get(name)) is not None:
                before(target, *args, **kwargs)
        return budget.measure(super().call(context, called, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = BUDGET.get()
        weights = [budget.weigh(left), budget.weigh(right)]
        check_size(sum(weights))
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "%" and not numbers:
            _check_percent(left)
        elif operator == "*" and not numbers:
            for count, weight in ((left, weights[1]), (right, weights[0])):
                if isinstance(count, int):
                    check_size(count * weight)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        return budget.measure(super().call_binop(context, operator, left, right))
