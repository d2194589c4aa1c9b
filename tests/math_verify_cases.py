"""Math-Verify's own test cases under the verdict of score.py, read from its source distribution.

    pip download --no-deps --no-binary :all: math-verify==0.9.0 && tar xf math_verify-0.9.0.tar.gz
    python tests/math_verify_cases.py math_verify-0.9.0

A case is a gold, an answer and whether its authors call it right. Here an answer is what a box
holds, so that of each text the only box is taken, or what stands between its two dollars, or else
what Math-Verify itself extracts. Prints every disagreement and their number; tests/README.md gives
each a reason.
"""
import glob
import importlib
import os
import re
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import score
from conftest import read, stage, write
from data.latex import boxes
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse


def cases(folder):
    """Yield (where, gold, answer, whether it is right) of every parametrised test."""
    sys.path.insert(0, folder)
    for path in sorted(glob.glob(f"{folder}/tests/test_*.py")):
        module = importlib.import_module("tests." + os.path.basename(path).removesuffix(".py"))
        for name, test in vars(module).items():
            for mark in getattr(test, "pytestmark", ()) if name.startswith("test_") else ():
                names = re.findall(r"\w+", str(mark.args[0]))
                if mark.name != "parametrize" or names[:2] != ["gold", "pred"]:
                    continue
                for values in mark.args[1]:
                    case = dict(zip(names, values))
                    right = bool(case.get("expected", case.get("result")))
                    yield f"{module.__name__}.{name}", *values[:2], right


def answer_of(text):
    if len(found := boxes(text)) == 1:
        return text[slice(*found[0])]
    if "boxed" not in text and (alone := re.fullmatch(r"\s*(\$\$?)([^$]*)\1\s*", text)):
        return alone[2]
    extracted = parse(text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()])
    return next((one for one in reversed(extracted) if isinstance(one, str)), text)


def main(folder):
    labelled = [(where, answer_of(gold), answer_of(pred), right)
                for where, gold, pred, right in cases(folder)]
    rows = [{"id": str(i), "sample": 0, "task": "math", "answer": gold, "finish_reason": "stop",
             "completion": f"\\boxed{{{pred}}}"} for i, (_, gold, pred, _) in enumerate(labelled)]
    with tempfile.TemporaryDirectory() as work:
        stage(score, write(f"{work}/rows.jsonl", rows), "--out", f"{work}/scored.jsonl")
        scored = read(f"{work}/scored.jsonl")
    differ = [(case, row) for case, row in zip(labelled, scored, strict=True)
              if case[3] != row["correct"]]
    for (where, gold, pred, right), row in differ:
        print(f"{where}: gold {gold!r}, answer {pred!r}: Math-Verify "
              f"{'right' if right else 'wrong'}, here {row['reason']}")
    print(f"{len(labelled)} cases, {len(differ)} disagreements")


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]))
