"""LaTeX as text: boxes, parts, one spelling for what means the same, units, sides of equations.

What data/maths.py needs to know of an answer before its values are compared. Pure functions of
texts; nothing here knows numbers. Each normalisation names the LaTeX that needs it, and
tests/maths_pairs.jsonl holds what must be right and the near misses that must stay wrong.
"""
import re

# ---- Reading an answer -------------------------------------------------------------------------
# \boxed 7 or \boxed x; of "\boxed as asked" and "\boxed a second time" no letter is an answer
BARE_BOX = r"(?![aAI] [a-z]{2})(?=[-−+(\[|.]*(?:\d|\\[A-Za-z]|[A-Za-z](?![A-Za-z'’])))"
BOX = re.compile(rf"\\(?:boxed|fbox)(?:\s*\{{|\s+(?!\\boxed|\\fbox){BARE_BOX}"
                 r"(?P<bare>[^\s${}]+(?:\{[^\s${}]*\}[^\s${}]*)*))|\\.|[{}]", re.DOTALL)
# \boxed{}, \boxed{...} and \boxed{your answer} speak of a box
EMPTY = re.compile(r"""(?:[\s.$~…?_] | \\[,;:!\ _] | \\(?:q?quad | [cl]?dots)(?![A-Za-z])
    | (?:\\text\s*\{\s*)? (?:(?:your|the|final)\s)* answer (?:\shere)? \}? (?![A-Za-z])
    | \\text\s*\{\s*\})*""", re.VERBOSE | re.IGNORECASE)


def boxes(text):
    """(start, end) of what every \\boxed{..} with matched braces, or `\\boxed 7`, holds, in order
    of their starts; \\boxed{} and \\boxed{...} hold nothing. Time is linear."""
    spans, opened = [], []
    for match in BOX.finditer(text):
        if match["bare"]:
            bare = re.sub(r"(?:\\[)\]]|[.,;:])+$", "", match["bare"])
            spans.append((match.start("bare"), match.start("bare") + len(bare)))
        elif match[0] == "}":
            start, boxed = opened.pop() if opened else (0, False)
            if boxed:
                spans.append((start, match.start()))
        elif match[0][-1] == "{" and match[0] != "\\{":  # an escaped brace is no brace
            opened.append((match.end(), len(match[0]) > 1))
    return sorted(span for span in spans if EMPTY.match(text, *span).end() < span[1])


def depth_at(text, end):
    """How many round and square brackets and set braces are open before `end`."""
    depth = 0
    for match in re.finditer(r"\\[{}]|\\.|[][()]", text[:end]):
        depth += (match[0][-1] in "([{") - (match[0][-1] in ")]}") if match[0] not in BARE else 0
    return depth


BARE = ("\\(", "\\)", "\\[", "\\]")  # mathematics mode, no brackets


# Digits, letters, signs and brackets as East Asian keyboards give them; no backslash and no braces
FULL_WIDTH = {ord(wide): ord(wide) - 0xfee0 for wide in map(chr, range(0xff01, 0xff5f))
              if wide not in "＼｛｝"} | {ord("。"): ".", ord("、"): ",", ord("\u3000"): " "}


def join_thousands(text):
    """10,000 and 10\\,000 and 10 000 as 10000: groups of three digits, one separator at a time,
    always the same. Comma and blank (6, 120) separate two answers, and so does a comma in
    brackets (1,234)."""
    def joined(match):
        if depth_at(text, match.start()):
            return match[0]
        return match[0].replace(match["separator"], "")

    text = text.translate(FULL_WIDTH)
    return re.sub(r"(?<![\d.,])[1-9]\d{0,2}(?P<separator>,(?:\\! ?)?| ?\{, ?\} ?|\\[,;:! ]|~|\s)"
                  r"\d{3}(?:(?P=separator)\d{3})*(?!\d|(?P=separator)\d)", joined, text)


def split_parts(text):
    """The parts of an answer: split at commas, semicolons, "and" and "or" outside of all brackets;
    the brackets of a set, \\{1, 2\\}, or {1, 2} or S = \\{1, 2\\}, are taken off."""
    text = text.translate(FULL_WIDTH).strip().strip("$")
    text = re.sub(r"^(?:[A-Za-z]\s*(?:=|\\in\b)\s*)?\\\{(.*)\\\}$|^\{([^{}]*[,;][^{}]*)\}$",
                  lambda match: match[1] or match[2] or "", text.strip(), flags=re.DOTALL)
    parts, depth = [""], 0
    tokens = r"\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\\?."
    for token in re.findall(tokens, text, re.DOTALL):
        depth += (token[-1] in "([{") - (len(token) < 3 and token[-1] in ")]}")
        if depth == 0 and (token in (",", ";") or len(token) > 2 or token == "or"):
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts if part.strip()]


def parts_of(text):
    """The parts of an answer, each \\pm or \\mp as two."""
    text = SIZES.sub("", text).replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}")
    return [one for part in split_parts(text) for one in signs_of(part)]


def signs_of(part):
    signs = re.findall(r"\\(?:pm|mp)(?![A-Za-z])", part)
    if not signs or len(signs) > 3:
        return [part]
    variants = []
    for upper in "+-":  # one answer has the upper signs, the other the lower ones
        lower = {"+": "-", "-": "+"}[upper]
        one = re.sub(r"\\pm(?![A-Za-z])\s*", upper, part)
        variants.append(re.sub(r"\\mp(?![A-Za-z])\s*", lower, one))
    return variants


def commas(text):
    """A text split at its commas outside of all brackets; empty ones too."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


# A gold that is a word for having none, as data sets write it
NO_ANSWER = re.compile(r"""\W*(?:\\text\w*\{)?\W*(?:(?:the\s)?proof(?:\somitted)?
    |(?:answer\s)?not[\s_-]?(?:found|available|applicable|provided)|n/a|n\.a\.|null|nan|(?-i:None)
    |unknown|tb[ad]|todo|no[\s_]answer(?:\s(?:provided|given|found|available))?|error
    |see\s(?:the\s)?(?:solution|proof|above|below))\W*
    |[\s.…?!_*#\[\]{}"'–—−-]+""", re.VERBOSE | re.IGNORECASE)


QUOTED = r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'"""
ITEM = rf"""(?:{QUOTED}|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|null|None|\[+\s*["'][^][]*\]+)"""
LISTED = re.compile(rf"\[\s*{ITEM}(?:(?:\s*,\s*|\s+){ITEM})*\s*,?\s*\]")


def unpacked(gold):
    """The items of a list that was written into a text, ["34"] or ['1', 2] or [34]: texts, numbers,
    and None for null and lists in it; else the text alone: [1, 2] is an interval."""
    gold = gold.strip()
    if re.fullmatch(r"\[\s*-?\d+(?:\.\d+)?\s*\]", gold):
        return [gold[1:-1].strip()]
    if not LISTED.fullmatch(gold) or not re.search("[\"'nN]", gold):
        return [gold]
    return [item(token) for token in re.findall(ITEM, gold[1:-1])]


def item(token):
    if token[0] in "[nN":
        return None
    if token[0] not in "\"'":
        return float(token) if re.search("[.eE]", token) else int(token)
    text = token[1:-1]  # \\text is \text; a lone \text is meant as it stands, not as a tab
    return text.replace("\\\\", "\\") if re.search(r"\\\\[A-Za-z]", text) else text


# ---- Normal forms: one spelling for what means the same ------------------------------------------
UNICODE = str.maketrans({
    **FULL_WIDTH, **dict.fromkeys("−–—‐‑﹣", "-"), "×": r"\times ",
    "·": r"\cdot ", "÷": "/", "±": r"\pm ", "≈": r"\approx ", "½": r"\frac{1}{2}",
    "’": "'", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ",
    "²": "^2", "³": "^3", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ",
    **dict.fromkeys("≦⩽", r"\le "), **dict.fromkeys("≧⩾", r"\ge "),
    "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "\u00a0": " ", "\u2009": " ", "\u202f": " "})
SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?")
WORD = r"\\text\{[^{}]*\}"
PREFIX = (r"(?:(?i:so|thus|hence|therefore|the|final|correct|answer|value|result|is|equals)"
          r"\b[ ,:]*)+")

STEPS = [  # in this order: LaTeX that asks for it, pattern, replacement
    (r"$5$", r"(?<!\\)(?:\$|\\[()\[\]])", ""),
    (r"\left(5\right)", SIZES.pattern, ""),
    (r"\displaystyle 5", r"\\(?:(?:display|text|script)style|[lL]arge|huge|limits)(?![A-Za-z])",
     ""),
    (r"\color{red}5", r"\\(?:text)?color(?:box)?\s*\{[^{}]*\}", ""),
    (r"{\rm 5}", r"\\(?:bf|rm|it|sf|tt|em|bfseries|itshape)(?![A-Za-z])", ""),
    (r"\mathbf{5}", r"\\(?:mathbf|mathit|mathsf|boldsymbol|bm|underline|emph|ensuremath)(?=\s*\{)",
     ""),
    (r"5\mathrm{cm}", r"\\(?:mathrm|textrm|textbf|textit|textsf|texttt|textnormal|mbox|hbox)\s*\{",
     r"\\text{"),
    (r"5\text {cm}", r"\\text\s+\{", r"\\text{"),
    (r"\fbox{7}", r"\\(?:fbox|boxed)\s*\{([^{}]*)\}", r"\1"),
    (r"\mathrm{e}^2", r"\\text\{(\s*[ei]\s*)\}", r"\1"),
    (r"\text{20 percent}", r"^\\text\{\s*(-?\d[\d.]*)(\s[A-Za-z ]+)\}$", r"\1\\text{\2}"),
    (r"\text{5}", r"\\text\{([^A-Za-z{}]*)\}", r"\1"),
    (r"\dfrac{1}{2}", r"\\(?:[dtc]frac|nicefrac|sfrac)(?![A-Za-z])", r"\\frac"),
    (r"\varnothing", r"\\varnothing(?![A-Za-z])|\\\{(?:\s|\\[,;: ])*\\\}", r"\\emptyset "),
    (r"\lbrace 1, 2\}", r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\{1, 2\rbrace", r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"5~\text{cm}", r"\\q?quad|\\(?:thinspace|enspace)(?![A-Za-z])|(?<!\\)\\[ ,;:]|~|\s", " "),
    (r"10,\!000", r"(?<!\\)\\!", ""),
    (r"x  +  1", r" +", " "),
    (r"The answer is 7", rf"^{PREFIX}(?=[-+\\\d(A-Za-z])", ""),
    (r"\text{The answer is } 7", rf"^\\text\{{ ?{PREFIX}\}} ?(?=.)", ""),
    (r"\text{The answer is Friday}", rf"^\\text\{{ ?{PREFIX}(?=[^}}])", r"\\text{"),
    (r"= 7", r"^(?:(?:=|\\approx(?![A-Za-z])) ?|\+ ?(?=[\d.\\]))", ""),
    (r"5,", r"^(?:\\[ ,;:!]|[ ~])+|(?:[ ~,;:]|(?<!\.)\.(?!.*\.)|\\\\|\\$)+$", ""),
    (r"2 \frac{1}{2}", r"(?<![\d}])(\d+) ?\\frac(?=\{|\d| )", r"\1\\frac"),
    (r"\frac12", r"\\frac ?(\d) ?(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"\cos 30^\circ", r"(\\(?:sin|cos|tan|cot|sec|csc)(?: ?\^ ?(?:\d|\{\d\}))?) ?"
     r"\(?(\d+(?:\.\d+)?) ?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))\)?",
     r"\1(\\frac{\2\\pi}{180})"),
    (r"10^-19", r"\^ ?(-\d+)", r"^{\1}"),
    (r"2^6 3^5", r"(\^(?:\{[^{}]*\}|\d)) (?=\d)", r"\1 \\cdot "),
    (r"1.6e-19", r"(?<![\w.^\\])(1(?=[eE]-\d\d)|\d\.\d+)[eE]([-+]?\d+)(?![\w.])",
     r"\1 \\cdot 10^{\2}"),
    (r"2*pi", r"(?<![A-Za-z\\])(pi|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|ln|log|exp|sqrt)"
              r"(?=$|[^A-Za-z ]| [^a-z])", r"\\\1"),
    (r"\sqrt(2)", r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"x \in [1, 2]", r"^[A-Za-z] ?\\in(?![A-Za-z]) ?(?=[(\[])", ""),
    (r"(2)(3)", r"((?<![\w.^\\])\d+(?:\.\d+)?|\)) ?(?=\()", r"\1 \\cdot "),
]
COMPILED = [(re.compile(pattern, re.DOTALL), new) for _, pattern, new in STEPS]


def mixed(match):
    """2 1/2 in math-verify's spelling; 2 3/2 is none."""
    whole, up, down = match.groups()
    return rf"{whole}\frac{{{up}}}{{{down}}}" if int(up) < int(down) else match[0]


def improper(match):
    """2\\frac{3}{2}, which math-verify would read as a mixed number, is a product."""
    whole, up, down = match.groups()
    return rf"{whole} \cdot \frac{{{up}}}{{{down}}}" if int(up) >= int(down) else match[0]


def normal(text):
    """The text in the one spelling in which answers are compared."""
    # Outside of LaTeX a root is that of the whole number; \sqrt12 is \sqrt{1} 2
    text = re.sub(r"(?:√|(?<![A-Za-z\\])sqrt) ?(\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)
    text = text.translate(UNICODE)
    for pattern, new in COMPILED:
        text = pattern.sub(new, text)
    while text.startswith("{") and closes(text):                            # {\rm 5}
        text = text[1:-1].strip(" .,;:")
    text = re.sub(r"(?<![\d.^_])(\d+)\\frac\{(\d{1,9})\}\{(\d{1,9})\}", improper, text)
    return re.sub(r"(?<![\d.^_/}])(\d{1,6}) (\d{1,6}) ?/ ?(\d{1,6})(?![\d.])", mixed, text)  # 2 1/2


def closes(text):
    """Whether the brace at the beginning of the text is closed at its end alone."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end() == len(text)
    return False


def words(text):
    """The words of an answer in words, without markup; None for other answers. (C) is C."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    if "\\" in bare or not re.fullmatch(r"[A-Za-z .,'()-]*[A-Za-z][A-Za-z .,'()-]*", bare):
        return None
    dressed, bare = bare != text, " ".join(re.sub(r"[().,]", " ", bare).split())
    if not dressed and not re.search(r"[A-Za-z]{4}|^[A-Z]$", bare):
        return None  # abc may be a product
    return bare if len(bare) == 1 else bare.casefold()


CHOICE = re.compile(r"(?:\\text\{ ?\((?P<a>[A-Z])\) ?[.:]? ?\}|\(\\text\{ ?(?P<b>[A-Z]) ?\}\)"
                    r"|\((?P<c>[A-Z])\)|(?P<d>[A-Z])\))[:.]? ?(?P<value>\S.*)", re.DOTALL)
OPTION = re.compile(r"\\text\{ ?\(?([A-Z])\)?[:.)] ?([^{}]+)\}")  # \text{C: the option's words}
ANOTHER = re.compile(r"(?<![A-Za-z\\])[A-Z]\)|\\text\{ ?\(?[A-Z]\)? ?\}"
                     r"|^(?:\\text\{)?[^A-Za-z\d]*[A-Z][^A-Za-z\d]*$")  # B of (A) B and (A)(B)


def choice_of(text):
    """(letter, value) of a choice that is written with its value, (B) 2; ("", text) of others,
    and where two are chosen."""
    if option := OPTION.fullmatch(text):
        letter, value = option[1], rf"\text{{{option[2]}}}"
    elif match := CHOICE.fullmatch(text):
        letter, value = match["a"] or match["b"] or match["c"] or match["d"], match["value"]
    else:
        return "", text
    return ("", text) if ANOTHER.search(value) else (letter, value)


# ---- Units ---------------------------------------------------------------------------------------
# What may follow a value without changing it: \text{..} of words, words of four letters and more,
# some short names, an angle or temperature in degrees, a base (52_8).
POWER = r"(?:\s?\^\s?(?:\{\s?\d\s?\}|\d))?"
SHORT = r"(?:[ckm]m|kg|mg|k?mph|ft|lbs?|oz|mi|yd|ml|mL|hrs?|min|sec|in)"
UNIT = re.compile(rf"""(?<=[\w}})\]!])\s*(?P<unit>
      (?:(?:/|\\cdot)?\s*\^?\{{?{WORD}\}}?{POWER}\s*)+
    | (?:\s[A-Za-z]{{4,}})+{POWER}
    | (?:(?<=\d)|\s)(?:sq(?:uare)?\.?\s|cu(?:bic)?\.?\s)?{SHORT}{POWER}
      (?:\s?/\s?(?:h|s|min){POWER})?
    | \^\s?\{{?\s?\\circ\s?\}}?\s?(?:[CF]|\\text\{{\s?[CF]\s?\}})? | \\degrees?
    | (?<=\d)_\s?\{{?[1-9]\d?\}}? | [€£¥₹] | \\\$ )$""", re.VERBOSE)
NO_UNIT = re.compile(r"""\b(?:and|or|not|is|are|was|if|when|for|but|from|to|than|more|less|least
    |most|plus|minus|times|over|mod(?:ulo)?|half|halves|thirds?|quarters?|fourths?|fifths?|sixths?
    |sevenths?|eighths?|ninths?|tenths?|twelfths?|hundred(?:th)?s?|thousand(?:th)?s?
    |[mbtr]+illion(?:th)?s?|dozens?|factorial|pi|negative|percent|wrong|false|infinity|roots?
    |choose)\b
    |^[^A-Za-z]*(?:\\text\W*)?(?:squared|cubed)""",
                     re.VERBOSE | re.IGNORECASE)
NAMES = {name: unit for unit, names in {
    "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "mm": "millimeter millimetre", "in": "inch inche", "ft": "foot feet", "yd": "yard",
    "mi": "mile",
    "s": "second sec", "min": "minute", "h": "hour hr hrs", "g": "gram", "kg": "kilogram",
    "mg": "milligram", "lb": "pound lbs", "oz": "ounce", "l": "liter litre", "ml": "milliliter",
    "°": "degree deg circ", "mi/h": "mph", "km/h": "kmph kph",
    "$": "dollar usd", "€": "euro eur",
    "cent": "¢", "person": "people", "n": "newton", "j": "joule", "w": "watt",
}.items() for name in names.split()}
MEGA = re.compile(r"M(?:eV|Wh?|Hz|J|Pa|N|V|g|B|b)")
ALIKE = ({"°", "°c"}, {"°", "°f"}, {"£", "lb"})  # a scale left out; two kinds of pounds
MULTIPLIER = {"hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}",
              "billion": "10^{9}", "trillion": "10^{12}", "dozen": "12"}
MULTIPLIED = re.compile(rf"(?<=[\d}}])\s*(?P<open>\\text\{{)?\s*"
                        rf"(?P<word>{'|'.join(MULTIPLIER)})s?\b(?:\s*(?P<close>\}}))?",
                        re.IGNORECASE)
PERCENT = re.compile(r"\s*(?:\\?%|(?:\\text\{)?\s*(?:percent|per cent|pct)\s*\}?)$",
                     re.IGNORECASE)
MONEY = re.compile(r"^(?P<minus>-?)\s*(?:US\s*)?(?P<sign>\\\$|\$|€|£|¥|₹|\\euro(?![a-z])|"
                   r"\\pounds(?![a-z])|\\text\{\s*(?:USD|EUR|Rs\.?)\s*\}|USD|EUR|Rs\.?)"
                   r"\s*(?=[-\d.\\(])")


def multiplied(match):
    """1.5\\text{ million dollars} as 1.5 \\cdot 10^{6}\\text{ dollars}"""
    rest = r"\text{ " if match["open"] and not match["close"] else ""
    return rf" \cdot {MULTIPLIER[match['word'].lower()]}{rest}"


def unit_name(text):
    """A unit without markup, in one spelling: '\\text{ square centimeters}' is 'cm2'."""
    text = re.sub(r"\\(?:text(?:rm|bf)?|mathrm|mbox|cdot)(?![A-Za-z])|[~{}$^\\.,;:!]", " ", text)
    text = re.sub(r"\b(?:square|sq)\s+([A-Za-z]+)|\b([A-Za-z]+)\s+squared\b", r"\1\2 2", text)
    text = re.sub(r"\b(?:cubic|cu)\s+([A-Za-z]+)|\b([A-Za-z]+)\s+cubed\b", r"\1\2 3", text)
    text = re.sub(r"\bper\b", "/", text)

    def name(match):
        if MEGA.fullmatch(match[0]):
            return match[0]  # 5 MeV is not 5 meV
        word = match[0].lower()
        single = word.removesuffix("s") if len(word) > 3 else word
        return NAMES.get(word, NAMES.get(single, single))
    return re.sub(r"\s", "", re.sub(r"[A-Za-z¢]+", name, text))


def split_unit(text, unit=""):
    """(the value's text, the unit's name or ''). `unit`: the name of the one that is expected."""
    money = MONEY.match(text)
    if money:
        sign = {"\\euro": "€", "\\pounds": "£"}.get(money["sign"], money["sign"])
        value, tail = split_unit(money["minus"] + text[money.end():])
        return value, (unit_name(sign) or "$") + tail.removeprefix("$")
    for start in range(max(1, len(text) - 80), len(text)) if unit else ():
        head = text[:start].rstrip()
        if unit_name(text[start:]) == unit and whole(head, text[start]):
            return head, unit
    match = UNIT.search(text)
    if match and whole(text[:match.start()], "") and not NO_UNIT.search(match["unit"]):
        return text[:match.start()].rstrip(), unit_name(match["unit"])
    return text, ""


def whole(head, following):
    """Whether a value may end here: nothing open, and not inside a word or command."""
    if not head or head[-1] in "\\^_{(=+-*/," or following in ("}", ")"):
        return False
    if following.isalnum() and head[-1].isalpha():
        return False
    bare = re.sub(r"\\.", "", head)
    return bare.count("{") == bare.count("}")


# ---- Equations: what is claimed to be equal ------------------------------------------------------
LETTER = r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|theta|phi|lambda|mu|sigma|omega|tau|rho|ell))"
INDEX = r"(?:_(?:\w|\{[^{}=]*\}))?'*"
PLACE = rf"(?:{LETTER}{INDEX}|[A-Z]{{2,4}}|[A-Za-z]{{4,}}|\\text\{{[^{{}}]*\}}{INDEX}(?: ?[A-Z]+)?"
PLACE += r"|\\(?:overline|vec|hat|bar|widehat)\{[^{}=]*\}|m?\\(?:angle|triangle) ?[A-Z]+"
PLACE += r"|\|[A-Za-z]{1,3}\||\[[A-Z]{3,}\])"
NAME = re.compile(rf"{PLACE}(?: ?[-+:/] ?{PLACE})*|\({PLACE}(?:, ?{PLACE})+\)")
APPLIED = re.compile(rf"({LETTER}){INDEX}(?:\^\{{?-1\}}?)? ?\((.*)\)", re.DOTALL)


def is_name(side):
    """Whether a side of an equation names what was asked for: x, a_n, f(2), AB, m + n, AB : CD,
    (x, y). 2x + 1 and x^2 + y^2 name nothing, 6 least of all, and x(x + 1) is a product."""
    side = re.sub(r"^\\frac\{(.+)\}\{(.+)\}$", r"\1/\2", side)
    if NAME.fullmatch(side):
        names = re.split(" ?[-+:/,] ?", side.strip("()"))
        return len(set(names)) == len(names)
    applied = APPLIED.fullmatch(side)
    if not applied or depth_at(applied[2], len(applied[2])) or "=" in applied[2]:
        return False
    name, inside = applied.groups()
    if re.search(rf"(?<![A-Za-z\\]){re.escape(name)}(?![A-Za-z(])", inside):
        return False
    return name not in "xyzabckmnt" or re.fullmatch(r"-?\d+", inside.strip()) is not None


def sides_of(text):
    """The sides of an equation or chain of them; one for any other text."""
    if "\\begin" in text:
        return [text]
    sides, start = [], 0
    for match in re.finditer(r"(?<![<>!:=\\])=(?![=<>])|\\approx(?![A-Za-z])", text):
        before = re.sub(r"\\[^{}]", "", text[:match.start()])
        if depth_at(text, match.start()) or before.count("{") != before.count("}"):
            continue
        sides.append(text[start:match.start()].strip())
        start = match.end()
        if match[0] != "=" and not is_name(sides[-1]):  # 22/7 \approx 3.14
            return sides
    return [*sides, text[start:].strip()]
