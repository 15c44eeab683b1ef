"""Chat templates as hostile programs: what they may not do, and what they may not spend."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mlxedge.errors import TemplateError
from mlxedge.tokenizer.chat import SOURCE_LIMIT, render

MESSAGES = [{"role": "user", "content": "Hi"}]


def run(source: str, **variables: Any) -> str:
    return render(source, {"messages": MESSAGES, **variables}, time_limit=0.5)


def growing(step: str) -> str:
    return (
        "{% set ns = namespace(v='a') %}{% for i in range(60) %}{% set ns.v = "
        + step.replace("v", "ns.v")
        + " %}{% endfor %}{{ ns.v }}"
    )


def chain(length: int) -> str:
    """Namespaces that hold the next one twice, built so that none is large when it is set."""
    names = "".join(f"{{% set n{i} = namespace() %}}" for i in range(length))
    links = "".join(
        f"{{% set n{i}.{side} = n{i + 1} %}}" for i in range(length - 1) for side in "ab"
    )
    return names + links


SPENDING = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "recursion in twos": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "filters in a loop": "{% for i in range(9999) %}{{ range(99999)|map('string')|join }}"
    "{% endfor %}",
    "range": "{{ range(10 ** 18) }}",
    "repeated text": "{{ 'a' * 10 ** 10 }}",
    "repeated list": "{{ 10 ** 9 * [0] }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "large number": "{% set x = ('f' * 1000000)|int(0, 16) %}{{ x * x }}",
    "squares": growing("v * v").replace("'a'", "3"),
    "doubled by ~": growing("v ~ v"),
    "doubled by +": growing("v + v"),
    "doubled by join": growing("[v, v]|join"),
    "doubled by format": growing("'%s%s' % (v, v)"),
    "doubled list": growing("[v, v]"),
    "doubled tuple": growing("(v, v)"),
    "doubled dict": growing("{'x': v, 'y': v}"),
    "doubled by dict()": growing("dict(x=v, y=v)"),
    "doubled views": growing("{'x': v, 'y': v}.items()"),
    "doubled namespace": growing("namespace(x=v, y=v)"),
    "linked namespaces, printed": chain(60) + "{{ n0 }}",
    "linked namespaces, as text": chain(60) + "{{ n0|string|length }}",
    "linked namespaces, joined": chain(60) + "{{ [n0, n0]|join }}",
    "arguments": "{% macro f(n) %}{% if n %}{{ f(n-1, varargs, varargs) }}{% else %}{{ varargs }}"
    "{% endif %}{% endmacro %}{{ f(100) }}",
    "constant text": "{% for i in range(99999) %}" + "x" * 50_000 + "{% endfor %}",
    "captured text": "{% set t %}{% for i in range(99999) %}"
    + "x" * 50_000
    + "{% endfor %}{% endset %}",
    "captured value": "{% set s = 'a' * 100000 %}{% set t %}{% for i in range(99999) %}{{ s }}"
    "{% endfor %}{% endset %}",
    "center filter": "{{ 'a'|center(10 ** 9) }}",
    "center method": "{{ 'a'.center(10 ** 9) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent precision": "{{ '%.1000000000f' % 1 }}",
    "percent star": "{{ '%*d' % (10 ** 9, 1) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "date width": "{{ strftime_now('%1000000000Y') }}",
    "replace method": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "join filter": "{{ range(99999)|join('a' * 100000) }}",
    "join method": "{{ ('a' * 100000).join('b' * 100000) }}",
    "join method over a filter": "{{ ('a' * 100000).join(range(99999)|map('string')) }}",
    "searching backwards": "{{ ('a' * 1000000).rfind('b' ~ 'a' * 500000) }}",
    "slice": "{{ [1]|slice(10 ** 9)|list }}",
    "batch": "{{ [1]|batch(10 ** 9, 0)|list }}",
    "indent": "{{ ('a\n' * 100000)|indent(100000) }}",
    "sum of lists": "{{ ([[1]] * 10000)|sum(start=[]) }}",
    "round": "{{ 1.5|round(10 ** 9, 'floor') }}",
    "indented JSON": "{{ [1]|tojson(indent=10 ** 9) }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long sum": "{{ " + "+".join("1" * 3000) + " }}",
    "deep conditions": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "deep loops": "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "length of the source": "x" * (SOURCE_LIMIT + 1),
}


@pytest.mark.parametrize("name", SPENDING)
def test_spending_is_bounded(name: str) -> None:
    with pytest.raises(TemplateError, match=r"was stopped|is longer than"):
        render(SPENDING[name], {}, time_limit=0.2)


FORBIDDEN = {
    "class of a text": "{{ ''.__class__.__mro__ }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "code of a function": "{{ range.__code__.co_consts }}",
    "self": "{{ self.__init__.__globals__ }}",
    "changing messages": "{{ messages.append(1) }}",
    "changing a message": "{{ messages[0].update({'role': 'system'}) }}",
    "a private namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "tabs": "{{ 'a'.expandtabs(9) }}",
    "including files": "{% include '/etc/passwd' %}",
    "importing": "{% import 'os' as os %}{{ os }}",
    "random text": "{{ lipsum(5) }}",
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_not_allowed(name: str) -> None:
    with pytest.raises(TemplateError):
        run(FORBIDDEN[name])
    assert MESSAGES == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ raise_exception.__globals__ }}",
    ],
)
def test_private_attributes_are_undefined(source: str) -> None:
    assert run(source) == ""


def test_limits_hold_off_the_main_thread() -> None:
    caught: list[Exception] = []

    def work() -> None:
        try:
            run(SPENDING["nested loops"])
        except TemplateError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "0.5 seconds" in str(caught[0])


def test_a_refusal_says_why() -> None:
    with pytest.raises(TemplateError, match="only user and assistant"):
        run("{{ raise_exception('only user and assistant') }}")


def test_a_syntax_error_says_where() -> None:
    with pytest.raises(TemplateError, match="line 2"):
        run("a\n{% if %}")


def test_what_is_not_json_is_named_only() -> None:
    assert run("{{ image }} {{ image.path is defined }}", image=threading.Lock()) == "<lock> False"


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_long_messages_are_no_attack(size: int) -> None:
    source = "{% for m in messages %}{{ m.role + ': ' + m.content | trim ~ '\n' }}{% endfor %}"
    text = "é" * size
    messages = [{"role": "user", "content": text}] * 3
    assert render(source, {"messages": messages}) == f"user: {text}\n" * 3


def test_many_messages_are_no_attack() -> None:
    source = "{% for m in messages %}{{ loop.index }}/{{ messages | length }} {% endfor %}"
    messages = [{"role": "user", "content": "x", "parts": [{"type": "text"}] * 20}] * 2000
    assert render(source, {"messages": messages}).endswith("2000/2000 ")
