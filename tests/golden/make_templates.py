"""Writes templates.json: the text of every template, which checkpoints depend on. Run only to
change it on purpose.
"""

import json
from pathlib import Path

from crossin_jax.data.templates import TEMPLATES

CASES = {
    "input": ("Name the river.", "It flows through Paris.\n[zh]"),
    "no_input": ("Name the river.", ""),
}


def render() -> dict[str, dict[str, str]]:
    return {
        name: {case: template.fill(*texts, None) for case, texts in CASES.items()}
        | {
            "system": template.fill("Name the river.", "", "Be brief."),
            "answer_prefix": template.answer_prefix,
        }
        for name, template in TEMPLATES.items()
    }


if __name__ == "__main__":
    text = json.dumps(render(), indent=1, ensure_ascii=False)
    (Path(__file__).parent / "templates.json").write_text(text + "\n", encoding="utf-8")
