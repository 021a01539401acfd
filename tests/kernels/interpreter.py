"""Triton's interpreter without half of its time.

It replaces the functions of `triton.language` before each call of a `@triton.jit` function, also of
one that another calls, whereby it looks through all members of these modules; a step of a loss
makes a thousand such searches. Once a launch is enough: nothing puts the functions back before its
end.
"""

import inspect
from collections.abc import Callable
from typing import Any


def replace_language_once() -> None:
    """Makes the interpreter of this process replace each module's functions once a launch."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    modules: dict[Callable[..., Any], tuple[bool, ...]] = {}
    replaced: set[tuple[bool, ...]] = set()

    def once(function: Callable[..., Any]) -> Any:
        if function not in modules:
            seen = [v for v in function.__globals__.values() if inspect.ismodule(v)]
            modules[function] = tl in seen, tl.core in seen
        if modules[function] in replaced:
            return interpreter._LangPatchScope()
        replaced.add(modules[function])
        scope = replace(function)
        put_back = scope.restore

        def restore() -> None:  # a launch's scope only: the others are dropped
            put_back()
            replaced.clear()

        scope.restore = restore
        return scope

    interpreter._patch_lang = once
