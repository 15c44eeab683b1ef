"""Chat templates: untrusted Jinja programs that turn messages into a prompt.

A template comes with a model, so it is treated as hostile. It runs in Jinja's immutable sandbox
(no private attributes, no changes to what it is given) with the additions of transformers
(``tojson``, ``raise_exception``, ``strftime_now``, ``{% break %}``, ``{% generation %}``), and
within limits that hold on any thread, without signals:

- time: a deadline is checked at every loop iteration, macro, function and filter call, operator
  and piece of output. Between two checks runs at most one built-in operation, on values of limited
  size; such an operation is not interrupted.
- size: no value (a string, a list however nested, a number) and no output may exceed a limit; what
  could leap over it in one step (multiplication, powers, padding, format widths, replacement,
  joining) is measured before it is done.
- the template itself: its length, and with it the time to compile it.

Whatever breaks a limit, and every other error of a template, is a TemplateError.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2.sandbox import SecurityError

from mlxedge.errors import TemplateError
from mlxedge.tokenizer.sandbox import BUDGET, VALUE_LIMIT, Budget, Limit, Refusal, Sandbox

#: Seconds that a rendering may take.
TIME_LIMIT = 5.0
#: Characters that a template may have; the longest in use have about 17,000.
SOURCE_LIMIT = 1 << 17


@functools.lru_cache(maxsize=1)
def _sandbox() -> Sandbox:
    return Sandbox()


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    return _sandbox().from_string(source)


def render(source: str, variables: Mapping[str, Any], time_limit: float = TIME_LIMIT) -> str:
    """What a chat template makes of ``variables``, within the limits of the module's text.

    ``variables`` may hold anything; what is not JSON reaches the template as the name of its type
    in angle brackets. Raises TemplateError.
    """
    if len(source) > SOURCE_LIMIT:
        raise TemplateError(f"the chat template is longer than {SOURCE_LIMIT:,} characters")
    budget = Budget(time_limit)
    token = BUDGET.set(budget)
    try:
        return _compiled(source).render({k: plain(v, budget) for k, v in variables.items()})
    except Limit as error:
        raise TemplateError(f"the chat template was stopped: {error}") from None
    except SecurityError as error:
        raise TemplateError(f"the chat template does what is not allowed: {error}") from error
    except Refusal as error:
        raise TemplateError(f"the chat template refuses these messages: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
        ) from error
    except (RecursionError, MemoryError, SyntaxError) as error:  # Python's own limits on nesting
        raise TemplateError("the chat template was stopped: it nests too deeply") from error
    except Exception as error:
        # A template is a program: it may fail in any way that a program can.
        raise TemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error
    finally:
        BUDGET.reset(token)


def plain(value: Any, budget: Budget) -> Any:
    """A copy of a value that holds nothing but JSON's types, with its weight noted."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    made: Any
    if isinstance(value, Mapping):
        made = {plain(key, budget): plain(item, budget) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        made = [plain(item, budget) for item in value]
    else:
        return f"<{type(value).__name__}>"
    weight = budget.weigh(made)
    if weight > VALUE_LIMIT:
        raise Limit(f"the messages have more than {VALUE_LIMIT:,} characters")
    budget.known[id(made)] = weight
    return made
