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
import json
import os
import re
import sys
import tempfile

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import score
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
    with tempfile.TemporaryDirectory() as work:
        with open(f"{work}/rollouts.jsonl", "w", encoding="utf-8") as file:
            for i, (_, gold, pred, _) in enumerate(labelled):
                row = {"id": str(i), "sample": 0, "task": "math", "answer": gold,
                       "completion": f"\\boxed{{{pred}}}", "finish_reason": "stop"}
                file.write(json.dumps(row) + "\n")
        score.main(score.parse_args([f"{work}/rollouts.jsonl", "--out", f"{work}/scored.jsonl"]))
        with open(f"{work}/scored.jsonl", encoding="utf-8") as file:
            scored = [json.loads(line) for line in file]
    differ = [(case, row) for case, row in zip(labelled, scored, strict=True)
              if case[3] != row["correct"]]
    for (where, gold, pred, right), row in differ:
        print(f"{where}: gold {gold!r}, answer {pred!r}: Math-Verify "
              f"{'right' if right else 'wrong'}, here {row['reason']}")
    print(f"{len(labelled)} cases, {len(differ)} disagreements")


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]))
