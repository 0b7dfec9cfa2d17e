"""Editing what a problem's functions read changes the answer at the next call; what was not edited compiles nothing."""

import array
import collections
import contextvars
import ctypes
import functools
import gc
import mmap
import sys
import types
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.core.captures import jit

WHOLE = 1
RATE, TABLE, LARGE = 1.0, np.arange(3.0), np.zeros((100, 100))
CONFIG = types.ModuleType("config")
CONFIG.rates = types.SimpleNamespace(low=2.0, unread=0.0)
NESTED = {"prices": [1.0, (2.0, {"deep": 3.0})]}
WEIGHT = jnp.asarray(2.0)
PRICES, COSTS = (types.ModuleType(f"imported_package.{name}") for name in ("prices", "inner.costs"))
PACKAGE, INNER = types.ModuleType("imported_package"), types.ModuleType("imported_package.inner")
PACKAGE.prices, PACKAGE.inner, INNER.costs, PRICES.RATE, COSTS.RATE = PRICES, INNER, COSTS, 1.0, 1.0
sys.modules |= {module.__name__: module for module in (PACKAGE, INNER, PRICES, COSTS)}


@dataclass
class Settings:
    rate: float = 3.0
    arrays: Any = None


@dataclass(slots=True)
class Slotted:
    rate: float = 3.0


SETTINGS, SLOTTED = Settings(arrays={"a": np.ones(2)}), Slotted()


class Priced:
    rate = 2.0


IN_SET = Priced()
OBJECTS = {IN_SET}


class Model:
    scale = 2.0

    def __init__(self):
        self.price = 5.0

    @property
    def twice(self):
        return 2 * self.price * RATE

    def pay(self, x):
        return x * self.twice * self.scale

    @staticmethod
    def plain(x):
        return x * RATE

    def __call__(self, x):
        return self.pay(x)


class Rates(dict):
    scale = 2.0

    def rate(self):
        return self["a"] * self.scale


class Pair(NamedTuple):
    low: float
    high: float

    def sum(self):
        return self.low + self.high


PAIR_SUM = Pair.sum
MODEL, RATES, PAIR, SHARED = Model(), Rates(a=2.0), Pair(1.0, 2.0), {"a": 1.0, "b": 2.0}
NUMBERS, BYTES = array.array("d", [1.0, 2.0]), bytearray([1, 2])
VIEW, MEMORY = SHARED.values(), memoryview(TABLE)


def with_attributes(kind):
    """A subclass of a built-in type, as users derive them."""
    return type(f"My{kind.__name__}", (kind,), {"read": lambda self: self.rate})


CONTENTS = {
    list: ([1.0],),
    dict: ({"a": 1.0},),
    tuple: ((1.0,),),
    set: ({1.0},),
    frozenset: ({1.0},),
    collections.deque: ([1.0],),
    collections.OrderedDict: ({"a": 1.0},),
    np.ndarray: ((2,),),
    bytearray: (b"a",),
    bytes: (b"a",),
    array.array: ("d", [1.0]),
    functools.partial: (abs,),
    int: (1,),
    float: (1.0,),
    str: ("a",),
}
DERIVED = {kind: with_attributes(kind)(*contents) for kind, contents in CONTENTS.items()}
MyFloat = type(DERIVED[float])
MAPPED, IN_C = mmap.mmap(-1, 8), (ctypes.c_double * 2)(1.0, 2.0)
FACTORY = collections.defaultdict(lambda: 1.0)
CONTEXT = contextvars.ContextVar("rate", default=1.0)
ERROR = ValueError(1.0)


class Private:
    __slots__ = ("__rate",)

    def __init__(self):
        self.__rate = 1.0

    def read(self):
        return self.__rate

    def write(self, rate):
        self.__rate = rate


class Meta(type):
    rate = 1.0


class WithMeta(metaclass=Meta):
    pass


class Cheap:
    def read(self):
        return 1.0


class Dear:
    def read(self):
        return 9.0


class Sold(Cheap):
    pass


PRIVATE, SOLD = Private(), Sold()
REFERENCE, PROXY = weakref.ref(MODEL), weakref.proxy(MODEL)


class Tree(eqx.Module):
    weight: jax.Array
    shape: Any = eqx.field(static=True)

    def __call__(self, x):
        return self.shape(x) * self.weight * RATE


def helper(x):
    return x * RATE


jitted_helper = jax.jit(helper)


def countdown(x, n=2):  # calls itself
    return x * RATE if n == 0 else countdown(x, n - 1)


def one_way(x, n=1):
    return x * TABLE[1] if n == 0 else other_way(x, n)


def other_way(x, n):
    return one_way(x, n - 1)


def body(carry, _):
    return carry * RATE, None


def with_defaults(x, power=2.0, *, factor=3.0):
    return factor * x**power


def importing(x):
    import test_captures

    return x * test_captures.RATE


def importing_a_name(x):
    from test_captures import RATE

    return x * RATE


def importing_and_renaming(x):
    import test_captures as renamed

    rate = renamed.RATE
    return x * rate


def importing_two(x):
    import math

    import test_captures

    return x * math.sqrt(4.0) * test_captures.RATE


def importing_from_a_package(x):
    from imported_package import prices

    return x * prices.RATE


def importing_a_package(x):
    import imported_package.prices

    return x * imported_package.prices.RATE


def importing_deep(x):
    import imported_package.inner.costs as costs

    return x * costs.RATE


def importing_either(x):
    try:
        import test_captures as tried
    except ImportError:
        import math as tried
    return x * tried.RATE


def importing_or_not(x, other=False):
    import math as either

    if not other:
        import test_captures as either
    return (lambda: x * either.RATE)()


def counting_within(x):
    def once():
        WHOLE = 1
        return (lambda: WHOLE)()

    return x * once() * WHOLE


def with_many_names(number, line="import test_captures", rate="test_captures.RATE"):
    """A function whose later instructions need an extended argument."""
    sums = "\n".join(f"    a{i} = 0.0 * RATE_{i}" for i in range(number))
    names = {f"RATE_{i}": 1.0 for i in range(number)} | {"test_captures": sys.modules[__name__]}
    exec(f"def many(x):\n{sums}\n    {line}\n    return x * {rate}", names)
    return names["many"]


def in_a_package(line, rate):
    names = {"__package__": "imported_package.inner", "__name__": "imported_package.inner.mine"}
    exec(f"def inside(x):\n    {line}\n    return x * {rate}", names)
    return names["inside"]


def nested_function(x):
    return (lambda y: y * [RATE for _ in range(2)][1])(x)


def closure(value):
    def function(x):
        return x * value + np.sum(value)

    def assign(new):
        nonlocal value
        value = new

    function.assign = assign
    return function


CLOSED, CLOSED_ARRAY = closure(2.0), closure(np.ones(2))
DECORATED = functools.wraps(helper)(lambda x: helper(x) + 1)
PARTIAL = functools.partial(lambda x, settings: x * settings["rate"], settings={"rate": 2.0})


def set_global(name, value):
    return lambda: globals().__setitem__(name, value)


def in_place(numbers, value):
    return lambda: numbers.__setitem__(0, value)


class NewShape(Model):
    def pay(self, x):
        return -x


EDITS = {
    "a global": (lambda x: x * RATE, set_global("RATE", 8.0)),
    "of another type": (lambda x: x * RATE, set_global("RATE", 8)),
    "the sign of zero": (lambda x: x / (RATE - RATE) * jnp.copysign(1.0, ZERO), set_global("ZERO", -0.0)),
    "an array, in place": (lambda x: x * TABLE[0], in_place(TABLE, 7.0)),
    "a large array, in place": (lambda x: x + LARGE.sum(), in_place(LARGE, 7.0)),
    "a transposed array, in place": (lambda x, t=LARGE.T: x + t.sum(), in_place(LARGE, 7.0)),
    "an array's shape": (lambda x: x * SHAPED.shape[0], lambda: SHAPED.resize((2, 3), refcheck=False)),
    "a view": (lambda x, view=TABLE[:2]: x * view[0], in_place(TABLE, 7.0)),
    "a JAX array": (lambda x: x * WEIGHT, lambda: set_global("WEIGHT", WEIGHT + 1)()),
    "an attribute of a module": (lambda x: x * CONFIG.rates.low, lambda: setattr(CONFIG.rates, "low", 9.0)),
    "a module's object": (
        lambda x: x * CONFIG.rates.low,
        lambda: setattr(CONFIG, "rates", types.SimpleNamespace(low=6.0)),
    ),
    "deep inside": (
        lambda x: x * NESTED["prices"][1][1]["deep"],
        lambda: NESTED["prices"][1][1].__setitem__("deep", 4.0),
    ),
    "a longer list": (lambda x: x * len(NESTED["prices"]), lambda: NESTED["prices"].append(0)),
    "a set": (lambda x: x * len(SET), lambda: SET.add(3)),
    "a data class": (lambda x: x * SETTINGS.rate, lambda: setattr(SETTINGS, "rate", 9.0)),
    "a data class's array": (lambda x, s=SETTINGS: x * s.arrays["a"][0], in_place(SETTINGS.arrays["a"], 9.0)),
    "a slot": (lambda x: x * SLOTTED.rate, lambda: setattr(SLOTTED, "rate", 9.0)),
    "a default": (with_defaults, lambda: setattr(with_defaults, "__defaults__", (3.0,))),
    "a keyword default": (with_defaults, lambda: with_defaults.__kwdefaults__.update(factor=4.0)),
    "a new keyword default": (with_defaults, lambda: setattr(with_defaults, "__kwdefaults__", {"factor": 5.0})),
    "a cell": (CLOSED, lambda: CLOSED.assign(5.0)),
    "a cell's array": (CLOSED_ARRAY, lambda: CLOSED_ARRAY.assign(np.full(2, 3.0))),
    "a function's function": (lambda x: helper(x), set_global("RATE", 8.0)),
    "another function": (lambda x: helper(x), set_global("helper", lambda x: -x)),
    "a jitted function's": (lambda x: jitted_helper(x), set_global("RATE", 8.0)),
    "a loop's body": (lambda x: jax.lax.scan(body, x, length=2)[0], set_global("RATE", 8.0)),
    "a recursive function's": (countdown, set_global("RATE", 8.0)),
    "a cycle's": (one_way, in_place(TABLE, 7.0) if False else lambda: TABLE.__setitem__(1, 7.0)),
    "a nested function's": (nested_function, set_global("RATE", 8.0)),
    "a decorated function's": (DECORATED, set_global("RATE", 8.0)),
    "a partial's keyword": (PARTIAL, lambda: PARTIAL.keywords["settings"].update(rate=7.0)),
    "a vmapped function's": (lambda x: jax.vmap(helper)(x[None])[0], set_global("RATE", 8.0)),
    "an import's": (importing, lambda: set_imported(8.0)),
    "an imported name": (importing_a_name, lambda: set_imported(8.0)),
    "a renamed import's": (importing_and_renaming, lambda: set_imported(8.0)),
    "one of two imports'": (importing_two, lambda: set_imported(8.0)),
    "an import's from a package": (importing_from_a_package, lambda: setattr(PRICES, "RATE", 8.0)),
    "an import's that is tried": (importing_either, lambda: set_imported(8.0)),
    "one of two imports' of a name": (importing_or_not, lambda: set_imported(8.0)),
    "a number named like a local one": (counting_within, set_global("WHOLE", 8)),
    **{
        f"{what} among {number} names": (with_many_names(number, *lines), lambda: set_imported(8.0))
        for number in (130, 300)
        for what, lines in {
            "an import's": (),
            "a renamed import's": ("import test_captures as renamed", "renamed.RATE"),
            "an imported name": ("from test_captures import RATE as rate", "rate"),
            "a global's": ("pass", "test_captures.RATE"),
        }.items()
    },
    **{
        f"a relative import's, {line}": (in_a_package(line, rate), lambda: setattr(COSTS, "RATE", 8.0))
        for line, rate in {
            "from . import costs": "costs.RATE",
            "from .costs import RATE as rate": "rate",
            "from ..inner import costs": "costs.RATE",
            "from .. import inner": "inner.costs.RATE",
        }.items()
    },
    "a package's": (importing_a_package, lambda: setattr(PRICES, "RATE", 8.0)),
    "an import's from deep in a package": (importing_deep, lambda: setattr(COSTS, "RATE", 8.0)),
    "a bound method's object": (MODEL.pay, lambda: setattr(MODEL, "price", 9.0)),
    "a bound method's property": (MODEL.pay, set_global("RATE", 8.0)),
    "a class's number": (MODEL.pay, lambda: setattr(Model, "scale", 9.0)),
    "a class's method": (lambda x: MODEL(x), lambda: setattr(Model, "pay", NewShape.pay)),
    "a static method's": (Model.plain, set_global("RATE", 8.0)),
    "a callable object": (MODEL, lambda: setattr(MODEL, "price", 9.0)),
    "an object's class": (lambda x: MODEL.pay(x), lambda: setattr(MODEL, "__class__", NewShape)),
    "a module's own method": (Tree(jnp.asarray(2.0), helper), set_global("RATE", 8.0)),
    "the code": (lambda x: helper(x), lambda: setattr(helper, "__code__", (lambda x: x + 100).__code__)),
    "a name that was a builtin": (lambda x: x * max(1, 2), set_global("max", min)),
    "an object in a set": (lambda x: x * sum(s.rate for s in OBJECTS), lambda: setattr(IN_SET, "rate", 9.0)),
    "the class of a dictionary": (lambda x: x * RATES.rate(), lambda: setattr(Rates, "scale", 9.0)),
    "the class of a named tuple": (lambda x: x * PAIR.sum(), lambda: setattr(Pair, "sum", lambda self: 8.0)),
    "a dictionary's view": (lambda x: x * sum(VIEW), lambda: SHARED.update(a=9.0)),
    "Python's array": (lambda x: x * NUMBERS[0], in_place(NUMBERS, 7.0)),
    "bytes that are edited": (lambda x: x * float(BYTES[0]), in_place(BYTES, 7)),
    "a mapped file": (lambda x: x * float(MAPPED[0]), in_place(MAPPED, 7)),
    "an array of C": (lambda x: x * IN_C[0], in_place(IN_C, 7.0)),
    "what a weak reference leads to": (lambda x: x * REFERENCE().price, lambda: setattr(MODEL, "price", 9.0)),
    "its method": (lambda x: REFERENCE()(x), lambda: setattr(MODEL, "price", 9.0)),
    "what a proxy leads to": (lambda x: x * PROXY.price, lambda: setattr(MODEL, "price", 9.0)),
    "what a dictionary makes": (
        lambda x: x * FACTORY.default_factory(),
        lambda: setattr(FACTORY, "default_factory", lambda: 9.0),
    ),
    "a variable of the context": (lambda x: x * CONTEXT.get(), lambda: CONTEXT.set(9.0)),
    "an exception's": (lambda x: x * ERROR.args[0], lambda: setattr(ERROR, "args", (9.0,))),
    "a private slot": (lambda x: x * PRIVATE.read(), lambda: PRIVATE.write(9.0)),
    "a class's class": (lambda x: x * WithMeta.rate, lambda: setattr(Meta, "rate", 9.0)),
    "what a class inherits from": (lambda x: x * SOLD.read(), lambda: setattr(Sold, "__bases__", (Dear,))),
    "a number of an own type": (lambda x: x * DERIVED_NUMBER, set_global("DERIVED_NUMBER", MyFloat(3.0))),
    "a memory view": (lambda x: x * MEMORY[0], in_place(TABLE, 7.0)),
}
EDITS |= {
    f"an attribute of a {kind.__name__} of an own class": (
        lambda x, thing=thing: x * thing.read(),
        lambda thing=thing: setattr(thing, "rate", 9.0),
    )
    for kind, thing in DERIVED.items()
}
DERIVED_NUMBER = MyFloat(2.0)
ZERO, SHAPED, SET = 0.0, np.ones((3, 2)), {1, 2}


def set_imported(value):
    import test_captures

    test_captures.RATE = value


@pytest.fixture(autouse=True)
def _put_back():
    """Edits of this module and of what it holds are undone."""
    names = dict(globals())
    state = [(o, dict(vars(o))) for o in (CONFIG, CONFIG.rates, SETTINGS, MODEL, PRICES, COSTS)]
    arrays = [(a, a.copy()) for a in (TABLE, LARGE, SHAPED, SETTINGS.arrays["a"])]
    code, scale, pay = helper.__code__, Model.scale, Model.pay
    for thing in (DERIVED_NUMBER, *DERIVED.values()):
        thing.rate = 2.0
    yield
    MAPPED[0], IN_C[0], Meta.rate, ERROR.args, Sold.__bases__ = 1, 1.0, 1.0, (1.0,), (Cheap,)
    FACTORY.default_factory = lambda: 1.0
    CONTEXT.set(1.0), PRIVATE.write(1.0)
    SLOTTED.rate, with_defaults.__defaults__, with_defaults.__kwdefaults__ = 3.0, (2.0,), {"factor": 3.0}
    helper_now = names["helper"]
    helper_now.__code__, Model.scale, Model.pay, MODEL.__class__ = code, scale, pay, Model
    for thing, before in state:
        vars(thing).update(before)
    for numbers, before in arrays:
        if numbers.shape != before.shape:
            numbers.resize(before.shape, refcheck=False)
        numbers[...] = before
    IN_SET.rate, Rates.scale, Pair.sum, NUMBERS[0], BYTES[0], SHARED["a"] = 2.0, 2.0, PAIR_SUM, 1.0, 1, 1.0
    NESTED["prices"][:] = [1.0, (2.0, {"deep": 3.0})]
    PARTIAL.keywords["settings"]["rate"] = 2.0
    SET.discard(3)
    CLOSED.assign(2.0), CLOSED_ARRAY.assign(np.ones(2))
    for name in set(globals()) - set(names):
        del globals()[name]
    globals().update(names)


def apply(function, x):
    return function(x)


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_is_seen_and_nothing_else_compiles(what):
    function, edit = EDITS[what]
    carried = bj.core.functions.as_pytree("function", function)
    run, x = jit(apply), jnp.asarray(1.5)
    for _ in range(3):
        np.testing.assert_array_equal(run(carried, x), function(x))
    assert run._cache_size() == 1
    edit()
    with jax.disable_jit():  # JAX's own caches of jitted helpers and of loops would not see it
        right = function(x)
    for _ in range(3):
        np.testing.assert_allclose(run(carried, x), right, rtol=1e-15)
    assert run._cache_size() == 2


def test_a_memory_view_that_was_released_is_told_by_its_identity():
    view = memoryview(bytearray(b"a"))
    view.release()
    carried = bj.core.functions.as_pytree("function", lambda x, _view=view: 2 * x)
    assert jit(apply)(carried, jnp.asarray(1.5)) == 3


def test_a_proxy_whose_object_is_gone_says_so():
    gone = weakref.proxy(Model())
    function = bj.core.functions.as_pytree("function", lambda x: x * gone.price)
    with pytest.raises(ReferenceError):
        jit(apply)(function, jnp.asarray(1.5))


def test_what_a_weak_reference_leads_to_is_not_kept_alive():
    thing = Model()
    reference = weakref.ref(thing)
    function = bj.core.functions.as_pytree("function", lambda x: x * (0.0 if reference() is None else 1.0))
    run = jit(apply)
    assert run(function, jnp.asarray(1.5)) == 1.5
    del thing
    gc.collect()
    assert reference() is None
    assert run(function, jnp.asarray(1.5)) == 0
