"""Values of LaTeX: SymPy expressions by math-verify's grammar, and whether two of them are equal.

Only workers of data/maths.py import this. Formulas, sets, intervals and relations are compared by
math-verify. Numbers are compared here, wherever they stand: exactly where SymPy evaluates to a
fraction, otherwise to 2,000 digits, and never by a difference that is small only in absolute terms.
"""
import functools
import math
import re

import sympy
import sympy.parsing.sympy_parser
import sympy.physics.units  # simplify() imports it, and it reads its own names by parse_expr
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import grader

CASE_SENSITIVE = ConversionConfig(lowercase_symbols=False)  # r/R is not 1
equal_formulas = grader.sympy_symbolic_eq

# math-verify reads 3 4 and 3{4} as 3 + 4, a mixed fraction, and leaves dots and quotes out
MISREAD = re.compile(r"(?<![\w.^\\}])\d+(?:\.\d+)? ?(?:\[|\\?\{)|^\{\d+\} ?\{|\] ?\["
                     r"|\.\s*\.|dots|\d'|\d_0").search


def read_number(text, **_):
    """Stands in for SymPy's parse_expr, which is eval, and to which math-verify's grammar hands
    every number."""
    return sympy.Integer(text) if text.isdigit() else sympy.Float(text)


@functools.lru_cache(maxsize=1024)
def expression(text):
    """(normalised text, SymPy expression or None), by math-verify's grammar for LaTeX. Its reader
    of plain text is left alone: it is eval."""
    latex = normalize_latex(text, NormalizationConfig(units=False, malformed_operators=True,
                                                      nits=True, boxed="none"))
    if re.search(r"\d\s+\d", latex) or MISREAD(text):
        return text, None
    try:
        value = latex2sympy(latex, is_real=not grader.should_treat_as_complex(latex),
                            normalization_config=None, conversion_config=CASE_SENSITIVE)
        if isinstance(value, sympy.Expr | sympy.Tuple | sympy.FiniteSet):  # not i < 5
            value = value.xreplace({one: sympy.I for one in value.free_symbols if one.name == "i"})
        return latex, value
    except MemoryError:
        raise
    except Exception:
        return latex, None


def patch_math_verify():
    """Take numbers out of its hands: reading them, which goes through eval, and comparing them."""
    sympy.parsing.sympy_parser.parse_expr = read_number
    grader.sympy_numeric_eq, grader.sympy_symbolic_eq = equal_leaves, lambda a, b: False


def fractions_of(number):
    """The number with its decimals as fractions, and what may have a closed form in that."""
    if number.has(sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.UnevaluatedExpr):
        number = number.doit()
    return number.xreplace({one: sympy.Rational(str(one)) for one in number.atoms(sympy.Float)})


def evaluated(number, digits):
    """(real, imaginary part) of a number to 20 digits; None where it has no finite value. Neither
    underflows. A part that `digits` digits do not tell from 0 is exactly 0."""
    parts = number.evalf(20, maxn=digits).as_real_imag()
    if not all(part.is_Number and part.is_finite for part in parts):
        return None
    return [part if part.is_comparable else sympy.S.Zero for part in parts]


def distance(a, b):
    """|a - b| of two numbers: exactly 0 where they are equal, otherwise to 20 digits; None where
    one is no number. It is exact where SymPy evaluates to a fraction; other numbers are equal if
    2,000 digits do not tell them apart."""
    a, b = map(sympy.sympify, (a, b))
    if not all(isinstance(one, sympy.Expr) and one.is_number for one in (a, b)):
        return None
    a, b = fractions_of(a), fractions_of(b)
    # Not evaluated: that would write out all digits of 2^{10^9}.
    difference = sympy.Add(a, sympy.Mul(-1, b, evaluate=False), evaluate=False)
    parts = evaluated(difference, 300)
    if parts is None or not any(parts):
        difference = difference.doit()
        if difference.is_Rational:
            return abs(difference)
        parts = evaluated(difference, 2000)
    return parts and abs(parts[0] + sympy.I * parts[1])


def places(number):
    """The decimal places of a number: 3 of 1/8; infinite where its decimals do not end."""
    number = fractions_of(number).doit()
    if not number.is_Rational:
        return math.inf
    twos, fives = (sympy.multiplicity(prime, number.q) for prime in (2, 5))
    return max(twos, fives) if number.q == 2**twos * 5**fives else math.inf


def may_be_rounded(a, b, apart):
    """Whether one of two numbers that are `apart` may be a rounded decimal that stands for the
    other: to six places, or to the shorter one's places if both end; and to six digits where they
    are below 1e-4. 0.9999999 is no 1, as 1 needs no rounding."""
    largest = max(distance(a, 0), distance(b, 0))
    half = 0.5 + 1e-9  # of the last place
    if apart > half * 1e-6:
        return False
    if largest < 1e-4:
        sixth = sympy.Float(10) ** (math.floor(sympy.log(largest.evalf(), 10)) - 5)
        if apart > half * sixth:
            return False
    ends = places(a), places(b)
    shorter = 6 if math.inf in ends else min(ends)
    return shorter >= 6 and bool(apart * 10**shorter <= half)


def equal_leaves(a, b, *_):
    """Whether two numbers, or matrices of them, are equal; stands in for math-verify's comparison,
    to which whatever is small is zero."""
    if a.is_Matrix and b.is_Matrix:
        a, b = a.doit(), b.doit()
        return a.shape == b.shape and all(map(equal_leaves, a.flat(), b.flat()))
    apart = distance(a, b)
    if apart is None:
        return equal_formulas(a, b)
    decimals = a.has(sympy.Float) or b.has(sympy.Float)
    return apart == 0 or decimals and may_be_rounded(a, b, apart)


def upwards(relation):
    """A chain of inequalities in its one order: 2 > x > 1 as 1 < x < 2."""
    if not isinstance(relation, grader.And):
        return relation
    steps = relation._unsorted_args
    if not all(isinstance(step, sympy.Gt | sympy.Ge) for step in steps):
        return relation
    return grader.And(*(step.reversed for step in steps[::-1]), evaluate=False)


def is_solved(relation):
    """Whether an inequality is solved, -2 <= x < 7; x^2 < 4 only repeats the problem."""
    def is_bound(one):
        letters = [side for side in one.args if not side.is_number]
        return len(letters) == 1 and letters[0].is_Symbol
    return isinstance(relation, sympy.And) and all(map(is_bound, relation.args))


def positive_symbols(formula):
    """The symbols that are positive where a formula is real and finite: n of 1/sqrt(n), of
    sqrt(1/n) and of log(n), but not x of sqrt(x^2)."""
    powers = formula.atoms(sympy.Pow, sympy.log) if isinstance(formula, sympy.Expr) else ()
    inside = [one.args[0] for one in powers
              if isinstance(one, sympy.log) or one.exp.is_Rational and one.exp.q % 2 == 0]
    inside = [one.doit() for one in inside]
    return {symbol for one in inside for symbol in (one, 1 / one) if symbol.is_Symbol}


def same_value(gold, pred, error=None):
    """Whether two values without units and equations are equal, or no further apart than error."""
    (gold, a), (pred, b) = expression(gold), expression(pred)
    if gold == pred != "":
        return True
    if a is None or b is None:
        return False
    a, b = upwards(a), upwards(b)
    if error is not None and (apart := distance(a, b)) is not None:
        return bool(apart <= error * (1 + 1e-9))
    if grader.verify(a, b, timeout_seconds=None, allow_set_relation_comp=is_solved(b)):
        return True
    positive = {one: sympy.Symbol(one.name, positive=True) for one in positive_symbols(a)}
    return bool(positive) and equal_formulas(a.xreplace(positive), b.xreplace(positive))

