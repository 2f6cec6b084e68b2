"""Plans on texts unlike those that they were made on: a long window, source code, chats of twenty turns.

    python benchmarks/hard_cases.py smollm2-135m --case chat --out result.json

- `long`: one window of 8192 tokens of research papers.
- `code`: four windows of 2048 tokens of the standard library's argparse.py.
- `chat`: two windows of 2500 tokens of chats in the model's own template. Each has twenty turns: ten texts with a
  question, then ten questions about texts that came before, each with its answer.

Scored as `swan frontier` scores, with KIVI beside the plans where the text is short.
"""

import argparse
import gzip
import json
import random
import sysconfig
from pathlib import Path
from typing import Any

from torch import Tensor

from swan import Plan
from swan.cli.common import envelope
from swan.evaluation.calibrations import calibration_of
from swan.evaluation.frontier import DEFAULT, fewer_tokens, methods
from swan.evaluation.models import load_model
from swan.evaluation.perplexity import Method, Setting, evaluate
from swan.evaluation.texts import TEXTS, evaluation_text, texts_folder, token_windows

RECENT: Any = {"buffer": 64, "sinks": 4}
RETENTIONS = (0.26, 0.2, 0.15, 0.1)
FEW = 0.1  # retention at which fewer tokens are scored, too


def windows_of(case: str, tokenizer: Any) -> Tensor:
    """The token windows of a case ``[windows, tokens]``."""
    match case:
        case "long":
            return token_windows(evaluation_text("qasper"), tokenizer, 1, 8192)
        case "code":
            code = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text()
            return token_windows(code, tokenizer, 4, 2048)
        case _:
            return token_windows("".join(chats(tokenizer)), tokenizer, 2, 2500)


def chats(tokenizer: Any) -> list[str]:
    """Two chats about paragraphs of Wikipedia, from the questions of SQuAD."""
    with gzip.open(texts_folder() / TEXTS["squad"], "rt", encoding="utf-8") as lines:
        documents = {doc["id"]: doc for doc in (json.loads(line)["doc"] for line in lines)}
    found = []
    for number in range(2):
        some = list(documents.values())[10 * number : 10 * (number + 1)]
        turns: list[tuple[str, str]] = []
        for title, text, question, answer in map(parts_of, some):
            turns.append((f"Here is a text about {title}: {text}\n{question}", f"{answer}."))
        for title, _, question, answer in map(parts_of, random.Random(number).sample(some, 10)):
            turns.append((f"Back to {title}. {question}", f"As I said: {answer}."))
        roles = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        found.append(tokenizer.apply_chat_template(roles, tokenize=False))
    return found


def parts_of(doc: dict[str, Any]) -> tuple[str, str, str, str]:
    """Title, text, question and answer of a document of SQuAD."""
    text, question = doc["query"].split("\nBackground: ")[1].split("\nAnswer")[0].split("\nQuestion: ")
    return doc["title"].replace("_", " "), text, question, doc["choices"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--case", choices=("long", "code", "chat"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    calibration = calibration_of(arguments.model, model, tokenizer)
    windows = windows_of(arguments.case, tokenizer)
    plans = dict.fromkeys(Plan.for_retention(r, calibration, **RECENT) for r in RETENTIONS)
    compared: list[Method] = [Setting(plan, name=DEFAULT) for plan in plans]
    compared.append(Setting(fewer_tokens(FEW, calibration, **RECENT), name="swan, tokens kept"))
    if arguments.case != "long":
        compared += [method for method in methods(calibration, **RECENT) if method.form == "kivi"]
    rows = evaluate(model, windows, compared, calibration)
    settings = {"model": arguments.model, "windows": len(windows), "length": windows.shape[1], **RECENT}
    settings |= {"dtype": "float32", "case": arguments.case}
    rows = [{"case": arguments.case} | row for row in rows]
    arguments.out.write_text(json.dumps(envelope(settings, rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
