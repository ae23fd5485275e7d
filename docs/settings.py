#!/usr/bin/env python3
"""Make the table of all settings from the script's own --help.

    python docs/settings.py --write        writes docs/settings.md; without --write the table is printed
"""

import argparse
import re
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

HEAD = """# All settings

`python docs/settings.py --write` writes this page from `python train_gpt.py --help`. Every setting is an environment
variable. `auto` means that the script chooses the value; the setting's line says how. `[PR n]` names a record of
openai/parameter-golf that ran with this default at full size, on three seeds; this project has not measured it there.
`[log]`: [our own measurements](log.md), on small models.
"""


def table(help_text: str) -> str:
    """Turn the text that --help prints into Markdown tables, one for each group."""
    lines = [HEAD]
    for line in help_text.splitlines():
        if re.fullmatch(r"\w+:", line) and line != "usage:":
            lines += ["", f"## {line[:-1]}", "", "| setting | type | default | meaning |", "|---|---|---|---|"]
        elif re.match(r"  [A-Z]", line):  # columns of 28, 6 and 13 characters, then the meaning
            name, kind, default, meaning = (line[a:b].strip() for a, b in pairwise((2, 30, 36, 49, None)))
            lines.append(f"| `{name}` | {kind} | {default} | {meaning.replace('<', '&lt;')} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    text = table(tg.help_text())
    if parser.parse_args(arguments).write:
        Path(__file__).with_name("settings.md").write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
